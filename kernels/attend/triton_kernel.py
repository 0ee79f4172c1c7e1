"""Triton kernels of block-sparse attention: one softmax over the keys of the listed blocks.

    s_ij = scale q_i.k_j,  p_ij = exp(s_ij - lse_i),  o_i = sum_j p_ij v_j,  lse_i = log sum_j exp(s_ij)
    dv_j = sum_i p_ij do_i
    ds_ij = p_ij (do_i.v_j - delta_i),  delta_i = do_i.o_i - dlse_i
    dq_i = scale sum_j ds_ij k_j,  dk_j = scale sum_i ds_ij q_i

A program of the query side owns M rows, the rows of one tile in head-major order (head m // R of the
group, query m % R), so that a short tile still fills the tensor cores with the heads that share its
blocks. A program of the key side owns one block and a bounded piece of the list of tiles that chose
it; pieces of a long list meet in float32 buffers that are added in a fixed order, so nothing here
is atomic and every run gives the same bits. Exponentials are base 2: logits carry scale * log2(e).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Launch(NamedTuple):
    """Rows of queries, keys a step, warps and pipeline stages of one kernel."""

    rows: int
    keys: int
    warps: int
    stages: int


# Most rows a program takes, by (kernel, sixteen-bit inputs, widest head dim padded to a power of two).
LAUNCHES: dict[tuple[str, bool, int], Launch] = {
    ("forward", True, 64): Launch(128, 64, 4, 3),
    ("forward", True, 128): Launch(64, 64, 4, 2),
    ("forward", True, 256): Launch(64, 64, 4, 2),
    ("query", True, 64): Launch(128, 64, 8, 3),
    ("query", True, 128): Launch(64, 64, 4, 2),
    ("query", True, 256): Launch(64, 32, 4, 2),
    ("key", True, 64): Launch(64, 64, 4, 2),
    ("key", True, 128): Launch(64, 64, 4, 2),
    ("key", True, 256): Launch(32, 64, 8, 1),
    ("forward", False, 64): Launch(32, 32, 4, 1),
    ("forward", False, 128): Launch(32, 32, 4, 1),
    ("forward", False, 256): Launch(16, 16, 4, 1),
    ("query", False, 64): Launch(32, 32, 4, 1),
    ("query", False, 128): Launch(32, 32, 4, 1),
    ("query", False, 256): Launch(16, 16, 4, 1),
    ("key", False, 64): Launch(32, 32, 4, 1),
    ("key", False, 128): Launch(32, 32, 4, 1),
    ("key", False, 256): Launch(16, 16, 4, 1),
}

# Rows of queries that one key-side program reads at most: long enough that a block's two products
# amortise its load, short enough that the block everybody chose is not the tail.
PIECE_ROWS = 16384

LOG2_E = math.log2(math.e)


@triton.jit
def _rows(
    base, row, stride, inside, WIDTH: tl.constexpr, PADDED: tl.constexpr, CHECK: tl.constexpr
):
    """Rows of a matrix whose last dimension is dense, zero outside ``inside`` and past ``WIDTH``."""
    column = tl.arange(0, PADDED)
    pointers = base + row.to(tl.int64)[:, None] * stride + column[None, :]
    if CHECK:
        return tl.load(pointers, mask=inside[:, None] & (column < WIDTH)[None, :], other=0.0)
    elif WIDTH != PADDED:
        return tl.load(pointers, mask=(column < WIDTH)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _store_rows(base, row, stride, inside, value, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    column = tl.arange(0, PADDED)
    pointers = base + row.to(tl.int64)[:, None] * stride + column[None, :]
    mask = inside[:, None] & (column < WIDTH)[None, :]
    tl.store(pointers, value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _visible(position, key, kv_len, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
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
def _listed_keys(ids, step, first, stop, L: tl.constexpr, BN: tl.constexpr):
    """Keys of one step through the list ``ids[first:stop]``: a base, each lane's offset, lanes in use.

    A step reads BN // L whole blocks, or BN keys of one block.
    """
    lane = tl.arange(0, BN)
    blocks: tl.constexpr = BN // L
    if blocks > 1:
        # One scalar load a block: a gathered vector of indices would itself be staged in shared
        # memory by the pipeliner, and Triton 3.6 then read the queries' tile wrongly.
        block = tl.full([BN], -1, tl.int32)
        for part in tl.static_range(blocks):
            slot = first + step * blocks + part
            listed = tl.load(ids + slot, mask=slot < stop, other=-1)
            block = tl.where(lane // L == part, listed, block)
        origin = step * 0
        offset = block * L + lane % L
        used = block >= 0
    else:
        pieces: tl.constexpr = (L + BN - 1) // BN
        block = tl.load(ids + first + step // pieces)
        within = (step % pieces) * BN
        origin = block * L + within
        offset = lane
        used = within + lane < L
    return origin, offset, used


@triton.jit
def _steps(count, L: tl.constexpr, BN: tl.constexpr):
    """Whole steps in a list of ``count`` blocks and the blocks those steps read."""
    blocks: tl.constexpr = BN // L
    if blocks > 1:
        steps = count // blocks
        covered = steps * blocks
    else:
        pieces: tl.constexpr = (L + BN - 1) // BN
        steps = count * pieces
        covered = count
    return steps, covered


@triton.jit
def _steps_up(count, L: tl.constexpr, BN: tl.constexpr):
    blocks: tl.constexpr = BN // L
    if blocks > 1:
        steps = (count + blocks - 1) // blocks
    else:
        pieces: tl.constexpr = (L + BN - 1) // BN
        steps = count * pieces
    return steps


@triton.jit
def _order_blocks(
    ids, ordered, counts, valid_before, total, tiles, kv_heads, q_len, kv_len, offset, window, blocks,
    N: tl.constexpr, N_PAD: tl.constexpr, R: tl.constexpr, L: tl.constexpr, TILES: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Each tile's blocks once: those every row sees in full first, then those that need a mask.

    ``counts`` gets the number of the former and of both. Blocks nobody sees, negative and repeated
    indices go.
    """
    row = tl.program_id(0).to(tl.int64) * TILES + tl.arange(0, TILES)
    tile = (row % tiles).to(tl.int32)
    batch = row // tiles // kv_heads
    slot = tl.arange(0, N_PAD)
    own = (row < total)[:, None] & (slot < N)[None, :]
    block = tl.load(ids + row[:, None] * N + slot[None, :], mask=own, other=-1)
    start = block * L
    stop = tl.minimum(start + L, kv_len)
    first = (tile * R + offset)[:, None]
    last = (tl.minimum(tile * R + R, q_len) - 1 + offset)[:, None]
    # Keys that some row sees, and keys that every row sees.
    low = tl.zeros_like(first)
    high = tl.zeros_like(first) + kv_len - 1
    low_all = low
    high_all = high
    if CAUSAL:
        high = tl.minimum(last, high)
        high_all = tl.minimum(first, high_all)
    elif WINDOWED:
        high = tl.minimum(last + window - 1, high)
        high_all = tl.minimum(first + window - 1, high_all)
    if WINDOWED:
        low = tl.maximum(first - window + 1, low)
        low_all = tl.maximum(last - window + 1, low_all)
    seen_from = tl.maximum(start, low)
    seen_to = tl.minimum(stop - 1, high)
    seen = (block >= 0) & (block < blocks) & (seen_from <= seen_to)
    full = (start >= low_all) & (start + L - 1 <= high_all)
    if PADDED:
        before = valid_before + batch[:, None] * (kv_len + 1)
        some = tl.load(before + seen_to + 1, mask=seen, other=0)
        some -= tl.load(before + seen_from, mask=seen, other=0)
        every = tl.load(before + stop, mask=seen, other=0)
        every -= tl.load(before + start, mask=seen, other=0)
        seen = seen & (some > 0)
        full = full & (every == L)
    repeated = tl.zeros([TILES, N_PAD], tl.int32)
    for j in range(0, N):
        other = tl.load(ids + row * N + j, mask=row < total, other=-1)[:, None]
        repeated += ((other == block) & (slot > j)[None, :]).to(tl.int32)
    seen = seen & (repeated == 0)
    full = full & seen
    full_count = tl.sum(full.to(tl.int32), 1)
    count = tl.sum(seen.to(tl.int32), 1)
    # Rank by counting smaller indices of the same kind: lists are short and need no sort.
    rank = tl.zeros([TILES, N_PAD], tl.int32)
    for j in range(0, N):
        here = (slot == j)[None, :]
        other = tl.sum(tl.where(here & seen, block, 0), 1)[:, None]
        other_seen = tl.sum((here & seen).to(tl.int32), 1)[:, None]
        other_full = tl.sum((here & full).to(tl.int32), 1)[:, None]
        rank += ((other_seen > 0) & (other < block) & ((other_full > 0) == full)).to(tl.int32)
    rank += tl.where(full, 0, full_count[:, None])
    tl.store(ordered + row[:, None] * N + rank, block, mask=seen)
    tl.store(
        ordered + row[:, None] * N + slot[None, :], -1, mask=own & (slot[None, :] >= count[:, None])
    )
    tl.store(counts + row * 2, full_count, mask=row < total)
    tl.store(counts + row * 2 + 1, count, mask=row < total)


