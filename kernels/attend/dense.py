"""Exact dense attention with the site's mask, at the cost of scaled_dot_product_attention.

Up to ``dense_len`` keys the operator calls what SDPA itself would dispatch to, keeps (out, lse) and
hands both to the matching backward, so nothing is computed twice. A mask tensor is built only when
the mask is not plain "causal" or "everything". Queries that see nothing get out 0 and lse -inf.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_compile.kernels.attend import backends
from nsa_compile.kernels.geometry import Tiling
from nsa_compile.kernels.precision import accumulator
from nsa_compile.kernels.visibility import sees

# Queries of one CPU call when a mask must be built: the mask stays small, and keys that none of
# them sees are left out.
_MASK_ROWS = 1024
# Stands for lse where a query sees nothing: the backward's exp(logit - lse) must come out as 0.
_DEAD_LSE = 1e30


def forward(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, scale: float, causal: bool, offset: int,
    window: int | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out [B, Hq, Tq, Dv] in q.dtype, lse [B, Hq, Tq]), any strides."""
    out = lse = None
    q, k, v = (backends.with_unit_stride(x) for x in (q, k, v))
    for part in _parts(q, k, valid, causal, offset, window):
        rows, keys = part.rows, part.keys
        inputs = (q[:, :, rows], k[:, :, keys], v[:, :, keys], part.bias, part.causal)
        backend = backends.choose(*inputs, training=False)
        part_out, part_lse = backend.forward(*inputs, scale)
        if part.dead is not None:
            part_out = part_out.masked_fill(part.dead[..., None], 0.0)
            part_lse = part_lse.masked_fill(part.dead, -torch.inf)
        if part.only:
            return part_out, part_lse
        if out is None:
            out = q.new_empty(*q.shape[:3], v.shape[3])
            lse = q.new_empty(q.shape[:3], dtype=accumulator(q.dtype))
        out[:, :, rows], lse[:, :, rows] = part_out, part_lse
    return out, lse


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
    lse: Tensor, valid: Tensor | None, scale: float, causal: bool, offset: int, window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv) from the forward's out and lse, any strides."""
    wide = accumulator(q.dtype)
    dq = dk = dv = None
    grad_out, q, k, v = (backends.with_unit_stride(x) for x in (grad_out, q, k, v))
    for part in _parts(q, k, valid, causal, offset, window):
        rows, keys = part.rows, part.keys
        inputs = (q[:, :, rows], k[:, :, keys], v[:, :, keys])
        if grad_lse is None:
            backend = backends.choose(*inputs, part.bias, part.causal, training=True)
        else:
            backend = backends.MATH  # The fused kernels have no gradient of lse.
        part_lse = lse[:, :, rows]
        part_grad_lse = None if grad_lse is None else grad_lse[:, :, rows]
        if part.dead is not None:
            part_lse = part_lse.masked_fill(part.dead, _DEAD_LSE)
            if part_grad_lse is not None:
                part_grad_lse = part_grad_lse.masked_fill(part.dead, 0.0)
        grads = backend.backward(
            grad_out[:, :, rows], part_grad_lse, *inputs, out[:, :, rows], part_lse, part.bias,
            part.causal, scale,
        )  # fmt: skip
        if part.only:
            return grads
        if dq is None:
            dq = torch.zeros_like(q)
            dk, dv = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        dq[:, :, rows] = grads[0]
        dk[:, :, keys] += grads[1]
        dv[:, :, keys] += grads[2]
    return dq, dk.to(k.dtype), dv.to(v.dtype)


@dataclass(frozen=True)
class _Part:
    """Queries and keys of one call, and the mask as SDPA's backends take it.

    ``bias`` is added to the logits, [B or 1, 1, rows, keys] in q.dtype; ``dead`` marks the queries
    that see nothing, [B or 1, 1, rows], whose bias is 0 so that no backend divides by zero.
    """

    rows: slice
    keys: slice
    causal: bool
    bias: Tensor | None = None
    dead: Tensor | None = None
    only: bool = True


def _parts(
    q: Tensor, k: Tensor, valid: Tensor | None, causal: bool, offset: int, window: int | None
) -> Iterator[_Part]:
    """One call when the mask is causal, full or on the GPU; else runs of queries (CPU)."""
    q_len, kv_len = q.shape[2], k.shape[2]
    if valid is not None and not valid.is_cuda and bool(valid.all()):
        valid = None
    causal, window = _needed(q_len, kv_len, causal, offset, window)
    everything = slice(0, q_len), slice(0, kv_len)
    if valid is None and window is None and (not causal or offset == 0):
        yield _Part(*everything, causal)
        return
    tiling = Tiling(q_len, kv_len, causal, offset, window, q_len, kv_len)
    step = q_len if q.is_cuda else _MASK_ROWS
    for first in range(0, q_len, step):
        rows = slice(first, min(first + step, q_len))
        keys = everything[1]
        if not q.is_cuda:
            low, high = tiling.visible_keys((rows.start + offset, rows.stop + offset))
            # An empty range would leave the backend nothing to divide by; one hidden key will do.
            keys = slice(low, high) if low < high else slice(0, min(1, kv_len))
        bias, dead = _bias(q, tiling, rows, keys, valid)
        yield _Part(
            rows, keys, False, bias, dead, only=rows == everything[0] and keys == everything[1]
        )


def _needed(
    q_len: int, kv_len: int, causal: bool, offset: int, window: int | None
) -> tuple[bool, int | None]:
    """Drop the terms of the mask that hide no key at these lengths."""
    last = offset + q_len - 1
    if causal and offset >= kv_len - 1:
        causal = False
    if window is not None:
        reach = last if causal else max(abs(last), abs(kv_len - 1 - offset))
        if reach < window:
            window = None
    return causal, window


def _bias(
    q: Tensor, tiling: Tiling, rows: slice, keys: slice, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    positions = torch.arange(rows.start, rows.stop, device=q.device)[:, None] + tiling.offset
    columns = torch.arange(keys.start, keys.stop, device=q.device)
    seen = sees(positions, columns, tiling)[None, None]
    if valid is not None:
        seen = seen & valid[:, None, None, keys]
    dead = ~seen.any(dim=-1)
    bias = torch.zeros_like(seen, dtype=q.dtype)
    return bias.masked_fill_(~(seen | dead[..., None]), -torch.inf), dead
