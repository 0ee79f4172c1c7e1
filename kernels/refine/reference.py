"""Choosing among candidate blocks by exact logits, tile by tile: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_compile.kernels.attend.reference import modified, visible
from nsa_compile.kernels.refine.ranking import forced_candidates
from nsa_compile.kernels.score.reference import safe_softmax


def refine_blocks(
    q: Tensor, k: Tensor, candidates: Tensor, valid: Tensor | None, ranges: Tensor | None,
    query_segments: Tensor | None, key_segments: Tensor | None, slopes: Tensor | None,
    positions: Tensor | None, scale: float, softcap: float, causal: bool, offset: int,
    window: int | None, query_tile: int, block: int, num_selected: int, init_blocks: int,
    local_window: int,
) -> Tensor:  # fmt: skip
    """int32 [B, Hkv, NT, n] out of ``candidates`` [B, Hkv, NT, m]; ascending, -1 at the end."""
    forced = forced_candidates(
        candidates, q.shape[2], causal, offset, query_tile, block, init_blocks, local_window
    )
    scores = candidate_scores(
        q, k, candidates, forced, valid, ranges, query_segments, key_segments, slopes, positions,
        scale, softcap, causal, offset, window, query_tile, block,
    )  # fmt: skip
    chosen = torch.full((*candidates.shape[:3], num_selected), -1, dtype=torch.int32)
    for at in torch.cartesian_prod(*(torch.arange(s) for s in candidates.shape[:3])).tolist():
        b, h, t = at
        slots = [s for s, index in enumerate(candidates[b, h, t].tolist()) if index >= 0]
        slots.sort(key=lambda s: (-forced[b, h, t, s].item(), -scores[b, h, t, s].item(), s))
        best = sorted(candidates[b, h, t, s].item() for s in slots[:num_selected])
        chosen[b, h, t, : len(best)] = torch.tensor(best, dtype=torch.int32)
    return chosen


def candidate_scores(
    q: Tensor, k: Tensor, candidates: Tensor, forced: Tensor, valid: Tensor | None,
    ranges: Tensor | None, query_segments: Tensor | None, key_segments: Tensor | None,
    slopes: Tensor | None, positions: Tensor | None, scale: float, softcap: float, causal: bool,
    offset: int, window: int | None, query_tile: int, block: int,
) -> Tensor:  # fmt: skip
    """[B, Hkv, NT, m]: how much one query of the tile, in one head, wants the block at most.

    That is the maximum over the tile's rows of the softmax, over the free candidates, of the
    largest logit in the block: a block that one query needs is not outvoted by those that many
    queries glance at.
    """
    q_len, kv_len, kv_heads = q.shape[2], k.shape[2], k.shape[1]
    group = q.shape[1] // kv_heads
    terms = (valid, ranges, query_segments, key_segments)
    mask = visible(q_len, kv_len, causal, offset, window, *terms).view(-1, 1, q_len, kv_len)
    logits = scale * (q @ k.repeat_interleave(group, dim=1).transpose(-1, -2))
    logits = modified(logits, offset, slopes, positions, softcap).masked_fill(~mask, -torch.inf)
    best = torch.stack([part.amax(dim=-1) for part in logits.split(block, dim=-1)], dim=-1)
    free = candidates.masked_fill(forced, -1)
    rows = free.repeat_interleave(query_tile, dim=2)[:, :, :q_len].repeat_interleave(group, dim=1)
    listed = best.gather(3, rows.clamp(min=0).long()).masked_fill(rows < 0, -torch.inf)
    wanted = safe_softmax(listed).unflatten(1, (kv_heads, group)).amax(dim=2)
    return torch.stack([tile.amax(dim=2) for tile in wanted.split(query_tile, dim=2)], dim=2)