@triton.jit
def _program(tiles, kv_heads, CHUNKS: tl.constexpr):
    """Which (batch, kv head, tile, chunk of rows) this program of the query side owns."""
    pid = tl.program_id(0).to(tl.int64)
    chunk = (pid % CHUNKS).to(tl.int32)
    entry = pid // CHUNKS
    tile = (entry % tiles).to(tl.int32)
    pair = entry // tiles
    return entry, pair // kv_heads, (pair % kv_heads).to(tl.int32), tile, chunk


@triton.jit
def _forward_steps(
    acc, top, total, q, k, v, valid, ids, first, stop, steps, position, scale, kv_len, window,
    k_row, v_row, valid_row, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    L: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
    PADDED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    for step in range(0, steps):
        origin, offset, used = _listed_keys(ids, step, first, stop, L, BN)
        origin = origin.to(tl.int64)
        key = (origin + offset).to(tl.int32)
        inside = used & (key < kv_len)
        if MASKED and PADDED:  # what stands in padding may be NaN: it must not be read at all
            inside = inside & (
                tl.load(valid + key.to(tl.int64) * valid_row, mask=inside, other=0) != 0
            )
        k_tile = _rows(k + origin * k_row, offset, k_row, inside, D, DP, MASKED)
        s = tl.dot(q, tl.trans(k_tile), input_precision="ieee")
        if MASKED:
            seen = _visible(position[:, None], key[None, :], kv_len, window, CAUSAL, WINDOWED)
            seen = seen & inside[None, :]
            s = tl.where(seen, s * scale, float("-inf"))
            new_top = tl.maximum(top, tl.max(s, 1))
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            p = tl.exp2(s - base[:, None])
        else:
            new_top = tl.maximum(top, tl.max(s, 1) * scale)
            base = new_top
            p = tl.exp2(s * scale - base[:, None])
        fade = tl.exp2(top - base)
        total = total * fade + tl.sum(p, 1)
        v_tile = _rows(v + origin * v_row, offset, v_row, inside, DV, DVP, MASKED)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * fade[:, None], input_precision="ieee")
        top = new_top
    return acc, top, total


