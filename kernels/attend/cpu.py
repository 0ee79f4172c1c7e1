"""Attention over selected blocks in plain PyTorch, forward and backward, memory linear in T.

Forward: a run of tiles is a batch for PyTorch's flash attention; the leading tiles that read all
they see are dense attention. Backward, with D = sum(dO * O) - dlse and P' the softcap's slope::

    P = exp(scale * Q K^T - lse),  dV = P^T dO,  dS = P * (dO V^T - D) * P'
    dQ = scale * dS K,  dK = scale * dS^T Q
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_compile.kernels.attend import dense
from nsa_compile.kernels.attend.plan import Plan, Run
from nsa_compile.kernels.geometry import Tiling
from nsa_compile.kernels.layout import empty_token_major
from nsa_compile.kernels.modifiers import Modifiers
from nsa_compile.kernels.precision import accumulator
from nsa_compile.kernels.visibility import Visibility
from nsa_compile.kernels.workers import share_pairs

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def forward(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, valid: Tensor | None, scale: float,
    causal: bool, offset: int, window: int | None, query_tile: int, block: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out [B, Hq, Tq, Dv] in q.dtype, lse float32 [B, Hq, Tq])."""
    tiling = Tiling(q.shape[2], k.shape[2], causal, offset, window, query_tile, block)
    group, modifiers = q.shape[1] // k.shape[1], Modifiers()
    plan = Plan(block_indices, group, tiling, Visibility(valid), modifiers)
    # Flash attention wants D = Dv: the narrower side is filled up with zeros.
    width = max(q.shape[3], v.shape[3])
    queries = torch.nn.functional.pad(q, (0, width - q.shape[3])) if q.shape[3] < width else q
    out = empty_token_major(q, *q.shape[:3], v.shape[3])
    lse = q.new_empty(*q.shape[:3], 1, dtype=accumulator(q.dtype))
    first = _dense_tiles(plan)
    head = slice(0, first * query_tile)
    if first:
        keys = slice(0, tiling.visible_keys(tiling.positions(0, first))[1])
        out[:, :, head], lse[:, :, head, 0] = dense.forward(
            q[:, :, head], k[:, :, keys], v[:, :, keys], None, scale, causal, offset, window
        )

    def attend(part: slice) -> None:
        for pair in plan.pairs(part):
            keys = pair.table("keys", k, q.dtype, width)
            values = pair.table("values", v, q.dtype, width)
            for run in pair.runs(width, first):
                here, here_lse = _attend(run, run.of(queries), keys, values, scale)
                run.of(out).copy_(here[..., : v.shape[3]])
                run.of(lse).copy_(here_lse)

    share_pairs(plan.count, q.shape[:3].numel() * plan.index.shape[3] * block, attend)
    return out, lse.squeeze(-1)


def _dense_tiles(plan: Plan) -> int:
    """Leading tiles that list every block they see, whatever the pair, under a plain mask."""
    tiling = plan.tiling
    if tiling.window is not None or not plan.visibility.unlimited:
        return 0
    stops = [tiling.visible_keys(tiling.positions(t, t + 1))[1] for t in range(tiling.tiles)]
    last = (torch.tensor(stops, dtype=torch.int64) - 1).div(tiling.block, rounding_mode="floor")
    # Lists ascend, so block b in slot b means that all blocks before it are there.
    slot = last.clamp(0, plan.index.shape[3] - 1)
    listed = plan.index.gather(3, slot.expand(*plan.index.shape[:2], -1)[..., None])[..., 0]
    missing = ((last != slot) | (listed != last)).flatten(0, 1).any(dim=0).nonzero()
    return int(missing[0]) if len(missing) else tiling.tiles


def _attend(
    run: Run, rows: Tensor, keys: Tensor, values: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """(out [tiles, G, rows, width], lse [tiles, G, rows, 1]) of the run's queries ``rows``."""
    bias, dead = run.bias(rows.dtype)
    k, v = (run.read(n, x)[:, None] for n, x in (("run keys", keys), ("run values", values)))
    merged = rows.reshape(run.tiles, 1, -1, rows.shape[3])
    out, lse = _flash(merged, k, v, 0.0, False, attn_mask=bias, scale=scale)
    if dead is not None:
        lse = lse.masked_fill(dead, -torch.inf)
    return out.view(rows.shape), lse.view(*rows.shape[:3], 1)


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
    lse: Tensor, block_indices: Tensor, valid: Tensor | None, scale: float, causal: bool,
    offset: int, window: int | None, query_tile: int, block: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv) in the dtypes of q, k and v."""
    tiling = Tiling(q.shape[2], k.shape[2], causal, offset, window, query_tile, block)
    group, modifiers = q.shape[1] // k.shape[1], Modifiers()
    plan = Plan(block_indices, group, tiling, Visibility(valid), modifiers)
    wide = accumulator(q.dtype)
    delta = (grad_out.to(wide) * out.to(wide)).sum(dim=-1, keepdim=True)
    if grad_lse is not None:
        delta -= grad_lse[..., None]
    # A query without keys has lse -inf; its logits are -inf too and must give exp(-inf - 0) = 0.
    shift = lse.masked_fill(lse == -torch.inf, 0.0)[..., None]
    dq, dk, dv = (empty_token_major(x, *x.shape) for x in (q, k, v))

    def differentiate(part: slice) -> None:
        for pair in plan.pairs(part):
            keys, values = pair.table("keys", k, wide), pair.table("values", v, wide)
            dkeys = pair.workspace.take("dkeys", wide, *keys.shape).zero_()
            dvalues = pair.workspace.take("dvalues", wide, *values.shape).zero_()
            for run in pair.runs(max(k.shape[3], v.shape[3])):
                rows, grads, deltas, shifts = (
                    run.of(x).to(wide).reshape(run.tiles, -1, x.shape[3])
                    for x in (q, grad_out, delta, shift)
                )
                rows = rows * scale
                run_keys = run.read("run keys", keys)
                weights, slope = run.logits("weights", rows, run_keys)
                weights.sub_(shifts).exp_()
                run.scatter_add(dvalues, weights, grads)
                dscores = run.product("dscores", grads, run.read("run values", values))
                dscores.sub_(deltas).mul_(weights)
                if slope is not None:
                    dscores.mul_(slope)
                mine = run.of(dq)
                mine.copy_(torch.bmm(dscores, run_keys).mul_(scale).view(mine.shape))
                run.scatter_add(dkeys, dscores, rows)
            dk[pair.batch, pair.head] = dkeys.view(-1, k.shape[3])[: tiling.kv_len]
            dv[pair.batch, pair.head] = dvalues.view(-1, v.shape[3])[: tiling.kv_len]

    share_pairs(plan.count, q.shape[:3].numel() * plan.index.shape[3] * block, differentiate)
    return dq, dk, dv
