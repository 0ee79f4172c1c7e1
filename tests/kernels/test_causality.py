"""What later tokens can change, by changing them (docs/semantics.md)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_compile.functional import nsa_attention, select_blocks

T, CUT = 320, 200
SIZES = {
    "dense_len": 0, "num_selected": 8, "window": 32, "select_block": 16, "compress_block": 8,
    "compress_stride": 4,
}  # fmt: skip


def before_and_after(**config: Any) -> tuple[Tensor, Tensor]:
    """Outputs for two inputs that agree on the first ``CUT`` tokens."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, T, 16, dtype=torch.float64) for _ in range(3))
    first = nsa_attention(q, k[:, :2], v[:, :2], config={**SIZES, **config})
    for x in (q, k, v):
        x[:, :, CUT:] = 3 * torch.randn_like(x[:, :, CUT:])
    return first, nsa_attention(q, k[:, :2], v[:, :2], config={**SIZES, **config})


@pytest.mark.parametrize("scorer", ["mean", "channels"])
def test_a_tile_of_one_without_a_statistic_is_strictly_causal(scorer: str) -> None:
    """All channels are read, so none is chosen."""
    first, second = before_and_after(scorer=scorer, query_tile=1)
    assert torch.equal(first[:, :, :CUT], second[:, :, :CUT])


def test_tile_sharing_only_reaches_to_the_end_of_the_tile() -> None:
    first, second = before_and_after(scorer="mean", query_tile=64)
    start_of_tile = CUT // 64 * 64
    assert torch.equal(first[:, :, :start_of_tile], second[:, :, :start_of_tile])
    assert not torch.equal(first[:, :, start_of_tile:CUT], second[:, :, start_of_tile:CUT])


@pytest.mark.parametrize("query_tile", [1, 64])
def test_later_tokens_change_the_choice_of_channels_but_never_what_is_read(query_tile: int) -> None:
    """The statistic spans the sequence, so choices may differ; no value of the future gets in."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, T, 16, dtype=torch.float64) for _ in range(3))
    config = {**SIZES, "query_tile": query_tile, "score_channels": 2}
    first = nsa_attention(q, k, v, config=config)
    marked = v.clone()
    marked[:, :, CUT:] = 1e6
    second = nsa_attention(q, k, marked, config=config)
    assert torch.equal(first[:, :, :CUT], second[:, :, :CUT])
    k[:, :, CUT:] *= torch.linspace(1, 30, 16)
    third = nsa_attention(q, k, v, config=config)
    assert not torch.equal(first[:, :, :CUT], third[:, :, :CUT])


@pytest.mark.parametrize("scorer", ["channels", "mean"])
@pytest.mark.parametrize("query_tile", [1, 16, 64])
def test_no_block_of_the_future_is_selected(scorer: str, query_tile: int) -> None:
    q, k = (torch.randn(2, 2, T, 16) for _ in range(2))
    blocks = select_blocks(
        q, k, scorer=scorer, query_tile=query_tile, block=16, num_selected=8, local_window=20
    )
    last = torch.arange(1, blocks.shape[2] + 1).mul(query_tile).clamp(max=T) - 1
    assert (blocks <= (last // 16)[:, None]).all()
