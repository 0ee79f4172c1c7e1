"""The attention kernels that scaled_dot_product_attention dispatches to, behind one interface."""

from __future__ import annotations

from typing import Protocol

import torch
from nsa_compile.kernels.precision import accumulator
from torch import Tensor

aten = torch.ops.aten


class Backend(Protocol):
    """Attention with an additive ``bias`` [B or 1, 1, Tq, Tk] or top-left causality.

    Shapes are the operator's, Hkv dividing Hq. The backward takes the forward's out and lse.
    """

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]: ...

    def backward(
        self, grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
        out: Tensor, lse: Tensor, bias: Tensor | None, causal: bool, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip


class FlashCPU:
    """PyTorch's flash attention for CPUs; D != Dv is padded with zeros to the wider one."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        width = max(q.shape[3], v.shape[3])
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            _widen(q, width), _widen(k, width), _widen(v, width), 0.0, causal,
            attn_mask=bias, scale=scale,
        )  # fmt: skip
        return out[..., : v.shape[3]], lse

    def backward(
        self, grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
        out: Tensor, lse: Tensor, bias: Tensor | None, causal: bool, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        width = max(q.shape[3], v.shape[3])
        wide = (_widen(x, width) for x in (grad_out, q, k, v, out))
        dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *wide, lse, 0.0, causal, attn_mask=bias, scale=scale
        )
        return dq[..., : q.shape[3]], dk[..., : k.shape[3]], dv[..., : v.shape[3]]


class Math:
    """Plain matmuls over runs of queries: every shape, device and dtype, and gradients of lse."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        wide = accumulator(q.dtype)
        k, v = k.to(wide), v.to(wide)
        outs, lses = [], []
        for rows in _runs(q, k):
            scores = _scores(_grouped(q[:, :, rows].to(wide), k), k, bias, causal, scale, rows)
            lse = torch.logsumexp(scores, dim=-1)
            out = torch.softmax(scores, dim=-1).flatten(2, 3) @ v
            outs.append(out.unflatten(2, scores.shape[2:4]).flatten(1, 2).to(q.dtype))
            lses.append(lse.flatten(1, 2))
        return torch.cat(outs, dim=2), torch.cat(lses, dim=2)

    def backward(
        self, grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
        out: Tensor, lse: Tensor, bias: Tensor | None, causal: bool, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        wide = accumulator(q.dtype)
        dq, dk, dv = [], torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        wide_k, wide_v = k.to(wide), v.to(wide)
        for rows in _runs(q, k):
            queries, grads, outs = (_grouped(x[:, :, rows].to(wide), k) for x in (q, grad_out, out))
            delta = (grads * outs).sum(dim=-1, keepdim=True)
            if grad_lse is not None:
                delta = delta - _grouped(grad_lse[:, :, rows, None], k)
            p = _scores(queries, wide_k, bias, causal, scale, rows)
            p = p.sub_(_grouped(lse[:, :, rows, None], k)).exp_()
            ds = (grads.flatten(2, 3) @ wide_v.transpose(-1, -2)).view_as(p)
            ds = ds.sub_(delta).mul_(p).mul_(scale).flatten(2, 3)
            dv += p.flatten(2, 3).transpose(-1, -2) @ grads.flatten(2, 3)
            dk += ds.transpose(-1, -2) @ queries.flatten(2, 3)
            dq.append((ds @ wide_k).view_as(queries).flatten(1, 2).to(q.dtype))
        return torch.cat(dq, dim=2), dk.to(k.dtype), dv.to(v.dtype)


FLASH_CPU, MATH = FlashCPU(), Math()
# Logits that Math holds at once, in elements.
_LOGITS = 1 << 24


def choose(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool) -> Backend:
    """The fastest backend that takes these inputs."""
    if q.numel() == 0 or k.numel() == 0:
        return MATH
    return FLASH_CPU


def _widen(x: Tensor, width: int) -> Tensor:
    return x if x.shape[3] == width else torch.nn.functional.pad(x, (0, width - x.shape[3]))


def _runs(q: Tensor, k: Tensor) -> list[slice]:
    step = max(1, _LOGITS // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    return [slice(at, min(at + step, q.shape[2])) for at in range(0, max(1, q.shape[2]), step)]


def _grouped(x: Tensor, k: Tensor) -> Tensor:
    """[B, Hq, rows, X] -> [B, Hkv, G, rows, X]."""
    return x.unflatten(1, (k.shape[1], -1))


def _scores(
    queries: Tensor, k: Tensor, bias: Tensor | None, causal: bool, scale: float, rows: slice
) -> Tensor:
    """Masked logits [B, Hkv, G, rows, Tk]."""
    scores = (queries.flatten(2, 3) @ k.transpose(-1, -2)).mul_(scale)
    scores = scores.unflatten(2, queries.shape[2:4])
    if bias is not None:
        scores += bias[:, :, None, rows].to(scores.dtype)
    if causal:
        positions = torch.arange(rows.start, rows.stop, device=k.device)[:, None]
        keys = torch.arange(k.shape[2], device=k.device)
        scores.masked_fill_(keys > positions, -torch.inf)
    return scores
