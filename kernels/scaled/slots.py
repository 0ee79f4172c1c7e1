"""Slots of lists that name blocks in any order, perhaps twice."""

from __future__ import annotations

import torch
from torch import Tensor


def first_named(blocks: Tensor) -> Tensor:
    """bool [..., n]: the slot is the first of its list that names its block."""
    ordered, order = blocks.sort(dim=-1, stable=True)
    again = torch.zeros_like(ordered, dtype=torch.bool)
    again[..., 1:] = ordered[..., 1:] == ordered[..., :-1]
    return ~torch.zeros_like(again).scatter_(-1, order, again)


def by_slot(values: Tensor, index: Tensor, blocks: Tensor) -> Tensor:
    """``values`` of the blocks ``index`` [..., m], ascending, -1 at the end, at the slots of
    ``blocks`` [..., n]; 0 where a slot is empty or not the first to name its block."""
    ends = index.masked_fill(index < 0, torch.iinfo(index.dtype).max).contiguous()
    blocks = blocks.to(index.dtype)
    place = torch.searchsorted(ends, blocks.contiguous()).clamp(max=index.shape[-1] - 1)
    there = (ends.gather(-1, place) == blocks) & (blocks >= 0) & first_named(blocks)
    return values.gather(-1, place).where(there, 0.0)
