"""Mean pooling of keys in plain PyTorch, forward and backward, memory linear in T."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_compile.kernels import geometry
from nsa_compile.kernels.precision import accumulator


def compress(x: Tensor, valid: Tensor | None, block: int, stride: int) -> Tensor:
    """[B, H, T, D] -> [B, H, Nc, D] in x.dtype, summed in float32 (float64 for float64)."""
    batch, heads, length, dim = x.shape
    count = geometry.num_compressed(length, block, stride)
    wide = x.to(accumulator(x.dtype))
    if valid is not None:
        # where, not a product: padding may hold anything, inf and NaN included.
        wide = wide.where(valid[:, None, :, None], 0.0)
    total = wide.new_zeros(batch, heads, count, dim)
    if count:
        for step in range(block):
            total += wide[:, :, _members(step, count, stride)]
        total /= _divisor(valid, wide.dtype, count, block, stride)
    return total.to(x.dtype)


def compress_backward(
    grad: Tensor, valid: Tensor | None, block: int, stride: int, length: int
) -> Tensor:
    """[B, H, Nc, D] -> [B, H, T, D]: each key takes its share of every block it is in."""
    batch, heads, count, dim = grad.shape
    wide = grad.to(accumulator(grad.dtype))
    dx = wide.new_zeros(batch, heads, length, dim)
    if count:
        share = wide / _divisor(valid, wide.dtype, count, block, stride)
        for step in range(block):
            dx[:, :, _members(step, count, stride)] += share
    if valid is not None:
        dx.masked_fill_(~valid[:, None, :, None], 0.0)
    return dx.to(grad.dtype)


def _members(step: int, count: int, stride: int) -> slice:
    """Token number ``step`` of every compressed block."""
    return slice(step, step + (count - 1) * stride + 1, stride)


def _divisor(
    valid: Tensor | None, dtype: torch.dtype, count: int, block: int, stride: int
) -> Tensor | int:
    """Valid keys of each compressed block, at least 1: [B, 1, Nc, 1], or ``block``."""
    if valid is None:
        return block
    total = sum(valid[:, _members(step, count, stride)].to(dtype) for step in range(block))
    return total.clamp(min=1)[:, None, :, None]
