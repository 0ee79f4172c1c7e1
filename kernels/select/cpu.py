"""Choosing blocks in plain PyTorch: the forced ones, then the highest scores."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_compile.kernels import geometry
from nsa_compile.kernels.geometry import Tiling
from nsa_compile.kernels.modifiers import Modifiers
from nsa_compile.kernels.score.cpu import ChannelScorer, MeanScorer
from nsa_compile.kernels.visibility import Visibility, visible_blocks
from nsa_compile.kernels.workers import share_pairs

# Scores that blocks are chosen from at once: 1 MB of float32.
_CHOSEN = 1 << 18


def select_blocks(
    q: Tensor, k: Tensor, summary: Tensor, visibility: Visibility, modifiers: Modifiers,
    scorer: str, scale: float, causal: bool, offset: int, window: int | None, query_tile: int,
    block: int, num_selected: int, init_blocks: int, local_window: int, compress_block: int,
    compress_stride: int, lse: Tensor | None = None, importance: str = "overlap",
) -> Tensor:  # fmt: skip
    """int32 [B, Hkv, NT, n], ascending, padded with -1; see the reference for what they mean.

    ``lse`` is not needed here: a run of tiles has all its logits at once.
    """
    tiling = Tiling(q.shape[2], k.shape[2], causal, offset, window, query_tile, block)
    batch, kv_heads = k.shape[:2]
    chosen = torch.empty((batch * kv_heads, tiling.tiles, num_selected), dtype=torch.int32)

    # A budget that holds every block leaves the scores nothing to decide.
    decides = tiling.blocks > num_selected

    def choose(pairs: slice) -> None:
        mine = range(pairs.start, pairs.stop)
        inputs = (q, k, summary, visibility, modifiers, scale, tiling, mine)
        if scorer == "channels":
            scoring = ChannelScorer(*inputs)
        else:
            scoring = MeanScorer(*inputs, compress_block, compress_stride, importance)
        entries = torch.arange(pairs.start, pairs.stop) // kv_heads
        run = scoring.run_of_tiles()
        # One choice for several runs: its calls are many and small.
        step = run * max(1, _CHOSEN // (len(mine) * run * tiling.blocks))
        for first in range(0, tiling.tiles, step):
            tiles = range(first, min(first + step, tiling.tiles))
            visible = visible_blocks(tiling, tiles, visibility)
            if len(visible) > 1:
                visible = visible[entries]
            forced = _forced_blocks(tiling, tiles, init_blocks, local_window)
            if decides:
                runs = (range(tiles.stop)[at : at + run] for at in tiles[::run])
                scores = torch.cat([scoring.scores(r.start, r.stop) for r in runs], dim=1)
            else:
                scores = torch.zeros(len(entries), len(tiles), tiling.blocks)
            scores = scores.masked_fill(forced, torch.inf).masked_fill(~visible, -torch.inf)
            chosen[pairs, tiles.start : tiles.stop] = best_blocks(scores, num_selected)

    share_pairs(batch * kv_heads, q.shape[1] * batch * q.shape[2] * k.shape[2], choose)
    return chosen.unflatten(0, (batch, kv_heads))


def _forced_blocks(tiling: Tiling, tiles: range, init_blocks: int, local_window: int) -> Tensor:
    """bool [len(tiles), Ns]: initial blocks and those the local window touches."""
    ranges = [
        geometry.window_blocks(
            t, tiling.query_tile, tiling.q_len, tiling.kv_len, tiling.offset, tiling.causal,
            local_window, tiling.block,
        )
        for t in tiles
    ]  # fmt: skip
    first, stop = torch.tensor(ranges, dtype=torch.int64).view(-1, 2).T[..., None]
    index = torch.arange(tiling.blocks)
    return (index < init_blocks) | ((index >= first) & (index < stop))


def best_blocks(scores: Tensor, num_selected: int) -> Tensor:
    """int32 [..., n], ascending, of the n largest scores; -inf is never chosen, -1 fills up."""
    blocks = scores.shape[-1]
    if blocks > num_selected:
        best = _top(scores, num_selected)
    else:
        best = torch.arange(blocks).expand(scores.shape)
    best = best.masked_fill(scores.gather(-1, best) == -torch.inf, blocks).sort(dim=-1).values
    best = best.masked_fill(best == blocks, -1).to(torch.int32)
    return torch.nn.functional.pad(best, (0, num_selected - best.shape[-1]), value=-1)


def _top(scores: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` largest scores, in no order; ties go to the lower index.

    torch.topk promises nothing about ties, so float32 scores (never negative, but -inf) are ranked
    as integers that hold the score's bits above the reversed index.
    """
    if scores.dtype != torch.float32:
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    blocks = scores.shape[-1]
    reversed_index = torch.arange(blocks - 1, -1, -1)
    bits = scores.view(torch.int32).to(torch.int64)
    keys = bits.clamp_(min=-1).mul_(1 << 32).add_(reversed_index)
    kept = keys.topk(count, dim=-1, sorted=False).values
    return (blocks - 1) - (kept & 0xFFFFFFFF)
