"""Scoring and selecting blocks, in Triton's interpreter, against the float64 reference."""

from __future__ import annotations

import pytest
import torch

from tests.kernels import triton_cases
from tests.kernels.triton_cases import Case

CASES = {
    "group of two": Case(q_len=70, kv_len=70, count=4),
    "one query": Case(q_len=1, kv_len=40, offset=39, block=8),
    "short tiles, group of four": Case(
        heads=4, q_len=28, kv_len=32, query_tile=4, count=3, local_window=5
    ),
    "token granular": Case(q_len=20, kv_len=20, query_tile=1, block=8, count=3, local_window=5),
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
TERMS = {
    "chunks": Case(q_len=70, kv_len=70, count=4, ranges="chunks"),
    "prefix, padding": Case(
        heads=2, q_len=60, kv_len=64, causal=False, padded=True, batch=2, count=4, ranges="prefix"
    ),
    "random ranges, window": Case(
        q_len=50, kv_len=60, offset=10, window=40, count=4, ranges="random", batch=2, padded=True
    ),
    "random ranges, token granular": Case(
        q_len=20, kv_len=20, query_tile=1, block=8, count=3, local_window=5, ranges="random"
    ),
    "documents": Case(heads=3, q_len=50, kv_len=60, offset=10, count=4, segments="documents"),
    "mixed segments": Case(
        heads=2, kv_heads=2, q_len=40, kv_len=64, causal=False, batch=2, segments="mixed"
    ),
    "alibi": Case(heads=4, kv_heads=2, q_len=64, kv_len=64, slopes=True, block=8, count=5),
    "alibi, positions, padding, block of 24": Case(
        q_len=60, kv_len=60, batch=2, padded=True, slopes=True, positions=True, block=24,
        compress_block=12,
    ),
    "cap": Case(q_len=70, kv_len=70, count=4, softcap=1.5, scale=-0.4),
    "everything": Case(
        heads=2, kv_heads=2, q_len=40, kv_len=50, offset=10, batch=2, padded=True, count=4,
        ranges="chunks", segments="mixed", slopes=True, positions=True, softcap=1.5,
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
