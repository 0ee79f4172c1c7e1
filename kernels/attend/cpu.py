"""Attention over selected blocks in plain PyTorch, forward and backward, memory linear in T.

A run of tiles is a few batched matmuls over the blocks its tiles read::

    S = scale * Q K_sel^T,  P = exp(S - max),  lse = max + log(sum P),  O = P V_sel / sum P
    dV_sel = P^T dO,  dS = P * (dO V_sel^T - (sum(dO * O) - dlse)),  dQ = dS K_sel,  dK_sel = dS^T Q
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce

import torch
from torch import Tensor

from nsa_compile.kernels.attend.plan import Part, Plan
from nsa_compile.kernels.geometry import Tiling


def forward(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, valid: Tensor | None, scale: float,
    causal: bool, offset: int, window: int | None, query_tile: int, block: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out [B, Hq, Tq, Dv] in q.dtype, lse float32 [B, Hq, Tq])."""
    tiling = Tiling(q.shape[2], k.shape[2], causal, offset, window, query_tile, block)
    plan = Plan(q, k, block_indices, valid, tiling)
    queries = plan.tiles(q).mul_(scale)
    keys, values = plan.blocks(k), plan.blocks(v)
    out = queries.new_empty(*queries.shape[:2], v.shape[3])
    lse = queries.new_empty(*queries.shape[:2], 1)
    lowest = torch.finfo(plan.dtype).min

    def attend(runs: Iterator[tuple[slice, list[Part]]]) -> None:
        for at, parts in runs:
            scores = [part.scores(queries[at], keys) for part in parts]
            top = reduce(torch.maximum, [s.amax(dim=-1, keepdim=True) for s in scores])
            # Finite also where a query sees nothing: exp(-inf - top) and the total are 0 there.
            top.clamp_(lowest)
            weights = [s.sub_(top).exp_() for s in scores]
            total = reduce(torch.add, [w.sum(dim=-1, keepdim=True) for w in weights])
            here = torch.bmm(weights[0], parts[0].read(values), out=out[at])
            for part, weight in zip(parts[1:], weights[1:], strict=True):
                here.baddbmm_(weight, part.read(values))
            torch.add(top, total.log(), out=lse[at])
            # The largest logit weighs 1, so a total below 1 is one of nothing.
            here.div_(total.clamp_(min=1.0))

    plan.share(attend)
    return plan.untile(out).to(q.dtype), plan.untile(lse).squeeze(-1)


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
    lse: Tensor, block_indices: Tensor, valid: Tensor | None, scale: float, causal: bool,
    offset: int, window: int | None, query_tile: int, block: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv) in the dtypes of q, k and v."""
    tiling = Tiling(q.shape[2], k.shape[2], causal, offset, window, query_tile, block)
    plan = Plan(q, k, block_indices, valid, tiling)
    queries = plan.tiles(q).mul_(scale)
    keys, values = plan.blocks(k), plan.blocks(v)
    grads = plan.tiles(grad_out)
    delta = (grad_out.to(keys.dtype) * out.to(keys.dtype)).sum(dim=-1, keepdim=True)
    if grad_lse is not None:
        delta = delta - grad_lse[..., None]
    delta, shift = plan.tiles(delta), plan.tiles(lse[..., None])
    # A query without keys has lse -inf; its logits are -inf too and must give exp(-inf - 0) = 0.
    shift.masked_fill_(shift == -torch.inf, 0.0)
    dq, dk, dv = torch.zeros_like(queries), torch.zeros_like(keys), torch.zeros_like(values)

    def attend(runs: Iterator[tuple[slice, list[Part]]]) -> None:
        for at, parts in runs:
            for part in parts:
                weights = part.scores(queries[at], keys).sub_(shift[at]).exp_()
                part.scatter_add(dv, weights, grads[at])
                dscores = part.product("dscores", grads[at], values).sub_(delta[at]).mul_(weights)
                dq[at].baddbmm_(dscores, part.read(keys))
                part.scatter_add(dk, dscores, queries[at])

    plan.share(attend)
    return (
        plan.untile(dq.mul_(scale)).to(q.dtype),
        plan.unblock(dk, k.shape).to(k.dtype),
        plan.unblock(dv, v.shape).to(v.dtype),
    )
