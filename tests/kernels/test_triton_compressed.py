"""Attention over compressed keys, in Triton's interpreter, against the float64 reference."""

from __future__ import annotations

import pytest
import torch

from tests.kernels import triton_cases
from tests.kernels.triton_cases import Case

CASES = {
    "group of two": Case(q_len=200, kv_len=200),
    "one query": Case(q_len=1, kv_len=170, offset=169),
    "odd lengths, group of three": Case(heads=3, q_len=37, kv_len=150, offset=113),
    "two kv heads, padding": Case(
        heads=4, kv_heads=2, q_len=170, kv_len=175, block=32, padded=True, batch=2
    ),
    "not causal": Case(causal=False, q_len=40, kv_len=156),
    "not causal, padding": Case(causal=False, q_len=40, kv_len=156, padded=True, batch=2),
    "dims 20 and 40": Case(dim=20, value_dim=40, q_len=131, kv_len=131),
    "no overlap": Case(q_len=140, kv_len=140, compress_stride=8),
    "gaps": Case(q_len=140, kv_len=140, compress_block=4, compress_stride=6),
    "negative offset": Case(q_len=170, kv_len=140, offset=-35),
    "more queries than keys": Case(q_len=140, kv_len=70),
    "negative scale": Case(q_len=140, kv_len=140, scale=-0.4),
    "chunks": Case(q_len=140, kv_len=140, ranges="chunks"),
    "random ranges, padding": Case(q_len=70, kv_len=140, ranges="random", padded=True, batch=2),
    "random ranges, not causal": Case(q_len=70, kv_len=140, ranges="random", causal=False),
    "prefix": Case(q_len=140, kv_len=140, ranges="prefix", causal=False, batch=2),
    "group of seven, one head": Case(heads=7, q_len=90, kv_len=90),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_reference(name: str, interpreted) -> None:
    interpreted(triton_cases.compressed, CASES[name], torch.float32)


@pytest.mark.parametrize("name", ["group of two", "two kv heads, padding"])
def test_half_precision(name: str, interpreted) -> None:
    interpreted(triton_cases.compressed, CASES[name], torch.float16)


@pytest.mark.parametrize("name", ["group of two", "two kv heads, padding", "negative scale"])
def test_its_sums_choose_blocks(name: str, interpreted) -> None:
    case = CASES[name]._replace(query_tile=1, q_len=40, offset=100)
    interpreted(triton_cases.select, case, torch.float32, "mean", with_lse=True)


@pytest.mark.parametrize("name", sorted({*CASES} - {"two kv heads, padding"}))
def test_through_descriptors(name: str, interpreted) -> None:
    case = CASES[name]._replace(dim=24, value_dim=40)
    interpreted(triton_cases.described, triton_cases.compressed, case, torch.float16)


@pytest.mark.parametrize("heads", [1, 2])
def test_pieces_of_the_queries(heads: int, interpreted) -> None:
    case = CASES["group of two"]._replace(heads=heads)
    interpreted(triton_cases.compressed, case, torch.float32, PIECE_ROWS=64)