@triton.jit
def _forward(
    q, k, v, ids, counts, valid, out, lse, scale, tiles, kv_heads, q_len, kv_len, offset, window,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, valid_batch, valid_row,
    G: tl.constexpr, N: tl.constexpr, R: tl.constexpr, L: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, M: tl.constexpr, BN: tl.constexpr,
    CHUNKS: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PADDED: tl.constexpr,
    NEGATIVE: tl.constexpr,
):  # fmt: skip
    entry, batch, kv_head, tile, chunk = _program(tiles, kv_heads, CHUNKS)
    row = chunk * M + tl.arange(0, M)
    head = kv_head * G + row // R
    query = tile * R + row % R
    mine = (row < G * R) & (query < q_len)
    q_rows = head.to(tl.int64) * q_head + query.to(tl.int64) * q_row
    q_tile = _rows(q + batch * q_batch, q_rows, 1, mine, D, DP, True)
    if NEGATIVE:
        q_tile = -q_tile
    position = query + offset
    k_base = k + batch * k_batch + kv_head.to(tl.int64) * k_head
    v_base = v + batch * v_batch + kv_head.to(tl.int64) * v_head
    valid_base = valid + batch * valid_batch
    ids_base = ids + entry * N
    full = tl.load(counts + entry * 2)
    count = tl.load(counts + entry * 2 + 1)
    if BN % L != 0 and L % BN != 0:  # lanes past the block must be masked
        full = full * 0
    acc = tl.zeros([M, DVP], tl.float32)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    steps, covered = _steps(full, L, BN)
    acc, top, total = _forward_steps(
        acc, top, total, q_tile, k_base, v_base, valid_base, ids_base, 0, full, steps, position,
        scale, kv_len, window, k_row, v_row, valid_row, D, DV, DP, DVP, L, BN, CAUSAL, WINDOWED,
        PADDED, False,
    )  # fmt: skip
    steps = _steps_up(count - covered, L, BN)
    acc, top, total = _forward_steps(
        acc, top, total, q_tile, k_base, v_base, valid_base, ids_base, covered, count, steps, position,
        scale, kv_len, window, k_row, v_row, valid_row, D, DV, DP, DVP, L, BN, CAUSAL, WINDOWED,
        PADDED, True,
    )  # fmt: skip
    alive = total > 0
    acc = acc / tl.where(alive, total, 1.0)[:, None]
    log_sum = tl.where(
        alive, (top + tl.log2(tl.where(alive, total, 1.0))) * 0.6931471805599453, float("-inf")
    )
    place = (batch * kv_heads * G + head) * q_len + query
    _store_rows(out, place * DV, 1, mine, acc, DV, DVP)
    tl.store(lse + place, log_sum, mask=mine)


