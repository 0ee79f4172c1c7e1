"""The gradient of the scales of chosen blocks in plain PyTorch, memory linear in T.

With the logits s_ij = g_tb scale q_i.k_j of a block b that tile t lists, and g = 1::

    dg_tb = sum over rows i of t and keys j of b of dS_ij s_ij,  dS = P * (dO V^T - D)
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_compile.kernels.attend.plan import Plan
from nsa_compile.kernels.attend.site import Site
from nsa_compile.kernels.precision import accumulator
from nsa_compile.kernels.scaled.slots import by_slot
from nsa_compile.kernels.workers import share_pairs


def scale_gradient(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
    lse: Tensor, block_indices: Tensor, site: Site,
) -> Tensor:  # fmt: skip
    """[B, Hkv, NT, n] in the accumulator's dtype."""
    if block_indices.numel() == 0 or k.shape[2] == 0:
        return q.new_zeros(block_indices.shape, dtype=accumulator(q.dtype))
    wide, group = accumulator(q.dtype), q.shape[1] // k.shape[1]
    plan = Plan(block_indices, group, site.tiling(q, k), site.visibility, site.modifiers)
    delta = (grad_out.to(wide) * out.to(wide)).sum(dim=-1, keepdim=True)
    if grad_lse is not None:
        delta -= grad_lse.masked_fill(lse == -torch.inf, 0.0)[..., None]
    shift = lse.masked_fill(lse == -torch.inf, 0.0)[..., None]
    sums = torch.zeros(plan.index.shape, dtype=wide)

    def differentiate(part: slice) -> None:
        for pair in plan.pairs(part):
            keys, values = pair.table("keys", k, wide), pair.table("values", v, wide)
            for run in pair.runs(max(k.shape[3], v.shape[3])):
                rows, grads, deltas, shifts = (
                    run.of(x).to(wide).reshape(run.tiles, -1, x.shape[3])
                    for x in (q, grad_out, delta, shift)
                )
                run_keys = run.read("run keys", keys)
                logits, _ = run.logits("logits", rows * site.scale, run_keys)
                hidden = logits == -torch.inf
                dscores = run.product("dscores", grads, run.read("run values", values))
                dscores.sub_(deltas).mul_(torch.exp(logits - shifts))
                dscores.mul_(logits).masked_fill_(hidden, 0.0)
                by_block = dscores.sum(1).unflatten(1, (run.slots, -1)).sum(2)
                sums[pair.batch, pair.head, run.first : run.stop, : run.slots] = by_block

    logits = q.shape[:3].numel() * plan.index.shape[3] * site.block
    share_pairs(plan.count, logits, differentiate)
    return by_slot(sums, plan.index, block_indices)
