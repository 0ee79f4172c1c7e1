"""Which blocks the tiles of a sliding window read: they are known from the shapes.

A window is attention over selected blocks whose lists are arithmetic, so the same kernels serve it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_compile.kernels.attend.site import Site

# One H100, 65,536 tokens, window 512, blocks of 64, ms by queries of a tile: forward, query and key
# side (the latter behind a gate). 64/4 heads: 32 queries 3.2, 4.5, 7.2; 64 queries 3.3, 4.8, 6.9;
# 128 queries 3.6, 5.6, -. 32/8 heads: 32 queries 1.7, 2.5, 3.8; 64 queries 1.7, 2.4, 3.6; 128
# queries 2.0, 2.6, -. 32/32 heads, forward + backward: 32 queries 3.5 + 8.1, 64 queries 2.3 + 7.0,
# 128 queries 2.4 + 7.4. Blocks of 128 are slower everywhere.
_TILE = _BLOCK = 64


def window_blocks(
    q: Tensor, k: Tensor, valid: Tensor | None, ranges: Tensor | None, scale: float, causal: bool,
    offset: int, window: int,
) -> tuple[Tensor, Site]:  # fmt: skip
    """int32 [B, Hkv, NT, n], the blocks of each tile's window, and the site that reads them."""
    table = _table(q, k, causal, offset, window)
    site = Site(
        valid, ranges, None, None, None, None, scale, 0.0, causal, offset, window, _TILE, _BLOCK
    )
    return table.expand(k.shape[0], k.shape[1], -1, -1), site


def _table(q: Tensor, k: Tensor, causal: bool, offset: int, window: int) -> Tensor:
    """int32 [NT, n]; blocks past the last key are never read."""
    ahead = 0 if causal else window - 1
    tiles = -(-q.shape[2] // _TILE)
    reach = _TILE - 1 + ahead + window - 1  # from the first key of the window to the last
    width = (reach + (offset - (window - 1)) % _BLOCK) // _BLOCK + 1
    width = min(width, -(-k.shape[2] // _BLOCK))
    starts = torch.arange(tiles, dtype=torch.int32, device=q.device)[:, None] * _TILE + offset
    slots = torch.arange(width, dtype=torch.int32, device=q.device)
    first = torch.div(starts - (window - 1), _BLOCK, rounding_mode="floor").clamp(min=0)
    last = torch.div(starts + (_TILE - 1 + ahead), _BLOCK, rounding_mode="floor")
    table = first + slots
    return torch.where(table <= last, table, -1).to(torch.int32)
