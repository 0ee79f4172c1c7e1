"""Which compressed blocks a query sees, for the kernels of both directions."""

from __future__ import annotations

import torch
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
def seen_blocks(
    spans, query, mine, offset, count, CB: tl.constexpr, CD: tl.constexpr, CAUSAL: tl.constexpr,
    RANGED: tl.constexpr,
):  # fmt: skip
    """Compressed blocks [low, bound) that each query sees, but for padding."""
    low = query * 0
    if RANGED:
        place = spans + query.to(tl.int64) * 2
        low = tl.load(place, mask=mine, other=0)
        bound = tl.load(place + 1, mask=mine, other=0)
    else:
        bound = complete_blocks(query + offset, count, CB, CD, CAUSAL)
    return low, bound


@triton.jit
def steps(
    low, bound, first, rows, q_len, count, offset, BN: tl.constexpr, CB: tl.constexpr,
    CD: tl.constexpr, CAUSAL: tl.constexpr, PADDED: tl.constexpr, RANGED: tl.constexpr,
):  # fmt: skip
    """Steps of BN blocks of the queries [first, first + rows).

    [start, full) need no mask, [full, stop) do; no other step is seen.
    """
    if RANGED:
        start = tl.min(tl.where(low < bound, low, count)) // BN
        stop = (tl.max(bound) + BN - 1) // BN
        full = start
    else:
        last = tl.minimum(first + rows, q_len) - 1
        start = first * 0
        full = complete_blocks(first + offset, count, CB, CD, CAUSAL) // BN
        stop = (complete_blocks(last + offset, count, CB, CD, CAUSAL) + BN - 1) // BN
        if PADDED:
            full = full * 0
    return start, full, stop


def spans_argument(
    spans: torch.Tensor | None, placeholder: torch.Tensor
) -> tuple[torch.Tensor, int]:
    """What a kernel is given for ``Site.spans``: a tensor and its batch stride."""
    if spans is None:
        return placeholder, 0
    return spans, spans.stride(0) if len(spans) > 1 else 0
