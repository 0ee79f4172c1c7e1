"""Attention over compressed keys in plain PyTorch, forward and backward, memory linear in T.

Runs of queries go through PyTorch's flash attention with a mask of their own; (out, lse) of the
forward serve the backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from nsa_compile.kernels.attend import backends
from nsa_compile.kernels.compressed.site import Site
from nsa_compile.kernels.layout import empty_token_major
from nsa_compile.kernels.precision import accumulator

# Queries of one call: the mask [rows, Nc] stays small, and blocks that none of them sees are left
# out.
_ROWS = 1024
# Stands for lse where a query sees nothing: the backward's exp(logit - lse) must come out as 0.
_DEAD_LSE = 1e30


class _Run(NamedTuple):
    """Queries, the compressed blocks they see, an additive mask, and queries that see nothing."""

    rows: slice
    blocks: slice
    bias: Tensor
    dead: Tensor


def _runs(q: Tensor, count: int, site: Site) -> Iterator[_Run]:
    """Runs of queries that see something; [B or 1, 1, rows, blocks] and [B or 1, 1, rows]."""
    holds, spans = site.holds(count), site.spans(count)
    for first in range(0, q.shape[2], _ROWS):
        rows = slice(first, min(first + _ROWS, q.shape[2]))
        blocks = slice(0, site.complete(rows.stop - 1 + site.offset, count))
        if not blocks.stop:
            continue
        index = torch.arange(blocks.stop)
        seen = torch.ones(1, 1, rows.stop - rows.start, blocks.stop, dtype=torch.bool)
        if spans is not None:
            low, high = spans[:, None, rows, None].unbind(-1)
            seen = (index >= low) & (index < high)
        elif site.causal:
            position = torch.arange(rows.start, rows.stop)[:, None] + site.offset
            seen = seen & (index * site.stride + site.block - 1 <= position)
        if holds is not None:
            seen = seen & holds[:, None, None, blocks]
        dead = ~seen.any(dim=-1)
        bias = torch.zeros_like(seen, dtype=q.dtype)
        yield _Run(rows, blocks, bias.masked_fill_(~(seen | dead[..., None]), -torch.inf), dead)


def _hidden_zero(x: Tensor, count: int, site: Site) -> Tensor:
    """The first ``count`` rows; what stands in a block without a valid key may be NaN."""
    x, holds = x[:, :, :count], site.holds(count)
    return x if holds is None else x.masked_fill(~holds[:, None, :, None], 0.0)


def forward(q: Tensor, k: Tensor, v: Tensor, count: int, site: Site) -> tuple[Tensor, Tensor]:
    """(out [B, Hq, Tq, Dv] in q.dtype, lse [B, Hq, Tq]) over the first ``count`` rows of k, v."""
    out = empty_token_major(q, *q.shape[:3], v.shape[3]).zero_()
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=accumulator(q.dtype))
    k, v = (_hidden_zero(x, count, site) for x in (k, v))
    for run in _runs(q, count, site):
        inputs = q[:, :, run.rows], k[:, :, run.blocks], v[:, :, run.blocks]
        inputs = tuple(backends.with_unit_stride(x) for x in inputs)
        backend = backends.choose(*inputs, run.bias, False, training=False)
        here, here_lse = backend.forward(*inputs, run.bias, False, site.scale)
        out[:, :, run.rows] = here.masked_fill(run.dead[..., None], 0.0)
        lse[:, :, run.rows] = here_lse.masked_fill(run.dead, -torch.inf)
    return out, lse


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
    lse: Tensor, count: int, site: Site,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv) in the dtypes of q, k and v; rows behind ``count`` get none."""
    wide = accumulator(q.dtype)
    dq = empty_token_major(q, *q.shape).zero_()
    dk, dv = (torch.zeros_like(x, dtype=wide) for x in (k, v))
    k, v = (_hidden_zero(x, count, site) for x in (k, v))
    for run in _runs(q, count, site):
        rows, blocks = run.rows, run.blocks
        inputs = (grad_out[:, :, rows], q[:, :, rows], k[:, :, blocks], v[:, :, blocks])
        grads, *qkv = (backends.with_unit_stride(x) for x in inputs)
        here_lse = lse[:, :, rows].masked_fill(run.dead, _DEAD_LSE)
        here_grad_lse = None
        backend = backends.choose(*qkv, run.bias, False, training=True)
        if grad_lse is not None:
            backend = backends.MATH  # The fused kernels have no gradient of lse.
            here_grad_lse = grad_lse[:, :, rows].masked_fill(run.dead, 0.0)
        parts = backend.backward(
            grads, here_grad_lse, *qkv, out[:, :, rows], here_lse, run.bias, False, site.scale
        )
        dq[:, :, rows] = parts[0]
        dk[:, :, blocks] += parts[1]
        dv[:, :, blocks] += parts[2]
    return dq, dk.to(k.dtype), dv.to(v.dtype)
