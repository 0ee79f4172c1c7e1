"""Tensors for the optional terms of a site: ranges of keys, segments, ALiBi."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK = 24


def ranges(kind: str, batch: int, q_len: int, kv_len: int, offset: int) -> Tensor | None:
    """int32 [B or 1, Tq, 2]: "chunks", "prefix" (causal past it), "random" (some empty)."""
    p = torch.arange(q_len) + offset
    if kind == "chunks":
        low = p.div(CHUNK, rounding_mode="floor") * CHUNK
        bounds = torch.stack((low, low + CHUNK), dim=-1)[None]
    elif kind == "prefix":
        prefix = torch.arange(batch)[:, None] * 9 + kv_len // 3
        high = torch.maximum(p + 1, prefix)
        bounds = torch.stack((torch.zeros_like(high), high), dim=-1)
    elif kind == "random":
        rng = torch.Generator().manual_seed(3)
        ends = torch.randint(-9, kv_len + 9, (batch, q_len, 2), generator=rng).sort(dim=-1).values
        empty = torch.rand(batch, q_len, generator=rng) < 0.1
        bounds = ends.where(~empty[..., None], ends.flip(-1))
    else:
        return None
    return bounds.to(torch.int32)


def segments(
    kind: str, batch: int, q_len: int, kv_len: int, offset: int
) -> tuple[Tensor | None, Tensor | None]:
    """int32 [B or 1, Tq] and [B or 1, Tk] of one id a key: "documents", or "mixed" (repeating)."""
    j = torch.arange(max(kv_len, q_len + offset, 1))
    if kind == "documents":
        ids = (j // 19)[None]
    elif kind == "mixed":
        rng = torch.Generator().manual_seed(4)
        ids = torch.randint(-2, 3, (batch, len(j)), generator=rng)
    else:
        return None, None
    p = (torch.arange(q_len) + offset).clamp(min=0)
    return ids[:, p].to(torch.int32), ids[:, :kv_len].to(torch.int32)


def slopes(heads: int) -> Tensor:
    """float32 [Hq], as ALiBi spaces them."""
    return 2.0 ** (-torch.arange(1, heads + 1) * 4 / heads)


def positions(batch: int, kv_len: int) -> Tensor:
    """float32 [B, Tk]: not in the order of the keys, and each entry of the batch has its own."""
    start = torch.arange(batch)[:, None] * 5
    return ((torch.arange(kv_len) + start) * 37 % 61 / 4).float()


def tensors(site: Any, heads: int, kv_len: int, valid: Tensor | None) -> tuple[Tensor | None, ...]:
    """valid, ranges, query and key segments, slopes, positions: as operators take them."""
    sizes = (site.batch, site.q_len, kv_len, site.offset)
    return (
        valid,
        ranges(site.ranges, *sizes),
        *segments(site.segments, *sizes),
        slopes(heads) if site.slopes else None,
        positions(site.batch, kv_len) if site.positions else None,
    )
