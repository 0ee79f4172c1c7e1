"""What all Triton kernels share: the site's mask on the device, and how tensors reach a kernel."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from nsa_compile.kernels.modifiers import Modifiers
from nsa_compile.kernels.visibility import Visibility

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


class Terms(NamedTuple):
    """The optional terms of mask and logits: a kernel's arguments, and which of them are there.

    The arguments: ranges, query segments, key segments, each with its batch stride; slopes;
    positions with their batch stride; the soft cap in base 2.
    """

    arguments: tuple[Any, ...]
    flags: dict[str, bool]


def terms(visibility: Visibility, modifiers: Modifiers, placeholder: torch.Tensor) -> Terms:
    """``placeholder`` is some tensor that no kernel reads in place of one that is absent."""

    def batched(x: torch.Tensor | None) -> tuple[torch.Tensor, int]:
        if x is None:
            return placeholder, 0
        x = x.contiguous()
        return x, x.stride(0) if x.shape[0] > 1 else 0

    slopes = placeholder if modifiers.slopes is None else modifiers.slopes.contiguous()
    return Terms(
        (
            *batched(visibility.ranges),
            *batched(visibility.query_segments),
            *batched(visibility.key_segments),
            slopes,
            *batched(modifiers.positions),
            modifiers.softcap * LOG2_E,
        ),
        {
            "RANGED": visibility.ranges is not None,
            "SEGMENTED": visibility.query_segments is not None,
            "SLOPED": modifiers.slopes is not None,
            "PLACED": modifiers.positions is not None,
            "CAPPED": modifiers.softcap != 0.0,
        },
    )


@triton.jit
def capped(x, cap):
    """cap tanh(x / cap) for logits and cap in base 2; -inf stays."""
    # tanh z = 1 - 2 / (e^2z + 1), and e^2z = 2^(2 z log2 e)
    bent = cap - 2.0 * cap / (tl.exp2(x * (2.8853900817779268 / cap)) + 1.0)
    return tl.where(x == float("-inf"), x, bent)


@triton.jit
def row_range(ranges, query, mine, RANGED: tl.constexpr):
    """First key of each query and the first past its last; (0, 0) for rows not in use."""
    low = query
    high = query
    if RANGED:
        low = tl.load(ranges + query.to(tl.int64) * 2, mask=mine, other=0)
        high = tl.load(ranges + query.to(tl.int64) * 2 + 1, mask=mine, other=0)
    return low, high


@triton.jit
def row_segment(segments, query, mine, SEGMENTED: tl.constexpr):
    """The segment of each query."""
    if SEGMENTED:
        return tl.load(segments + query, mask=mine, other=0)
    else:
        return query


@triton.jit
def row_slope(slopes, head, mine, SLOPED: tl.constexpr):
    """ALiBi's slope of each row, in base 2."""
    if SLOPED:
        return tl.load(slopes + head, mask=mine, other=0.0) * 1.4426950408889634
    else:
        return head


@triton.jit
def place_of(position, positions, kv_len, SLOPED: tl.constexpr, PLACED: tl.constexpr):
    """Where ALiBi sees keys, or queries by their position."""
    key = tl.minimum(tl.maximum(position, 0), kv_len - 1)
    if PLACED:
        return tl.load(positions + key)
    elif SLOPED:
        return key.to(tl.float32)
    else:
        return position


@triton.jit
def common_keys(
    low, high, low_all, high_all, row_low, row_high, mine, RANGED: tl.constexpr,
):  # fmt: skip
    """``key_ranges`` narrowed to the ranges of the rows in use."""
    if RANGED:
        low = tl.maximum(low, tl.min(tl.where(mine, row_low, 2147483647)))
        high = tl.maximum(tl.minimum(high, tl.max(tl.where(mine, row_high, 0))), 0)
        low_all = tl.maximum(low_all, tl.max(tl.where(mine, row_low, 0)))
        high_all = tl.minimum(high_all, tl.min(tl.where(mine, row_high, 2147483647)))
        low = tl.minimum(low, high)
        high_all = tl.maximum(high_all, 0)
    return low, high, low_all, high_all


@triton.jit
def seen_in_terms(
    seen, key, inside, row_low, row_high, segment, key_segments, RANGED: tl.constexpr,
    SEGMENTED: tl.constexpr,
):  # fmt: skip
    """``seen`` [rows, keys] of which ranges and segments let through."""
    if RANGED:
        seen = seen & (key[None, :] >= row_low[:, None]) & (key[None, :] < row_high[:, None])
    if SEGMENTED:
        theirs = tl.load(key_segments + key, mask=inside, other=0)
        seen = seen & (theirs[None, :] == segment[:, None])
    return seen
