"""The attention kernels that scaled_dot_product_attention dispatches to, behind one interface."""

from __future__ import annotations

import functools
from typing import Protocol

import torch
from torch import Tensor

from nsa_compile.kernels.precision import accumulator

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


class FlashCUDA:
    """PyTorch's FlashAttention-2; the head dimension is padded to a multiple of 8 as SDPA does."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        width = _multiple(q.shape[3], 8)
        out, lse, *_ = aten._scaled_dot_product_flash_attention(
            _widen(q, width), _widen(k, width), _widen(v, width), 0.0, causal, False, scale=scale
        )
        return out[..., : v.shape[3]], lse

    def backward(
        self, grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
        out: Tensor, lse: Tensor, bias: Tensor | None, causal: bool, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        width = _multiple(q.shape[3], 8)
        wide = (_widen(x, width) for x in (grad_out, q, k, v, out))
        seed, offset = _unused_random_state(q, torch.uint64)
        dq, dk, dv = aten._scaled_dot_product_flash_attention_backward(
            *wide, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, seed, offset, scale=scale
        )
        return dq[..., : q.shape[3]], dk[..., : k.shape[3]], dv[..., : v.shape[3]]


class CuDNN:
    """cuDNN's fused attention; takes a bias and Dv != D."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
            q, k, v, bias, True, 0.0, causal, False, scale=scale
        )
        return out, lse.view(q.shape[:3])

    def backward(
        self, grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
        out: Tensor, lse: Tensor, bias: Tensor | None, causal: bool, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        seed, offset = _unused_random_state(q, torch.int64)
        lse = lse.view(*q.shape[:3], *(1,) * (_cudnn_lse_dims() - 3))
        return aten._scaled_dot_product_cudnn_attention_backward(
            grad_out, q, k, v, out, lse, seed, offset, bias, None, None, q.shape[2], k.shape[2],
            0.0, causal, scale=scale,
        )  # fmt: skip


class Efficient:
    """PyTorch's memory-efficient attention; repeats shared heads, keeps lse in rows of 32."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        group = q.shape[1] // k.shape[1]
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(
            q, _repeated(k, group), _repeated(v, group), _aligned(bias, q, k), True, 0.0, causal,
            scale=scale,
        )  # fmt: skip
        return out, lse[..., : q.shape[2]]

    def backward(
        self, grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
        out: Tensor, lse: Tensor, bias: Tensor | None, causal: bool, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        group = q.shape[1] // k.shape[1]
        seed, offset = _unused_random_state(q, torch.int64)
        # The kernel reads whole rows of 32: exp(logit - inf) keeps the missing queries out.
        short = _multiple(lse.shape[2], 32) - lse.shape[2]
        lse = torch.nn.functional.pad(lse, (0, short), value=torch.inf)
        dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
            grad_out, q, _repeated(k, group), _repeated(v, group), _aligned(bias, q, k), out, lse,
            seed, offset, 0.0, [True, True, True, False], causal, scale=scale,
        )  # fmt: skip
        if group > 1:
            dk, dv = (x.unflatten(1, (k.shape[1], group)).sum(dim=2) for x in (dk, dv))
        return dq, dk, dv


MATH: Backend = Math()
_FLASH_CPU: Backend = FlashCPU()
_CUDA: dict[int, Backend] = {
    torch.nn.attention.SDPBackend.FLASH_ATTENTION.value: FlashCUDA(),
    torch.nn.attention.SDPBackend.EFFICIENT_ATTENTION.value: Efficient(),
    torch.nn.attention.SDPBackend.CUDNN_ATTENTION.value: CuDNN(),
}
# Logits that Math holds at once, in elements.
_LOGITS = 1 << 24


def choose(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, training: bool
) -> Backend:
    """The backend that SDPA would use for these inputs, with or without a backward to come.

    Every backend's (out, lse) serves every other's backward, so the two choices may differ.
    """
    if q.numel() == 0 or k.numel() == 0:
        return MATH
    if not q.is_cuda:
        return _FLASH_CPU
    if training:
        q = q.detach().requires_grad_()
    with torch.set_grad_enabled(training):
        choice = torch._fused_sdp_choice(
            q, k, v, attn_mask=bias, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
        )
    return _CUDA.get(choice, MATH)


def with_unit_stride(x: Tensor) -> Tensor:
    """The fused kernels want neighbouring channels next to each other; anything else is copied."""
    return x if x.stride(3) == 1 else x.contiguous()


def _unused_random_state(q: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Seed and offset of dropout, which is 0: backwards take them and read neither."""
    shape = 2 if dtype == torch.uint64 else ()
    return q.new_empty(shape, dtype=dtype), q.new_empty((), dtype=dtype)


@functools.cache
def _cudnn_lse_dims() -> int:
    """3 or 4: cuDNN's lse is [B, H, Tq] or, up to torch 2.13, [B, H, Tq, 1]."""
    q = torch.empty(1, 1, 8, 8, dtype=torch.float16, device="meta")
    return aten._scaled_dot_product_cudnn_attention(q, q, q, None, True)[1].ndim


def _multiple(size: int, of: int) -> int:
    return -(-size // of) * of


def _repeated(x: Tensor, group: int) -> Tensor:
    return x if group == 1 else x.repeat_interleave(group, dim=1)


def _aligned(bias: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """[B, Hq, Tq, Tk] with rows that start at multiples of 16 elements."""
    if bias is None:
        return None
    kv_len = k.shape[2]
    if kv_len % 16:
        bias = torch.nn.functional.pad(bias, (0, -kv_len % 16))[..., :kv_len]
    return bias.expand(q.shape[0], q.shape[1], -1, -1)


def _widen(x: Tensor, width: int) -> Tensor:
    """``x`` with ``width`` channels and each row in one piece, as flash attention reads it."""
    if x.shape[3] < width:
        return torch.nn.functional.pad(x, (0, width - x.shape[3]))
    return x if x.stride(3) == 1 else x.contiguous()


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
