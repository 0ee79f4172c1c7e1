"""From compressed blocks to selection blocks: by overlap or by interpolation, down to 2 tokens."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from nsa_compile.kernels import geometry
from nsa_compile.kernels.score import reference
from tests.kernels import triton_cases
from tests.kernels.inputs import Site
from tests.kernels.test_select_blocks import assert_best, reference_scores, select
from tests.kernels.triton_cases import Case

# Compression block and stride, selection block.
SIZES = (
    (32, 16, 64), (8, 4, 8), (8, 4, 4), (8, 4, 2), (8, 2, 2), (8, 8, 4), (4, 4, 2), (8, 1, 2),
    (7, 7, 14), (16, 8, 2), (8, 6, 8), (5, 2, 8), (5, 4, 2), (7, 3, 4), (6, 6, 4), (48, 24, 64),
)  # fmt: skip


def folded(mass: torch.Tensor, blocks: int, sizes: tuple[int, int, int], importance: str, causal):
    """[.., Nc] -> [.., Ns] by the table of weights, one block at a time."""
    length, stride, block = sizes
    phases = geometry.fold_weights(length, stride, block, importance)
    out = mass.new_zeros(*mass.shape[:-1], blocks)
    for s in range(blocks):
        for delta, weight in phases[s % len(phases)]:
            c = s * block // stride + delta
            if importance == "interpolate":
                c = max(c, 0) if causal else min(max(c, 0), mass.shape[-1] - 1)
            if 0 <= c < mass.shape[-1]:
                out[..., s] += weight * mass[..., c]
    return out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_table_equals_the_definition(sizes: tuple[int, int, int], causal: bool) -> None:
    length, stride, block = sizes
    tokens = 150
    count, blocks = (tokens - length) // stride + 1, -(-tokens // block)
    mass = torch.rand(3, count, dtype=torch.float64)
    shared = reference.overlap(count, blocks, block, length, stride)
    got = folded(mass, blocks, sizes, "overlap", causal)
    torch.testing.assert_close(got, mass @ shared)
    between = reference.interpolation(count, blocks, block, length, stride, causal)
    got = folded(mass, blocks, sizes, "interpolate", causal)
    torch.testing.assert_close(got, mass @ between)


@pytest.mark.parametrize(("length", "block"), [(8, 4), (8, 2), (4, 2), (16, 8), (4, 8)])
def test_interpolation_is_that_of_torch(length: int, block: int) -> None:
    """Blocks that do not overlap, both ends included: a mean over torch's linear interpolation."""
    mass = torch.rand(5, 12, dtype=torch.float64)
    tokens = 12 * length
    by_token = F.interpolate(mass[None], tokens, mode="linear")[0]
    expected = by_token.unflatten(-1, (-1, block)).mean(-1)
    between = reference.interpolation(12, tokens // block, block, length, length, False)
    torch.testing.assert_close(mass @ between * length / block, expected)
    # Under causality the last half of a block is not the end, it is where nothing is known yet.
    between = reference.interpolation(12, tokens // block, block, length, length, True)
    known = (tokens - length) // block
    torch.testing.assert_close((mass @ between * length / block)[:, :known], expected[:, :known])


def test_interpolation_tells_blocks_inside_one_compressed_block_apart() -> None:
    mass = torch.tensor([0.0, 0.1, 0.6, 0.3], dtype=torch.float64)
    shared = mass @ reference.overlap(4, 16, 2, 8, 8)
    between = mass @ reference.interpolation(4, 16, 2, 8, 8, True)
    assert shared[8:12].unique().numel() == 1
    assert between[8:12].unique().numel() == 4


SMALL = Site(batch=1, q_len=70, block=4, query_tile=1, num_selected=5, local_window=5)
SITES = {
    "block 8": SMALL.but(block=8, local_window=9),
    "block 4": SMALL,
    "block 2": SMALL.but(block=2, local_window=3),
    "block 2, stride 8": SMALL.but(block=2, local_window=3, compress_stride=8),
    "stride 6": SMALL.but(block=8, local_window=9, compress_stride=6),
    "compressed 5, stride 2": SMALL.but(
        block=8, local_window=9, compress_block=5, compress_stride=2
    ),
    "compressed 7, stride 3, not causal": SMALL.but(
        compress_block=7, compress_stride=3, causal=False, padding="right", batch=2
    ),
    "block 2, tile 16": SMALL.but(block=2, local_window=1, query_tile=16, num_selected=14),
    "block 4, G=3, padding": SMALL.but(group=3, padding="scattered", batch=2),
    "not causal": SMALL.but(causal=False),
    "not causal, block 2, padding": SMALL.but(
        causal=False, block=2, local_window=3, padding="right", batch=2
    ),
    "not causal, window": SMALL.but(causal=False, window=30),
    "offset": SMALL.but(q_len=30, kv_len=101, offset=71),
    "cross": SMALL.but(q_len=30, kv_len=101, causal=False),
    "chunks": SMALL.but(ranges="chunks"),
    "T=8": SMALL.but(q_len=8),
    "T=9": SMALL.but(q_len=9),
    "T=4": SMALL.but(q_len=4),
}


@pytest.mark.parametrize("importance", ["overlap", "interpolate"])
@pytest.mark.parametrize("name", SITES)
def test_small_blocks_equal_the_reference(name: str, importance: str) -> None:
    site = SITES[name].but(importance=importance)
    q, k, _ = site.tensors()
    assert_best(select(site, "mean", q, k), reference_scores(site, "mean", q, k), 1e-9)


@pytest.mark.parametrize("block", [2, 4])
def test_small_blocks_by_channels(block: int) -> None:
    site = SMALL.but(block=block, local_window=block + 1)
    q, k, _ = site.tensors()
    assert_best(select(site, "channels", q, k), reference_scores(site, "channels", q, k), 1e-9)


FEW = Case(
    heads=2, kv_heads=1, q_len=7, kv_len=60, offset=53, query_tile=1, block=4, count=5,
    local_window=5, scale=0.8,
)  # fmt: skip
CASES = {
    "block 8": FEW._replace(block=8, local_window=9),
    "block 4": FEW,
    "block 2": FEW._replace(block=2, local_window=3),
    "block 2, stride 8": FEW._replace(block=2, local_window=3, compress_stride=8),
    "stride 6": FEW._replace(block=8, local_window=9, compress_stride=6),
    "compressed 5, stride 2": FEW._replace(
        block=8, local_window=9, compress_block=5, compress_stride=2, padded=True, batch=2
    ),
    "block 2, tile 16, padding": FEW._replace(
        block=2, local_window=1, query_tile=16, q_len=13, count=14, padded=True, batch=2
    ),
    "block 4, not causal": FEW._replace(causal=False, offset=0, padded=True),
    "block 4, not causal, window": FEW._replace(causal=False, offset=20, window=20),
    "block 2, chunks": FEW._replace(block=2, local_window=3, ranges="chunks", count=4),
}


@pytest.mark.parametrize("importance", ["overlap", "interpolate"])
@pytest.mark.parametrize("name", CASES)
def test_small_blocks_in_triton(name: str, importance: str, interpreted) -> None:
    case = CASES[name]._replace(importance=importance)
    interpreted(triton_cases.select, case, torch.float32, "mean")


@pytest.mark.parametrize("name", ["block 8", "block 2", "block 2, tile 16, padding"])
def test_small_blocks_in_triton_by_channels(name: str, interpreted) -> None:
    interpreted(triton_cases.select, CASES[name], torch.float32, "channels")
