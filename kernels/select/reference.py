"""Which blocks each tile of queries reads, tile by tile: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_compile.kernels.attend.reference import visible
from nsa_compile.kernels.score.reference import channel_scores, mean_scores


def ranked_scores(
    q: Tensor, k: Tensor, summary: Tensor, valid: Tensor | None, ranges: Tensor | None,
    query_segments: Tensor | None, key_segments: Tensor | None, slopes: Tensor | None,
    positions: Tensor | None, scorer: str, scale: float, softcap: float, causal: bool, offset: int,
    window: int | None, query_tile: int, block: int, init_blocks: int, local_window: int,
    compress_block: int, compress_stride: int, importance: str = "overlap",
) -> Tensor:  # fmt: skip
    """[B, Hkv, NT, Ns]: the scores, +inf for forced blocks, -inf for those not visible.

    Segments count in scorer "channels" alone, not in what is visible.
    """
    q_len, kv_len = q.shape[2], k.shape[2]
    logits = (slopes, positions, scale, softcap, causal, offset, window, query_tile, block)
    if scorer == "channels":
        seen = (valid, ranges, query_segments, key_segments)
        scores = channel_scores(q, k, summary, *seen, *logits)
    else:
        compression = (compress_block, compress_stride, importance)
        scores = mean_scores(q, k, summary, valid, ranges, *logits, *compression)
    seen = visible(q_len, kv_len, causal, offset, window, valid, ranges)
    distance = torch.arange(q_len)[:, None] + offset - torch.arange(kv_len)[None, :]
    if causal:
        local = (distance >= 0) & (distance < local_window)
    else:
        local = (distance <= (local_window - 1) // 2) & (distance >= -(local_window // 2))
    touched = _any_in_tile_and_block(local[None], query_tile, block)
    seen = _any_in_tile_and_block(seen if seen.ndim == 3 else seen[None], query_tile, block)
    touched = touched | (torch.arange(scores.shape[-1]) < init_blocks)
    scores = scores.masked_fill(touched[:, None], torch.inf)
    return scores.masked_fill(~seen[:, None], -torch.inf)


def select_blocks(
    q: Tensor, k: Tensor, summary: Tensor, valid: Tensor | None, ranges: Tensor | None,
    query_segments: Tensor | None, key_segments: Tensor | None, slopes: Tensor | None,
    positions: Tensor | None, scorer: str, scale: float, softcap: float, causal: bool, offset: int,
    window: int | None, query_tile: int, block: int, num_selected: int, init_blocks: int,
    local_window: int, compress_block: int, compress_stride: int, importance: str = "overlap",
) -> Tensor:  # fmt: skip
    """int32 [B, Hkv, NT, n], ascending, -1 at the end; of equal scores the lower index wins."""
    scores = ranked_scores(
        q, k, summary, valid, ranges, query_segments, key_segments, slopes, positions, scorer,
        scale, softcap, causal, offset, window, query_tile, block, init_blocks, local_window,
        compress_block, compress_stride, importance,
    )  # fmt: skip
    chosen = torch.full((*scores.shape[:3], num_selected), -1, dtype=torch.int32)
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    for at in torch.cartesian_prod(*(torch.arange(size) for size in scores.shape[:3])).tolist():
        b, h, t = at
        best = [s for s in order[b, h, t].tolist() if scores[b, h, t, s] > -torch.inf]
        best = sorted(best[:num_selected])
        chosen[b, h, t, : len(best)] = torch.tensor(best, dtype=torch.int32)
    return chosen


def _any_in_tile_and_block(mask: Tensor, query_tile: int, block: int) -> Tensor:
    """[B, Tq, Tk] -> [B, NT, Ns]: is any entry of the tile and block set."""
    by_block = torch.stack([part.any(dim=-1) for part in mask.split(block, dim=-1)], dim=-1)
    return torch.stack([part.any(dim=1) for part in by_block.split(query_tile, dim=1)], dim=1)
