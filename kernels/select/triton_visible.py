"""Which blocks the tiles of a selection kernel see, and which they must read."""

from __future__ import annotations

import triton
import triton.language as tl

from nsa_compile.kernels.triton_site import key_ranges


@triton.jit
def seen_and_forced(
    before, spans, batch, block, first, last, kv_len, window, init_blocks, local_window, rows,
    L: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PADDED: tl.constexpr,
    RANGED: tl.constexpr,
):  # fmt: skip
    """Whether some row of the tile at positions [first, last] sees a valid key, and must-reads.

    ``block``, ``first`` and ``last`` broadcast against each other.
    """
    low, high, _, _ = key_ranges(first, last, kv_len, window, CAUSAL, WINDOWED)
    high = tl.where(low < high, high, 0)
    # Of scalars where it can be: there are many blocks and few bounds.
    seen = (block >= low // L) & (block < (high + L - 1) // L)
    start = block * L
    stop = tl.minimum(start + L, kv_len)
    seen_from = tl.maximum(start, low)
    seen_to = tl.minimum(stop, high)
    if RANGED:
        # A query sees every valid key of the blocks between its first and its last.
        among = block < 0
        for row in range(0, rows):
            span = spans + row * 2
            among = among | ((block >= tl.load(span)) & (block < tl.load(span + 1)))
        seen = among & (start < stop)
        seen_from = start
        seen_to = stop
    if PADDED:
        tally = before + batch * (kv_len + 1)
        valid = tl.load(tally + seen_to, mask=seen, other=0)
        valid -= tl.load(tally + seen_from, mask=seen, other=0)
        seen = seen & (valid > 0)
    if CAUSAL:
        near = first - local_window + 1
        far = last
    else:
        near = first - (local_window - 1) // 2
        far = last + local_window // 2
    nearest = tl.where((far >= 0) & (near < kv_len), tl.maximum(near, 0) // L, 2147483647)
    local = (block >= nearest) & (block <= tl.maximum(far, 0) // L)
    forced = seen & ((block < init_blocks) | local)
    return seen, forced
