"""Attention over selected blocks in plain PyTorch, forward and backward, memory linear in T.

Forward: a run of tiles is a batch for PyTorch's flash attention, one call for each part of what the
tiles read; two parts meet by their log-sum-exp. Backward, with D = sum(dO * O) - dlse::

    P = exp(scale * Q K^T - lse),  dV = P^T dO,  dS = P * (dO V^T - D)
    dQ = scale * dS K,  dK = scale * dS^T Q
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_compile.kernels.attend.plan import Part, Plan, Run
from nsa_compile.kernels.geometry import Tiling
from nsa_compile.kernels.layout import empty_token_major
from nsa_compile.kernels.precision import accumulator

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def forward(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, valid: Tensor | None, scale: float,
    causal: bool, offset: int, window: int | None, query_tile: int, block: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out [B, Hq, Tq, Dv] in q.dtype, lse float32 [B, Hq, Tq])."""
    tiling = Tiling(q.shape[2], k.shape[2], causal, offset, window, query_tile, block)
    plan = Plan(block_indices, valid, tiling)
    group = q.shape[1] // k.shape[1]
    # Flash attention wants D = Dv: the narrower side is filled up with zeros.
    width = max(q.shape[3], v.shape[3])
    queries = torch.nn.functional.pad(q, (0, width - q.shape[3])) if q.shape[3] < width else q
    out = empty_token_major(q, *q.shape[:3], v.shape[3])
    lse = q.new_empty(*q.shape[:3], 1, dtype=accumulator(q.dtype))
    for batch, head, pair in plan.pairs():
        keys = pair.table("keys", k[batch, head], q.dtype, width)
        values = pair.table("values", v[batch, head], q.dtype, width)
        mine = (x[batch, head * group : (head + 1) * group] for x in (queries, out, lse))
        my_queries, my_out, my_lse = mine
        for run in pair.runs(width):
            rows = run.of(my_queries).reshape(run.tiles, 1, -1, width)
            here, here_lse = _attend(run, rows, keys, values, scale, group)
            shape = (run.tiles, group, run.rows, -1)
            run.of(my_out).copy_(here.view(shape)[..., : v.shape[3]])
            run.of(my_lse).copy_(here_lse.view(shape))
    return out, lse.squeeze(-1)


def _attend(
    run: Run, rows: Tensor, keys: Tensor, values: Tensor, scale: float, group: int
) -> tuple[Tensor, Tensor]:
    """(out [tiles, 1, G * rows, D], lse [tiles, 1, G * rows]) of a run, its parts merged."""
    results = [_attend_part(part, rows, keys, values, scale, group) for part in run.parts]
    if len(results) == 1:
        return results[0]
    (out, lse), (other, other_lse) = results
    total = torch.logaddexp(lse, other_lse)
    # A query that sees nothing at all has lse -inf, and out 0 in both parts.
    finite = total.clamp(min=torch.finfo(total.dtype).min)
    weights = ((x - finite).exp_()[..., None] for x in (lse, other_lse))
    return out * next(weights) + other * next(weights), total


def _attend_part(
    part: Part, rows: Tensor, keys: Tensor, values: Tensor, scale: float, group: int
) -> tuple[Tensor, Tensor]:
    bias, dead = part.bias(group, rows.dtype)
    k, v = (part.read(n, x)[:, None] for n, x in (("part keys", keys), ("part values", values)))
    out, lse = _flash(rows, k, v, 0.0, False, attn_mask=bias, scale=scale)
    return out, lse if dead is None else lse.masked_fill(dead, -torch.inf)


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
    lse: Tensor, block_indices: Tensor, valid: Tensor | None, scale: float, causal: bool,
    offset: int, window: int | None, query_tile: int, block: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv) in the dtypes of q, k and v."""
    tiling = Tiling(q.shape[2], k.shape[2], causal, offset, window, query_tile, block)
    plan = Plan(block_indices, valid, tiling)
    wide, group = accumulator(q.dtype), q.shape[1] // k.shape[1]
    delta = (grad_out.to(wide) * out.to(wide)).sum(dim=-1, keepdim=True)
    if grad_lse is not None:
        delta -= grad_lse[..., None]
    # A query without keys has lse -inf; its logits are -inf too and must give exp(-inf - 0) = 0.
    shift = lse.masked_fill(lse == -torch.inf, 0.0)[..., None]
    dq, dk, dv = (empty_token_major(x, *x.shape) for x in (q, k, v))
    for batch, head, pair in plan.pairs():
        heads = slice(head * group, (head + 1) * group)
        keys = pair.table("keys", k[batch, head], wide)
        values = pair.table("values", v[batch, head], wide)
        dkeys = plan.workspace.take("dkeys", wide, *keys.shape).zero_()
        dvalues = plan.workspace.take("dvalues", wide, *values.shape).zero_()
        for run in pair.runs(max(k.shape[3], v.shape[3])):
            rows, grads, deltas, shifts = (
                run.of(x[batch, heads]).to(wide).reshape(run.tiles, -1, x.shape[3])
                for x in (q, grad_out, delta, shift)
            )
            rows = rows * scale
            drows = torch.zeros_like(rows)
            for part in run.parts:
                part_keys = part.read("part keys", keys)
                weights = part.hide(part.product("weights", rows, part_keys)).sub_(shifts).exp_()
                part.scatter_add(dvalues, weights, grads)
                dscores = part.product("dscores", grads, part.read("part values", values))
                dscores.sub_(deltas).mul_(weights)
                drows.baddbmm_(dscores, part_keys)
                part.scatter_add(dkeys, dscores, rows)
            mine = run.of(dq[batch, heads])
            mine.copy_(drows.mul_(scale).view(mine.shape))
        dk[batch, head] = dkeys.view(-1, k.shape[3])[: tiling.kv_len]
        dv[batch, head] = dvalues.view(-1, v.shape[3])[: tiling.kv_len]
    return dq, dk, dv
