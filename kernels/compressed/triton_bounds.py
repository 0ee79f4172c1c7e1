"""How many compressed blocks a query sees, for the kernels of both directions."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def complete_blocks(position, count, CB: tl.constexpr, CD: tl.constexpr, CAUSAL: tl.constexpr):
    """Compressed blocks [0, result) of ``count`` that are complete at ``position``."""
    bound = position * 0 + count
    if CAUSAL:
        bound = tl.minimum(bound, tl.maximum(position + 1 - CB + CD, 0) // CD)
    return bound


@triton.jit
def bounds(
    first, rows, q_len, count, offset, BN: tl.constexpr, CB: tl.constexpr, CD: tl.constexpr,
    CAUSAL: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Steps of BN blocks that need no mask, and all steps, of the queries [first, first + rows)."""
    last = tl.minimum(first + rows, q_len) - 1
    full = complete_blocks(first + offset, count, CB, CD, CAUSAL) // BN
    stop = (complete_blocks(last + offset, count, CB, CD, CAUSAL) + BN - 1) // BN
    if PADDED:
        full = full * 0
    return full, stop
