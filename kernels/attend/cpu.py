"""Attention over selected blocks in plain PyTorch, forward and backward, memory linear in T.

Forward: a run of tiles is a batch for PyTorch's flash attention, or two that meet by their lse: the
blocks next to the queries are read where they lie. The leading tiles that read all they see are
dense attention. Backward, with D = sum(dO * O) - dlse and P' the softcap's slope::

    P = exp(scale * Q K^T - lse),  dV = P^T dO,  dS = P * (dO V^T - D) * P'
    dQ = scale * dS K,  dK = scale * dS^T Q
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_compile.kernels.attend import dense
from nsa_compile.kernels.attend.plan import Plan, Run
from nsa_compile.kernels.attend.site import Site
from nsa_compile.kernels.layout import empty_token_major
from nsa_compile.kernels.precision import accumulator
from nsa_compile.kernels.workers import share_pairs

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def forward(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, site: Site
) -> tuple[Tensor, Tensor]:
    """(out [B, Hq, Tq, Dv] in q.dtype, lse float32 [B, Hq, Tq])."""
    # Flash attention reads rows; with another stride inside them its results are wrong.
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    plan = _plan(q, k, block_indices, site)
    tiling, scale = plan.tiling, site.scale
    # Flash attention wants D = Dv: the narrower side is filled up with zeros.
    width = max(q.shape[3], v.shape[3])
    queries = torch.nn.functional.pad(q, (0, width - q.shape[3])) if q.shape[3] < width else q
    out = empty_token_major(q, *q.shape[:3], v.shape[3])
    lse = q.new_empty(*q.shape[:3], 1, dtype=accumulator(q.dtype))
    first = _dense_tiles(plan)
    head = slice(0, first * tiling.query_tile)
    if first:
        keys = slice(0, tiling.visible_keys(tiling.positions(0, first))[1])
        out[:, :, head], lse[:, :, head, 0] = dense.forward(
            q[:, :, head], k[:, :, keys], v[:, :, keys], None, scale, site.causal, site.offset, None
        )

    attend = _attend_capped if site.softcap else _attend
    # Two results merge without loss in float32 alone; slopes reach all logits of a row.
    plain = q.dtype == lse.dtype and not site.softcap and plan.modifiers.slopes is None

    def work(part: slice) -> None:
        for pair in plan.pairs(part):
            keys = pair.table("keys", k, q.dtype, width)
            values = pair.table("values", v, q.dtype, width)
            near, start = pair.near(first) if plain else 0, first
            if near:
                for runs in pair.split_runs(near, width, first):
                    _attend_split(runs, queries, keys, values, scale, out, lse)
                start = pair.whole_tiles
            for run in pair.runs(width, start):
                here, here_lse = attend(run, run.of(queries), keys, values, scale)
                run.of(out).copy_(here[..., : v.shape[3]])
                run.of(lse).copy_(here_lse)

    share_pairs(plan.count, _logits(q, plan), work)
    return out, lse.squeeze(-1)


def _plan(q: Tensor, k: Tensor, block_indices: Tensor, site: Site) -> Plan:
    group = q.shape[1] // k.shape[1]
    return Plan(block_indices, group, site.tiling(q, k), site.visibility, site.modifiers)


def _logits(q: Tensor, plan: Plan) -> int:
    """How many logits there are to compute."""
    return q.shape[:3].numel() * plan.index.shape[3] * plan.tiling.block


def _dense_tiles(plan: Plan) -> int:
    """Leading tiles that list every block they see, whatever the pair, under a plain mask."""
    tiling, modifiers = plan.tiling, plan.modifiers
    if tiling.window is not None or not plan.visibility.unlimited:
        return 0
    if modifiers.slopes is not None or modifiers.softcap:
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
    # ALiBi's distances need more digits than half precision has.
    dtype = rows.dtype if run.plan.modifiers.slopes is None else accumulator(rows.dtype)
    bias, dead = run.bias(dtype)
    k, v = (run.read(n, x)[:, None] for n, x in (("run keys", keys), ("run values", values)))
    merged = rows.reshape(run.tiles, 1, -1, rows.shape[3])
    out, lse = _flash(merged, k, v, 0.0, False, attn_mask=bias, scale=scale)
    if dead is not None:
        lse = lse.masked_fill(dead, -torch.inf)
    return out.view(rows.shape), lse.view(*rows.shape[:3], 1)


def _attend_split(
    runs: tuple[Run, Run], queries: Tensor, keys: Tensor, values: Tensor, scale: float,
    out: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    """Write out and lse of tiles whose slots are in two runs; of the first each row sees a key."""
    rows, dim = runs[0].of(queries), out.shape[3]
    (far, far_lse), (near, near_lse) = (_attend(run, rows, keys, values, scale) for run in runs)
    share = torch.sub(far_lse, near_lse).sigmoid_()
    torch.lerp(near[..., :dim], far[..., :dim], share, out=runs[0].of(out))
    torch.logaddexp(far_lse, near_lse, out=runs[0].of(lse))


def _attend_capped(
    run: Run, rows: Tensor, keys: Tensor, values: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The same with explicit logits, which flash attention cannot cap."""
    wide = accumulator(rows.dtype)
    k, v = (run.read(n, x).to(wide) for n, x in (("run keys", keys), ("run values", values)))
    merged = rows.to(wide).reshape(run.tiles, -1, rows.shape[3]) * scale
    weights, _ = run.logits("weights", merged, k)
    lse = torch.logsumexp(weights, dim=-1, keepdim=True)
    weights.sub_(_finite(lse)).exp_()
    return torch.bmm(weights, v).view(rows.shape), lse.view(*rows.shape[:3], 1)


def _finite(lse: Tensor) -> Tensor:
    """lse, 0 for queries without keys: their logits are -inf and must give exp(-inf - 0) = 0."""
    return lse.masked_fill(lse == -torch.inf, 0.0)


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
    lse: Tensor, block_indices: Tensor, site: Site,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv) in the dtypes of q, k and v."""
    plan, scale = _plan(q, k, block_indices, site), site.scale
    wide = accumulator(q.dtype)
    delta = (grad_out.to(wide) * out.to(wide)).sum(dim=-1, keepdim=True)
    if grad_lse is not None:
        # What comes from the lse of a query without keys, perhaps inf, goes nowhere.
        delta -= grad_lse.masked_fill(lse == -torch.inf, 0.0)[..., None]
    shift = _finite(lse)[..., None]
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
            dk[pair.batch, pair.head] = dkeys.view(-1, k.shape[3])[: k.shape[2]]
            dv[pair.batch, pair.head] = dvalues.view(-1, v.shape[3])[: k.shape[2]]

    share_pairs(plan.count, _logits(q, plan), differentiate)
    return dq, dk, dv