@triton.jit
def _query_steps(
    acc, q, do, lse, delta, k, v, valid, ids, first, stop, steps, position, scale, kv_len, window,
    k_row, v_row, valid_row, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    L: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
    PADDED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    for step in range(0, steps):
        origin, offset, used = _listed_keys(ids, step, first, stop, L, BN)
        origin = origin.to(tl.int64)
        key = (origin + offset).to(tl.int32)
        inside = used & (key < kv_len)
        if MASKED and PADDED:
            inside = inside & (
                tl.load(valid + key.to(tl.int64) * valid_row, mask=inside, other=0) != 0
            )
        k_tile = _rows(k + origin * k_row, offset, k_row, inside, D, DP, MASKED)
        v_tile = _rows(v + origin * v_row, offset, v_row, inside, DV, DVP, MASKED)
        s = tl.dot(q, tl.trans(k_tile), input_precision="ieee")
        dp = tl.dot(do, tl.trans(v_tile), input_precision="ieee")
        p = tl.exp2(s * scale - lse[:, None])
        ds = p * (dp - delta[:, None])
        if MASKED:
            seen = _visible(position[:, None], key[None, :], kv_len, window, CAUSAL, WINDOWED)
            seen = seen & inside[None, :]
            ds = tl.where(seen, ds, 0.0)
        acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision="ieee")
    return acc


