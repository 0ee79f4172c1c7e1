"""Exact logits of candidate blocks in plain PyTorch, memory linear in T."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nsa_compile.kernels.attend.plan import Part, Plan
from nsa_compile.kernels.geometry import Tiling
from nsa_compile.kernels.refine.ranking import best_candidates, forced_candidates


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
    plan = Plan(q, k, free, valid, tiling)
    queries, keys = plan.tiles(q).mul_(scale), plan.blocks(k)
    shares = queries.new_zeros(len(queries), free.shape[3])

    def weigh(runs: Iterator[tuple[slice, list[Part]]]) -> None:
        for at, parts in runs:
            logits = [part.scores(queries[at], keys) for part in parts]
            best = torch.cat([x.unflatten(2, (-1, block)).amax(dim=3) for x in logits], dim=2)
            # A query that sees none of them gives NaN, and has no say.
            weight = torch.softmax(best, dim=2).nan_to_num_(0.0)
            shares[at, : weight.shape[2]] = plan.without_padding(weight, at).amax(dim=1)

    plan.share(weigh)
    shares = shares.view(*free.shape)
    scores = shares.new_zeros(candidates.shape).scatter_(3, order, shares)
    return best_candidates(candidates, forced, scores, num_selected)


def _free_first(free: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks ahead of the -1 between them, still ascending, and where each stood.

    As many columns as the tile with the most of them needs.
    """
    order = (free < 0).to(torch.int8).sort(dim=3, stable=True).indices
    width = int((free >= 0).sum(dim=3).amax()) if free.numel() else 0
    order = order[..., : max(1, width)]
    return free.gather(3, order), order
