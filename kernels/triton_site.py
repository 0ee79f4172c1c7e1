"""What all Triton kernels share: the site's mask on the device, and how tensors reach a kernel."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

LOG2_E = math.log2(math.e)  # logits carry it, so that every exponential is the hardware's exp2


@triton.jit
def visible(position, key, kv_len, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    """The site's own mask; ``position`` and ``key`` broadcast against each other."""
    seen = (key < kv_len) & (position == position)
    if CAUSAL:
        seen = seen & (key <= position)
    elif WINDOWED:
        seen = seen & (key < position + window)
    if WINDOWED:
        seen = seen & (key > position - window)
    return seen


@triton.jit
def key_ranges(first, last, kv_len, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    """Keys that some position of [first, last] sees, and keys that all see; half-open."""
    low = first * 0
    high = low + kv_len
    low_all = low
    high_all = high
    if CAUSAL:
        high = tl.minimum(high, last + 1)
        high_all = tl.minimum(high_all, first + 1)
    elif WINDOWED:
        high = tl.minimum(high, last + window)
        high_all = tl.minimum(high_all, first + window)
    if WINDOWED:
        low = tl.maximum(low, first - window + 1)
        low_all = tl.maximum(low_all, last - window + 1)
    return low, tl.maximum(high, 0), low_all, tl.maximum(high_all, 0)


def dense_rows(x: torch.Tensor) -> torch.Tensor:
    """x itself where its last dimension is dense, as kernels assume; a copy otherwise."""
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def mask_pointer(valid: torch.Tensor | None, placeholder: torch.Tensor) -> torch.Tensor:
    """The padding mask as bytes; some tensor that no kernel reads when there is none."""
    return placeholder if valid is None else valid.view(torch.uint8)


def mask_strides(valid: torch.Tensor | None) -> tuple[int, int]:
    return (0, 0) if valid is None else (valid.stride(0), valid.stride(1))


def valid_before(valid: torch.Tensor) -> torch.Tensor:
    """int32 [B, Tk + 1]: valid keys before each position; two reads count those of any range."""
    return torch.nn.functional.pad(valid.cumsum(1, dtype=torch.int32), (1, 0))