@triton.jit
def _query_gradient(
    q, k, v, out, do, lse, dlse, ids, counts, valid, dq, delta, scale, signed_scale, tiles, kv_heads,
    q_len, kv_len, offset, window, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head,
    v_row, o_batch, o_head, o_row, do_batch, do_head, do_row, dlse_batch, dlse_head, dlse_row,
    dq_batch, dq_head, dq_row, valid_batch, valid_row,
    G: tl.constexpr, N: tl.constexpr, R: tl.constexpr, L: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, M: tl.constexpr, BN: tl.constexpr,
    CHUNKS: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PADDED: tl.constexpr,
    NEGATIVE: tl.constexpr, LSE_GRADIENT: tl.constexpr,
):  # fmt: skip
    """dq, and on the way delta for the key side; the rows of a program are those of ``_forward``."""
    entry, batch, kv_head, tile, chunk = _program(tiles, kv_heads, CHUNKS)
    row = chunk * M + tl.arange(0, M)
    head = (kv_head * G + row // R).to(tl.int64)
    query = tile * R + row % R
    mine = (row < G * R) & (query < q_len)
    q_tile = _rows(
        q + batch * q_batch, head * q_head + query.to(tl.int64) * q_row, 1, mine, D, DP, True
    )
    if NEGATIVE:
        q_tile = -q_tile
    do_rows = head * do_head + query.to(tl.int64) * do_row
    do_tile = _rows(do + batch * do_batch, do_rows, 1, mine, DV, DVP, True)
    o_rows = head * o_head + query.to(tl.int64) * o_row
    o_tile = _rows(out + batch * o_batch, o_rows, 1, mine, DV, DVP, True)
    place = (batch * kv_heads * G + head) * q_len + query
    log_sum = tl.load(lse + place, mask=mine, other=float("-inf"))
    difference = tl.sum(do_tile.to(tl.float32) * o_tile.to(tl.float32), 1)
    if LSE_GRADIENT:
        there = dlse + batch * dlse_batch + head * dlse_head + query.to(tl.int64) * dlse_row
        difference -= tl.load(there, mask=mine, other=0.0).to(tl.float32)
    dead = log_sum == float("-inf")
    difference = tl.where(dead, 0.0, difference)
    tl.store(delta + place, difference, mask=mine)
    log_sum = tl.where(dead, float("inf"), log_sum * 1.4426950408889634)
    position = query + offset
    k_base = k + batch * k_batch + kv_head.to(tl.int64) * k_head
    v_base = v + batch * v_batch + kv_head.to(tl.int64) * v_head
    valid_base = valid + batch * valid_batch
    ids_base = ids + entry * N
    full = tl.load(counts + entry * 2)
    count = tl.load(counts + entry * 2 + 1)
    if BN % L != 0 and L % BN != 0:
        full = full * 0
    acc = tl.zeros([M, DP], tl.float32)
    steps, covered = _steps(full, L, BN)
    acc = _query_steps(
        acc, q_tile, do_tile, log_sum, difference, k_base, v_base, valid_base, ids_base, 0, full,
        steps, position, scale, kv_len, window, k_row, v_row, valid_row, D, DV, DP, DVP, L, BN, CAUSAL,
        WINDOWED, PADDED, False,
    )  # fmt: skip
    steps = _steps_up(count - covered, L, BN)
    acc = _query_steps(
        acc, q_tile, do_tile, log_sum, difference, k_base, v_base, valid_base, ids_base, covered, count,
        steps, position, scale, kv_len, window, k_row, v_row, valid_row, D, DV, DP, DVP, L, BN, CAUSAL,
        WINDOWED, PADDED, True,
    )  # fmt: skip
    dq_rows = head * dq_head + query.to(tl.int64) * dq_row
    _store_rows(dq + batch * dq_batch, dq_rows, 1, mine, acc * signed_scale, D, DP)


@triton.jit
def _key_steps(
    dk, dv, k_tile, v_tile, q, do, lse, delta, readers, first_row, rows, steps, key, scale, q_len,
    kv_len, offset, window, q_head, q_row, do_head, do_row, G: tl.constexpr, R: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, BM: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, NEGATIVE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    for step in range(0, steps):
        if R % BM == 0:  # one head of one tile a step: scalar arithmetic
            here = first_row + step * BM
            head = (here // R) % G
            tile = tl.load(readers + here // (R * G))
            start = tile * R + here % R
            query = start + tl.arange(0, BM)
            mine = query < q_len
            q_base = q + head.to(tl.int64) * q_head + start.to(tl.int64) * q_row
            do_base = do + head.to(tl.int64) * do_head + start.to(tl.int64) * do_row
            lane = tl.arange(0, BM)
            q_tile = _rows(q_base, lane, q_row, mine, D, DP, True)
            do_tile = _rows(do_base, lane, do_row, mine, DV, DVP, True)
            place = head.to(tl.int64) * q_len + query
        else:
            here = first_row + step * BM + tl.arange(0, BM)
            head = ((here // R) % G).to(tl.int64)
            tile = tl.load(readers + here // (R * G), mask=here < rows, other=0)
            query = tile * R + here % R
            mine = (here < rows) & (query < q_len)
            q_tile = _rows(q, head * q_head + query.to(tl.int64) * q_row, 1, mine, D, DP, True)
            do_tile = _rows(
                do, head * do_head + query.to(tl.int64) * do_row, 1, mine, DV, DVP, True
            )
            place = head * q_len + query
        if NEGATIVE:
            q_tile = -q_tile
        log_sum = tl.load(lse + place, mask=mine, other=float("-inf"))
        log_sum = tl.where(log_sum == float("-inf"), float("inf"), log_sum * 1.4426950408889634)
        difference = tl.load(delta + place, mask=mine, other=0.0)
        s = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
        p = tl.exp2(s * scale - log_sum[None, :])
        if MASKED:
            seen = _visible(
                (query + offset)[None, :], key[:, None], kv_len, window, CAUSAL, WINDOWED
            )
            p = tl.where(seen, p, 0.0)
        dv = tl.dot(p.to(do_tile.dtype), do_tile, dv, input_precision="ieee")
        dp = tl.dot(v_tile, tl.trans(do_tile), input_precision="ieee")
        ds = p * (dp - difference[None, :])
        dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _key_gradient(
    q, k, v, do, lse, delta, readers, starts, slot_block, slot_end, dk_part, dv_part, valid, dk, dv,
    scale, pairs, kv_heads, q_len, kv_len, offset, window, blocks, slots, entries,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, do_batch, do_head, do_row,
    dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row, valid_batch, valid_row,
    G: tl.constexpr, R: tl.constexpr, L: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    DP: tl.constexpr, DVP: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, PIECE: tl.constexpr,
    PIECE_PAD: tl.constexpr, PIECES: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
    PADDED: tl.constexpr, NEGATIVE: tl.constexpr,
):  # fmt: skip
    """dk and dv of BN keys of one block, summed over one piece of the tiles that read the block.

    Programs come in two kinds: first the slots, pieces of long lists, whose sums go to float32
    buffers; then one program a block, which writes dk and dv unless the list was long.
    """
    pid = tl.program_id(0).to(tl.int64)
    within = (pid % PIECES).to(tl.int32)
    pid = pid // PIECES
    slotted = pid < pairs * slots
    slot = (pid % tl.maximum(slots, 1)).to(tl.int32)
    pair = pid // tl.maximum(slots, 1)
    direct = pid - pairs * slots
    block = (direct % blocks).to(tl.int32)
    if slotted:
        block = tl.load(slot_block + pid).to(tl.int32)
    else:
        pair = direct // blocks
    if block >= blocks:  # an unused slot
        return
    begin = tl.load(starts + pair * (blocks + 1) + block).to(tl.int32)
    end = tl.load(starts + pair * (blocks + 1) + block + 1).to(tl.int32)
    long = end - begin > PIECE
    if long != slotted:
        return
    if slotted:
        piece = slot - tl.load(slot_end + pair * (blocks + 1) + block).to(tl.int32)
        begin = begin + piece * PIECE
        end = tl.minimum(end, begin + PIECE)
    batch = pair // kv_heads
    kv_head = pair % kv_heads
    lane = within * BN + tl.arange(0, BN)
    key = block * L + lane
    inside = (lane < L) & (key < kv_len)
    k_base = k + batch * k_batch + kv_head * k_head
    v_base = v + batch * v_batch + kv_head * v_head
    k_tile = _rows(k_base, key, k_row, inside, D, DP, True)
    v_tile = _rows(v_base, key, v_row, inside, DV, DVP, True)
    q_base = q + batch * q_batch + kv_head * G * q_head
    do_base = do + batch * do_batch + kv_head * G * do_head
    row_base = pair * G * q_len
    list_base = readers + pair * entries + begin
    rows = (end - begin) * G * R
    # Tiles come in ascending order, so those on the diagonal lead the list.
    item = tl.arange(0, PIECE_PAD)
    tile = tl.load(list_base + item, mask=item < end - begin, other=2147483647)
    masked_rows = rows
    if not WINDOWED:
        if CAUSAL:
            diagonal = (item < end - begin) & (tile * R + offset < block * L + L - 1)
            masked_rows = tl.sum(diagonal.to(tl.int32)) * G * R
        else:
            masked_rows = rows * 0
    dk_sum = tl.zeros([BN, DP], tl.float32)
    dv_sum = tl.zeros([BN, DVP], tl.float32)
    masked_steps = (masked_rows + BM - 1) // BM
    dk_sum, dv_sum = _key_steps(
        dk_sum, dv_sum, k_tile, v_tile, q_base, do_base, lse + row_base, delta + row_base, list_base, 0,
        rows, masked_steps, key, scale, q_len, kv_len, offset, window, q_head, q_row, do_head, do_row,
        G, R, D, DV, DP, DVP, BM, CAUSAL, WINDOWED, NEGATIVE, True,
    )  # fmt: skip
    done = masked_steps * BM
    steps = (tl.maximum(rows - done, 0) + BM - 1) // BM
    dk_sum, dv_sum = _key_steps(
        dk_sum, dv_sum, k_tile, v_tile, q_base, do_base, lse + row_base, delta + row_base, list_base,
        done, rows, steps, key, scale, q_len, kv_len, offset, window, q_head, q_row, do_head, do_row,
        G, R, D, DV, DP, DVP, BM, CAUSAL, WINDOWED, NEGATIVE, False,
    )  # fmt: skip
    dk_sum = dk_sum * (scale * 0.6931471805599453)
    if PADDED:
        there = valid + batch * valid_batch + key.to(tl.int64) * valid_row
        real = tl.load(there, mask=inside, other=0) != 0
        dk_sum = tl.where(real[:, None], dk_sum, 0.0)
        dv_sum = tl.where(real[:, None], dv_sum, 0.0)
    if slotted:
        _store_rows(dk_part, pid * L * D + lane * D, 1, lane < L, dk_sum, D, DP)
        _store_rows(dv_part, pid * L * DV + lane * DV, 1, lane < L, dv_sum, DV, DVP)
    else:
        _store_rows(dk + batch * dk_batch + kv_head * dk_head, key, dk_row, inside, dk_sum, D, DP)
        _store_rows(dv + batch * dv_batch + kv_head * dv_head, key, dv_row, inside, dv_sum, DV, DVP)


@triton.jit
def _join_pieces(
    part, starts, slot_end, gradient, kv_heads, kv_len, blocks, slots, g_batch, g_head, g_row,
    L: tl.constexpr, L_PAD: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """The gradient of a block whose readers came in several pieces: their sum, in list order."""
    pid = tl.program_id(0).to(tl.int64)
    pair = pid // blocks
    block = (pid % blocks).to(tl.int32)
    begin = tl.load(starts + pair * (blocks + 1) + block).to(tl.int32)
    count = tl.load(starts + pair * (blocks + 1) + block + 1).to(tl.int32) - begin
    if count <= PIECE:
        return
    slot = pair * slots + tl.load(slot_end + pair * (blocks + 1) + block)
    lane = tl.arange(0, L_PAD)
    total = tl.zeros([L_PAD, DP], tl.float32)
    for piece in range(0, (count + PIECE - 1) // PIECE):
        total += _rows(part + (slot + piece) * L * D, lane, D, lane < L, D, DP, True)
    key = block * L + lane
    inside = (lane < L) & (key < kv_len)
    base = gradient + (pair // kv_heads) * g_batch + (pair % kv_heads) * g_head
    _store_rows(base, key, g_row, inside, total, D, DP)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_indices: torch.Tensor,
    valid: torch.Tensor | None, scale: float, causal: bool, offset: int, window: int | None,
    query_tile: int, block: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """out [B, Hq, Tq, Dv] in q's dtype and lse [B, Hq, Tq] in float32, both contiguous."""
    q, k, v = _dense_rows(q), _dense_rows(k), _dense_rows(v)
    batch, q_heads, q_len, head_dim = q.shape
    kv_heads, value_dim = k.shape[1], v.shape[3]
    out = q.new_empty(batch, q_heads, q_len, value_dim)
    lse = q.new_empty(batch, q_heads, q_len, dtype=torch.float32)
    if out.numel() == 0 and lse.numel() == 0:
        return out, lse
    ids, counts = _order(
        block_indices, valid, q_len, k.shape[2], causal, offset, window, query_tile, block
    )
    launch = _launch("forward", q, v, query_tile, block)
    tiles = block_indices.shape[2]
    rows = _program_rows(launch.rows, q_heads // kv_heads, query_tile)
    chunks = triton.cdiv(q_heads // kv_heads * query_tile, rows)
    _forward[(chunks * tiles * kv_heads * batch,)](
        q, k, v, ids, counts, _mask_pointer(valid, q), out, lse, abs(scale) * LOG2_E, tiles, kv_heads,
        q_len, k.shape[2], offset, window or 0, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        *_mask_strides(valid), G=q_heads // kv_heads, N=ids.shape[3], R=query_tile, L=block,
        D=head_dim, DV=value_dim, DP=_pad(head_dim), DVP=_pad(value_dim), M=rows, BN=launch.keys,
        CHUNKS=chunks, CAUSAL=causal, WINDOWED=window is not None, PADDED=valid is not None,
        NEGATIVE=scale < 0, num_warps=_warps(launch, rows), num_stages=launch.stages,
    )  # fmt: skip
    return out, lse


def backward(
    grad_out: torch.Tensor, grad_lse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor,
    v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, block_indices: torch.Tensor,
    valid: torch.Tensor | None, scale: float, causal: bool, offset: int, window: int | None,
    query_tile: int, block: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(dq, dk, dv), contiguous, in the dtypes of q, k and v."""
    gradients = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    q, k, v, out, grad_out = (_dense_rows(x) for x in (q, k, v, out, grad_out))
    lse = lse.contiguous()
    if q.numel() == 0 or k.shape[2] == 0:
        for gradient in gradients:
            gradient.zero_()
        return gradients
    dq, dk, dv = gradients
    geometry = (scale, causal, offset, window, query_tile, block)
    ordered = _order(block_indices, valid, q.shape[2], k.shape[2], *geometry[1:])
    delta = torch.empty_like(lse)
    _launch_query(grad_out, grad_lse, q, k, v, out, lse, ordered, valid, dq, delta, geometry)
    _launch_key(grad_out, q, k, v, lse, ordered[0], valid, dk, dv, delta, geometry)
    return gradients


def _launch_query(grad_out, grad_lse, q, k, v, out, lse, ordered, valid, dq, delta, geometry):
    scale, causal, offset, window, query_tile, block = geometry
    ids, counts = ordered
    batch, q_heads, q_len, head_dim = q.shape
    group = q_heads // k.shape[1]
    launch = _launch("query", q, v, query_tile, block)
    rows = _program_rows(launch.rows, group, query_tile)
    chunks = triton.cdiv(group * query_tile, rows)
    grad_lse_strides = (0, 0, 0) if grad_lse is None else grad_lse.stride()
    _query_gradient[(chunks * ids.shape[2] * k.shape[1] * batch,)](
        q, k, v, out, grad_out, lse, lse if grad_lse is None else grad_lse, ids, counts,
        _mask_pointer(valid, q), dq, delta, abs(scale) * LOG2_E, scale, ids.shape[2], k.shape[1], q_len,
        k.shape[2], offset, window or 0, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        *out.stride()[:3], *grad_out.stride()[:3], *grad_lse_strides, *dq.stride()[:3],
        *_mask_strides(valid), G=group, N=ids.shape[3], R=query_tile, L=block, D=head_dim,
        DV=v.shape[3], DP=_pad(head_dim), DVP=_pad(v.shape[3]), M=rows, BN=launch.keys,
        CHUNKS=chunks, CAUSAL=causal, WINDOWED=window is not None, PADDED=valid is not None,
        NEGATIVE=scale < 0, LSE_GRADIENT=grad_lse is not None, num_warps=_warps(launch, rows),
        num_stages=launch.stages,
    )  # fmt: skip


def _launch_key(grad_out, q, k, v, lse, ids, valid, dk, dv, delta, geometry):
    scale, causal, offset, window, query_tile, block = geometry
    batch, kv_heads, kv_len, head_dim = k.shape
    value_dim, group, tiles = v.shape[3], q.shape[1] // kv_heads, ids.shape[2]
    pairs, blocks = batch * kv_heads, triton.cdiv(kv_len, block)
    piece = max(1, PIECE_ROWS // (group * query_tile))
    # A list of c > piece readers takes ceil(c / piece) slots, fewer than 2 c / piece.
    slots = 0 if tiles <= piece else 2 * tiles * ids.shape[3] // piece
    readers, starts, slot_first, slot_block = _invert(ids, blocks, piece, slots)
    launch = _launch("key", q, v, query_tile, block)
    keys = min(launch.keys, max(16, triton.next_power_of_2(block)))
    dk_part = q.new_empty(pairs * slots * block * head_dim, dtype=torch.float32)
    dv_part = q.new_empty(pairs * slots * block * value_dim, dtype=torch.float32)
    shape = {"G": group, "R": query_tile, "L": block, "D": head_dim, "DV": value_dim,
             "DP": _pad(head_dim), "DVP": _pad(value_dim)}  # fmt: skip
    pieces = triton.cdiv(block, keys)
    _key_gradient[(pairs * (slots + blocks) * pieces,)](
        q, k, v, grad_out, lse, delta, readers, starts, slot_block, slot_first, dk_part, dv_part,
        _mask_pointer(valid, q), dk, dv, abs(scale) * LOG2_E, pairs, kv_heads, q.shape[2], kv_len, offset,
        window or 0, blocks, slots, readers.shape[1],
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad_out.stride()[:3], *dk.stride()[:3],
        *dv.stride()[:3], *_mask_strides(valid), **shape, BN=keys, BM=launch.rows, PIECE=piece,
        PIECE_PAD=triton.next_power_of_2(min(piece, tiles)), PIECES=pieces, CAUSAL=causal,
        WINDOWED=window is not None, PADDED=valid is not None, NEGATIVE=scale < 0,
        num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    if slots == 0:
        return
    for part, gradient, dim in ((dk_part, dk, head_dim), (dv_part, dv, value_dim)):
        _join_pieces[(pairs * blocks,)](
            part, starts, slot_first, gradient, kv_heads, kv_len, blocks, slots,
            *gradient.stride()[:3], L=block, L_PAD=triton.next_power_of_2(block), D=dim, DP=_pad(dim),
            PIECE=piece, num_warps=4,
        )  # fmt: skip


def _invert(
    ids: torch.Tensor, blocks: int, piece: int, slots: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each block its readers: the tiles that list it, ascending, and where long lists are cut.

    Returns ``readers`` int32 [P, NT * n] (P pairs of batch and kv head), ``starts`` [P, Ns + 1] into
    it, ``slot_first`` [P, Ns + 1] the first slot of a block, and ``slot_block`` [P, slots] the block
    of a slot (Ns and more: unused).
    """
    pairs, width = ids.shape[0] * ids.shape[1], ids.shape[3]
    flat = ids.reshape(pairs, -1)
    chosen, order = torch.where(flat < 0, blocks, flat).sort(dim=1, stable=True)
    readers = (order // width).to(torch.int32)
    edges = torch.arange(blocks + 1, device=ids.device, dtype=torch.int32).expand(pairs, -1)
    starts = torch.searchsorted(chosen, edges.contiguous(), out_int32=True)
    count = starts.diff(dim=1)
    needed = torch.where(count > piece, (count + piece - 1) // piece, 0)
    slot_first = torch.nn.functional.pad(needed.cumsum(1, dtype=torch.int32), (1, 0))
    slot = torch.arange(max(slots, 1), device=ids.device, dtype=torch.int32).expand(pairs, -1)
    slot_block = torch.searchsorted(
        slot_first[:, 1:].contiguous(), slot.contiguous(), right=True, out_int32=True
    )
    return readers, starts, slot_first, slot_block


def _order(
    block_indices: torch.Tensor, valid: torch.Tensor | None, q_len: int, kv_len: int, causal: bool,
    offset: int, window: int | None, query_tile: int, block: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The lists with whole blocks first, and how many of each kind: int32 [B, Hkv, NT, 2]."""
    ids = block_indices.contiguous()
    batch, kv_heads, tiles, width = ids.shape
    ordered = torch.empty_like(ids)
    counts = ids.new_empty(batch, kv_heads, tiles, 2)
    before = ids
    if valid is not None:
        before = torch.nn.functional.pad(valid.cumsum(1, dtype=torch.int32), (1, 0))
    padded = triton.next_power_of_2(width)
    per_program = max(1, 128 // padded)
    total = batch * kv_heads * tiles
    _order_blocks[(triton.cdiv(total, per_program),)](
        ids, ordered, counts, before, total, tiles, kv_heads, q_len, kv_len, offset, window or 0,
        triton.cdiv(kv_len, block), N=width, N_PAD=padded, R=query_tile, L=block, TILES=per_program,
        CAUSAL=causal, WINDOWED=window is not None, PADDED=valid is not None, num_warps=1,
    )  # fmt: skip
    return ordered, counts


def _launch(kernel: str, q: torch.Tensor, v: torch.Tensor, query_tile: int, block: int) -> Launch:
    widest = max(64, _pad(max(q.shape[3], v.shape[3])))
    launch = LAUNCHES[kernel, q.element_size() == 2, widest]
    lone = triton.next_power_of_2(block)
    if lone != block:  # not a power of two: a step reads one block, its last lanes masked
        return launch._replace(keys=max(16, lone))
    return launch


def _program_rows(most: int, group: int, query_tile: int) -> int:
    """Rows of a query-side program: all heads of a short tile together, no mostly empty program."""
    rows = max(16, triton.next_power_of_2(group * query_tile))
    if rows <= most:
        return rows
    waste = -(group * query_tile) % most
    return most if waste * 4 <= group * query_tile or most <= 64 else 64


def _warps(launch: Launch, rows: int) -> int:
    """A warp multiplies at least 16 rows."""
    return max(1, min(launch.warps, rows // 16))


def _pad(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


def _dense_rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _mask_pointer(valid: torch.Tensor | None, placeholder: torch.Tensor) -> torch.Tensor:
    return placeholder if valid is None else valid.view(torch.uint8)


def _mask_strides(valid: torch.Tensor | None) -> tuple[int, int]:
    return (0, 0) if valid is None else (valid.stride(0), valid.stride(1))
