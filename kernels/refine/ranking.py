"""Which candidates are forced, and the final choice by score: small tensors, any device."""

from __future__ import annotations

import torch
from torch import Tensor


def forced_candidates(
    candidates: Tensor, q_len: int, causal: bool, offset: int, query_tile: int, block: int,
    init_blocks: int, local_window: int,
) -> Tensor:  # fmt: skip
    """bool, like ``candidates`` [B, Hkv, NT, m]: initial blocks and those the local window touches.

    A candidate is a block that its tile sees, so the window needs no other bound.
    """
    first = torch.arange(candidates.shape[2], device=candidates.device)[:, None] * query_tile
    last = (first + query_tile).clamp(max=q_len) - 1
    back, ahead = (local_window - 1, 0) if causal else ((local_window - 1) // 2, local_window // 2)
    near = (first + (offset - back)).div(block, rounding_mode="floor")
    far = (last + (offset + ahead)).div(block, rounding_mode="floor")
    touched = (candidates >= near) & (candidates <= far)
    return (candidates >= 0) & (touched | (candidates < init_blocks))


def best_candidates(candidates: Tensor, forced: Tensor, scores: Tensor, count: int) -> Tensor:
    """int32 [B, Hkv, NT, n]: the forced ones, then the highest scores; ascending, -1 at the end.

    Candidates ascend, so a stable sort gives ties to the lower block.
    """
    worth = scores.masked_fill(forced, torch.inf).masked_fill(candidates < 0, -torch.inf)
    order = worth.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    past = torch.iinfo(torch.int32).max
    chosen = candidates.gather(-1, order)
    chosen = chosen.masked_fill(chosen < 0, past).sort(dim=-1).values
    return chosen.masked_fill(chosen == past, -1).to(torch.int32)
