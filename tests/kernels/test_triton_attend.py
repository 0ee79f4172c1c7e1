"""Attention over selected blocks, in Triton's interpreter, against the float64 reference."""

from __future__ import annotations

import pytest
import torch

from tests.kernels import triton_cases
from tests.kernels.triton_cases import Case

CASES = {
    "group of two": Case(),
    "one query": Case(q_len=1, kv_len=31, offset=30),
    "odd lengths, group of three": Case(heads=3, q_len=37, kv_len=50, query_tile=8, offset=13),
    "token granular": Case(q_len=33, kv_len=45, query_tile=1, block=8, offset=12, count=2),
    "padding": Case(heads=4, kv_heads=2, q_len=70, kv_len=75, padded=True, batch=2),
    "window and padding": Case(q_len=50, kv_len=63, window=20, padded=True, offset=9),
    "not causal": Case(causal=False, q_len=40, kv_len=56, query_tile=32),
    "not causal, window": Case(causal=False, window=9, q_len=63, kv_len=63),
    "dims 20 and 40": Case(dim=20, value_dim=40, q_len=31, kv_len=31),
    "block of 8, tile 16": Case(block=8, q_len=40, kv_len=56, offset=16, count=5),
    "block of 4, tile 16, group of three": Case(
        heads=3, block=4, q_len=37, kv_len=50, offset=13, count=7, padded=True
    ),
    "block of 2, tile 8": Case(block=2, query_tile=8, q_len=29, kv_len=41, offset=12, count=6),
    "block of 2, token granular, not causal": Case(
        heads=2, block=2, query_tile=1, q_len=19, kv_len=41, causal=False, count=5
    ),
    "long block": Case(kv_len=300, q_len=40, block=256, offset=260),
    "block of 24": Case(block=24, q_len=70, kv_len=70, query_tile=32),
    "negative offset": Case(q_len=70, kv_len=40, offset=-5),
    "negative scale": Case(scale=-0.4),
}
_TERMS = Case(heads=3, q_len=70, kv_len=75, offset=5, query_tile=8, block=8, count=5)
TERMS = {
    "chunks": _TERMS._replace(ranges="chunks"),
    "chunks of a batch, one head": Case(
        heads=2, kv_heads=2, q_len=64, kv_len=64, batch=2, ranges="chunks", count=4
    ),
    "prefix, not causal": _TERMS._replace(ranges="prefix", causal=False, batch=2),
    "random ranges, window, padding": _TERMS._replace(
        ranges="random", window=20, padded=True, batch=2
    ),
    "documents": _TERMS._replace(segments="documents", batch=2),
    "mixed segments": _TERMS._replace(segments="mixed", batch=2),
    "documents, token granular": _TERMS._replace(segments="documents", query_tile=1, q_len=33),
    "ALiBi": _TERMS._replace(slopes=True),
    "ALiBi, positions, padding": _TERMS._replace(
        slopes=True, positions=True, padded=True, batch=2, scale=-0.3
    ),
    "ALiBi, not causal, tile 16": _TERMS._replace(
        slopes=True, causal=False, query_tile=16, offset=-9
    ),
    "softcap": _TERMS._replace(softcap=2.0),
    "softcap, negative scale, window": _TERMS._replace(softcap=1.5, scale=-0.5, window=30),
    "everything": _TERMS._replace(
        softcap=2.0, slopes=True, positions=True, ranges="chunks", segments="documents",
        padded=True, batch=2, window=25,
    ),
}  # fmt: skip
CASES |= TERMS


@pytest.mark.parametrize("name", CASES)
def test_equals_reference(name: str, interpreted) -> None:
    interpreted(triton_cases.attend, CASES[name], torch.float32)


@pytest.mark.parametrize("name", ["group of two", "padding", "everything"])
def test_half_precision(name: str, interpreted) -> None:
    interpreted(triton_cases.attend, CASES[name], torch.float16)


@pytest.mark.parametrize("name", ["group of two", "padding", "token granular", "everything"])
def test_readers_of_a_block_in_several_pieces(name: str, interpreted) -> None:
    """A short piece length makes every popular block's list long."""
    interpreted(triton_cases.attend, CASES[name], torch.float32, PIECE_ROWS=32)
