"""Exact logits of candidate blocks in plain PyTorch, memory linear in T."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_compile.kernels.attend.plan import Plan, Run
from nsa_compile.kernels.geometry import Tiling
from nsa_compile.kernels.precision import accumulator
from nsa_compile.kernels.refine.ranking import best_candidates, forced_candidates
from nsa_compile.kernels.visibility import Visibility


def refine_blocks(
    q: Tensor, k: Tensor, candidates: Tensor, valid: Tensor | None, scale: float, causal: bool,
    offset: int, window: int | None, query_tile: int, block: int, num_selected: int,
    init_blocks: int, local_window: int,
) -> Tensor:  # fmt: skip
    """int32 [B, Hkv, NT, n] out of ``candidates`` [B, Hkv, NT, m]; see the reference."""
    tiling = Tiling(q.shape[2], k.shape[2], causal, offset, window, query_tile, block)
    forced = forced_candidates(
        candidates, q.shape[2], causal, offset, query_tile, block, init_blocks, local_window
    )
    free, order = _free_first(candidates.masked_fill(forced, -1))
    plan = Plan(free, q.shape[1] // k.shape[1], tiling, Visibility(valid))
    wide = accumulator(q.dtype)
    shares = q.new_zeros(free.shape, dtype=wide)
    for pair in plan.pairs(slice(None)):
        keys = pair.table("keys", k, wide)
        for run in pair.runs(k.shape[3]):
            rows = (run.of(q).to(wide) * scale).reshape(run.tiles, -1, k.shape[3])
            best = _best(run, rows, keys)
            # A query that sees none of them gives NaN, and has no say.
            weight = torch.softmax(best, dim=2).nan_to_num_(0.0).amax(dim=1)
            shares[pair.batch, pair.head, run.first : run.stop, : weight.shape[1]] = weight
    scores = shares.new_zeros(candidates.shape).scatter_(3, order, shares)
    return best_candidates(candidates, forced, scores, num_selected)


def _best(run: Run, rows: Tensor, keys: Tensor) -> Tensor:
    """[tiles, G * rows, slots]: the largest logit of each row in each block."""
    logits, _ = run.logits("logits", rows, run.read("run keys", keys))
    return logits.unflatten(2, (-1, run.tiling.block)).amax(dim=3)


def _free_first(free: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks ahead of the -1 between them, still ascending, and where each stood.

    As many columns as the tile with the most of them needs.
    """
    order = (free < 0).to(torch.int8).sort(dim=3, stable=True).indices
    width = int((free >= 0).sum(dim=3).amax()) if free.numel() else 0
    order = order[..., : max(1, width)]
    return free.gather(3, order), order
