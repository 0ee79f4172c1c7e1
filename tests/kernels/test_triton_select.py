"""Scoring and selecting blocks, in Triton's interpreter, against the float64 reference."""

from __future__ import annotations

import pytest
import torch

from tests.kernels import triton_cases
from tests.kernels.triton_cases import Case

CASES = {
    "group of two": Case(q_len=70, kv_len=70, count=4),
    "whole tiles": Case(q_len=96, kv_len=128, offset=32, query_tile=32, count=5),
    "one query": Case(q_len=1, kv_len=40, offset=39, block=8),
    "short tiles, group of four": Case(
        heads=4, q_len=28, kv_len=32, query_tile=4, count=3, local_window=5
    ),
    "token granular": Case(q_len=20, kv_len=20, query_tile=1, block=8, count=3, local_window=5),
    "token granular, group of sixteen": Case(
        heads=16, q_len=12, kv_len=170, offset=158, query_tile=1, count=5, local_window=5, scale=0.8
    ),
    "tiles of four, group of seven, padding": Case(
        heads=7,
        q_len=30,
        kv_len=120,
        offset=90,
        query_tile=4,
        count=5,
        local_window=5,
        scale=0.8,
        padded=True,
        batch=2,
    ),
    "group of sixteen, long compressed blocks": Case(
        heads=16,
        q_len=6,
        kv_len=170,
        offset=164,
        query_tile=1,
        block=8,
        compress_block=14,
        count=5,
        local_window=5,
        scale=0.8,
    ),
    "padding": Case(
        heads=2, kv_heads=1, q_len=70, kv_len=70, query_tile=32, count=5, padded=True, batch=2
    ),
    "window and padding": Case(
        heads=3, q_len=75, kv_len=90, window=40, padded=True, offset=15, count=4
    ),
    "not causal": Case(causal=False, q_len=60, kv_len=64, query_tile=32, count=4),
    "not causal, window": Case(causal=False, window=30, q_len=60, kv_len=70, count=5),
    "long tile and block": Case(
        q_len=300, kv_len=300, query_tile=256, block=256, count=3, compress_stride=8
    ),
    "block of 24, group of seven": Case(heads=7, q_len=40, kv_len=60, block=24, compress_block=12),
    "negative offset": Case(q_len=50, kv_len=60, offset=-7, query_tile=32, count=4),
    "negative scale": Case(scale=-0.4),
    "too short to compress": Case(q_len=7, kv_len=7, block=8, compress_block=8),
}
# Many blocks and few free slots: a kernel that forgets a term chooses worse blocks.
_FEW = Case(
    q_len=40, kv_len=160, offset=120, block=8, count=5, local_window=2, scale=0.8, channels=12
)
TERMS = {
    "chunks": _FEW._replace(ranges="chunks", count=3),
    "prefix, padding": _FEW._replace(
        ranges="prefix", causal=False, padded=True, batch=2, offset=60
    ),
    "random ranges, window": _FEW._replace(ranges="random", window=90, batch=2, padded=True),
    "random ranges, token granular": _FEW._replace(ranges="random", query_tile=1, q_len=12),
    "documents": _FEW._replace(heads=3, segments="documents", local_window=12),
    "mixed segments": _FEW._replace(
        heads=2, kv_heads=2, causal=False, batch=2, segments="mixed", offset=60
    ),
    "alibi": _FEW._replace(heads=4, kv_heads=2, slopes=True),
    "alibi, positions, padding, block of 24": _FEW._replace(
        batch=2, padded=True, slopes=True, positions=True, block=24, compress_block=12, count=3,
        kv_len=300, offset=-20, q_len=60, causal=False,
    ),
    "cap": _FEW._replace(softcap=1.0, scale=-1.5),
    "everything": _FEW._replace(
        heads=2, kv_heads=2, batch=2, padded=True, ranges="random", segments="mixed", slopes=True,
        positions=True, softcap=1.0, scale=1.5,
    ),
}  # fmt: skip


@pytest.mark.parametrize("scorer", ["channels", "mean"])
@pytest.mark.parametrize("name", TERMS)
def test_ranges_segments_alibi_and_caps(name: str, scorer: str, interpreted) -> None:
    interpreted(triton_cases.select, TERMS[name], torch.float32, scorer)


@pytest.mark.parametrize("name", ["alibi", "everything"])
def test_terms_in_half_precision(name: str, interpreted) -> None:
    for scorer in ("channels", "mean"):
        interpreted(triton_cases.select, TERMS[name], torch.float16, scorer)


@pytest.mark.parametrize("scorer", ["channels", "mean"])
@pytest.mark.parametrize("name", CASES)
def test_picks_the_best(name: str, scorer: str, interpreted) -> None:
    interpreted(triton_cases.select, CASES[name], torch.float32, scorer)


@pytest.mark.parametrize("scorer", ["channels", "mean"])
@pytest.mark.parametrize("name", ["group of two", "padding"])
def test_half_precision(name: str, scorer: str, interpreted) -> None:
    interpreted(triton_cases.select, CASES[name], torch.float16, scorer)


@pytest.mark.parametrize("name", ["group of two", "padding", "not causal, window",
    "block of 24, group of seven", "negative scale"])  # fmt: skip
def test_eight_bits(name: str, interpreted) -> None:
    interpreted(triton_cases.select_in_eight_bits, CASES[name], torch.float16)


@pytest.mark.parametrize("name", ["group of two", "one query", "block of 24, group of seven",
    "token granular, group of sixteen", "not causal, window", "negative offset"])  # fmt: skip
def test_through_descriptors(name: str, interpreted) -> None:
    case = CASES[name]._replace(dim=24)
    interpreted(triton_cases.described, triton_cases.select, case, torch.float16, "mean")


@pytest.mark.parametrize("scorer", ["channels", "mean"])
def test_rounds_of_tiles(scorer: str, interpreted) -> None:
    """Little scratch memory makes the tiles go in several rounds."""
    interpreted(triton_cases.select, CASES["padding"], torch.float32, scorer, SCRATCH_BYTES=2048)


def test_more_blocks_than_one_program_holds(interpreted) -> None:
    interpreted(triton_cases.select, CASES["group of two"], torch.float32, "mean", WIDEST=2)


@pytest.mark.parametrize("name", ["group of two", "padding", "block of 24, group of seven"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_channels(name: str, dtype: torch.dtype, interpreted) -> None:
    interpreted(triton_cases.channels, CASES[name], dtype)


@pytest.mark.parametrize("name", ["group of two", "padding", "too short to compress", "one query"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_compress(name: str, dtype: torch.dtype, interpreted) -> None:
    interpreted(triton_cases.compress, CASES[name], dtype)
