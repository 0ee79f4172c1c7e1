"""Packed sequences: each gets what it gets alone."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from nsa_compile import functional
from nsa_compile.packed import packed_ranges

LENGTHS = (48, 1, 80, 31)
CONFIG = {
    "query_tile": 16, "select_block": 16, "num_selected": 16, "window": 16, "compress_block": 8,
    "compress_stride": 4, "dense_len": 0,
}  # fmt: skip


def _inputs(lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, sum(lengths), 16, generator=generator, dtype=torch.float64)
        for heads in (4, 2, 2)
    )
    cu_seqlens = torch.tensor((0, *lengths)).cumsum(0).to(torch.int32)
    return q, k, v, cu_seqlens


def _alone(cu_seqlens: Tensor, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    edges = cu_seqlens.tolist()
    return [
        tuple(x[:, :, start:stop] for x in tensors) for start, stop in itertools.pairwise(edges)
    ]


def test_ranges():
    found = packed_ranges(torch.tensor([0, 2, 2, 5]), None, 7, 7, 0)
    assert found is not None
    assert found.dtype == torch.int32
    assert found[0].tolist() == [[0, 2]] * 2 + [[2, 5]] * 3 + [[0, 0]] * 2


@pytest.mark.parametrize("scorer", ["channels", "mean"])
@pytest.mark.parametrize("query_tile", [1, 16])
def test_a_full_budget_is_dense_attention_of_each(scorer: str, query_tile: int):
    q, k, v, cu_seqlens = _inputs()
    config = {**CONFIG, "scorer": scorer, "query_tile": query_tile}
    out = functional.nsa_attention(q, k, v, config=config, cu_seqlens=cu_seqlens)
    expected = [
        torch.nn.functional.scaled_dot_product_attention(*each, is_causal=True, enable_gqa=True)
        for each in _alone(cu_seqlens, q, k, v)
    ]
    torch.testing.assert_close(out, torch.cat(expected, 2))


def test_a_window_ends_where_the_sequence_begins():
    q, k, v, cu_seqlens = _inputs()
    out = functional.sliding_window_attention(q, k, v, window=20, cu_seqlens=cu_seqlens)
    expected = [
        functional.sliding_window_attention(*each, window=20)
        for each in _alone(cu_seqlens, q, k, v)
    ]
    torch.testing.assert_close(out, torch.cat(expected, 2))


def test_gated_branches_of_sequences_that_fill_whole_blocks():
    """Then blocks of the row are blocks of its sequences, and the choice is the same."""
    q, k, v, cu_seqlens = _inputs((48, 96, 32))
    gates = torch.rand(1, 4, 176, 3, dtype=torch.float64)
    config = {**CONFIG, "merge": "gate", "query_tile": 1, "scorer": "mean", "init_blocks": 1}
    out = functional.nsa_attention(
        q, k, v, gates=gates, config={**config, "num_selected": 16}, cu_seqlens=cu_seqlens
    )
    expected = [
        functional.nsa_attention(*each[:3], gates=each[3], config=config)
        for each in _alone(cu_seqlens, q, k, v, gates)
    ]
    torch.testing.assert_close(out, torch.cat(expected, 2))


def test_no_block_of_another_sequence_is_selected():
    q, k, _, cu_seqlens = _inputs((32, 64, 64))
    blocks = functional.select_blocks(
        q, k, query_tile=16, block=16, num_selected=4, local_window=16, cu_seqlens=cu_seqlens
    )
    first = torch.tensor([0] * 2 + [2] * 4 + [6] * 4)[:, None]
    assert ((blocks == -1) | (blocks >= first)).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cu_seqlens": torch.tensor([[0, 160]])}, "must be [S + 1]"),
        ({"cu_seqlens": torch.tensor([0.0, 160.0])}, "must be int32 or int64"),
        ({"offset": 3}, "offset=3"),
        ({"ranges": torch.zeros(1, 160, 2, dtype=torch.int32)}, "got both"),
    ],
)
def test_bad_arguments(changes: dict[str, object], message: str):
    q, k, v, cu_seqlens = _inputs()
    arguments = {"window": 8, "cu_seqlens": cu_seqlens, **changes}
    with pytest.raises(ValueError, match=message.replace("[", r"\[").replace("+", r"\+")):
        functional.sliding_window_attention(q, k, v, **arguments)
