"""Triton kernels that weigh blocks of keys for tiles of queries, in memory linear in T.

Scorer "channels", with c over r of the D channels:

    x_ib = scale max_{j in b, j seen by i} sum_c q_ic k_jc
    score_tb = sum_{i in t, heads} exp(x_ib) / sum_b' exp(x_ib')

One persistent kernel walks the keys once. A row's logits, one a block, go to a strip of device
memory that belongs to the program and stays in L2; when the row's sum is known the strip is read
back and summed over the tile. Keys are packed so that a thread of a tensor-core tile owns all
columns of one block: the maximum over a block then needs no other thread.

Scorer "mean", with y_c the compressed keys:

    p_ic = exp(scale q_i.y_c) / sum_c' exp(scale q_i.y_c'),   mass_tc = sum_{i in t, heads} p_ic

Two kernels: row sums, then column sums of the recomputed p, which is cheaper than a [Tq, Nc] matrix
in memory. Selection spreads mass over the selection blocks. Exponentials are base 2.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Launch(NamedTuple):
    """Rows of queries, columns of keys a step, warps, stages, programs per processor, registers."""

    rows: int
    keys: int
    warps: int
    stages: int
    programs: int = 1
    registers: int | None = None


LAUNCHES: dict[tuple[str, bool], Launch] = {
    ("channels", True): Launch(128, 256, 4, 3, 3, 168),
    ("channels", False): Launch(32, 64, 4, 1, 4),
    ("row sums", True): Launch(128, 64, 8, 2),
    ("row sums", False): Launch(32, 32, 4, 1),
    ("column sums", True): Launch(64, 128, 4, 2),
    ("column sums", False): Launch(32, 32, 4, 1),
}

LOG2_E = math.log2(math.e)
STATISTIC_ROWS = 512  # rows of q or k behind one partial moment
COLUMN_STEPS = 128  # tiles times heads that one program of the column sums goes through


class Rows(NamedTuple):
    """How M rows are dealt to the tiles and heads of a group: (tile, head, query), query fastest."""

    lanes: int  # queries of one tile and head, padded to a power of two
    heads: int
    tiles: int
    parts: int  # programs that share a tile


def deal_rows(rows: int, group: int, query_tile: int) -> Rows:
    """Whole heads of a tile first, then more tiles; a tile longer than ``rows`` is cut."""
    padded = triton.next_power_of_2(query_tile)
    if padded >= rows:
        return Rows(rows, 1, 1, group * (padded // rows))
    heads = min(rows // padded, group & -group)
    return Rows(padded, heads, rows // padded // heads, group // heads)


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
def _key_ranges(first, last, kv_len, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
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


@triton.jit
def _moments(
    x, valid, mean, spread, weight, heads, length, x_batch, x_head, x_row, valid_batch, valid_row,
    chunks, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, M: tl.constexpr,
    CENTRED: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Per chunk of rows: the sum of squares, or count, mean and centred sum of squares (Chan)."""
    pid = tl.program_id(0).to(tl.int64)
    pair = pid // chunks
    start = pid % chunks * ROWS
    column = tl.arange(0, DP)
    base = x + pair // heads * x_batch + pair % heads * x_head
    centre = tl.zeros([DP], tl.float32)
    total = tl.zeros([DP], tl.float32)
    count = tl.zeros([1], tl.float32)
    for step in range(0, ROWS // M):
        row = start + step * M + tl.arange(0, M)
        inside = row < length
        if PADDED:
            there = valid + pair // heads * valid_batch + row * valid_row
            inside = inside & (tl.load(there, mask=inside, other=0) != 0)
        mask = inside[:, None] & (column < D)[None, :]
        tile = tl.load(base + row[:, None] * x_row + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if CENTRED:
            here = tl.sum(inside.to(tl.float32), 0)
            average = tl.sum(tile, 0) / tl.maximum(here, 1.0)
            rest = tl.where(mask, tile - average[None, :], 0.0)
            both = count + here
            shift = average - centre
            total += tl.sum(rest * rest, 0) + shift * shift * (count * here / tl.maximum(both, 1.0))
            centre += shift * (here / tl.maximum(both, 1.0))
            count = both
        else:
            total += tl.sum(tile * tile, 0)
    tl.store(spread + pid * D + column, total, mask=column < D)
    if CENTRED:
        tl.store(mean + pid * D + column, centre, mask=column < D)
        tl.store(weight + pid + tl.arange(0, 1), count)


@triton.jit
def _strongest(
    energy, mean, spread, weight, strength, chosen, q_chunks, k_chunks, r,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """The r channels with the largest energy times variance, ascending; ties to the lower index."""
    pair = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, DP)
    used = (column < D)[None, :]
    power = tl.zeros([DP], tl.float32)
    for step in range(0, (q_chunks * G + M - 1) // M):
        row = step * M + tl.arange(0, M)
        pointers = energy + (pair * G * q_chunks + row)[:, None] * D + column[None, :]
        power += tl.sum(tl.load(pointers, mask=(row < q_chunks * G)[:, None] & used, other=0.0), 0)
    centre = tl.zeros([DP], tl.float32)
    count = tl.zeros([1], tl.float32)
    for step in range(0, (k_chunks + M - 1) // M):
        row = step * M + tl.arange(0, M)
        share = tl.load(weight + pair * k_chunks + row, mask=row < k_chunks, other=0.0)
        pointers = mean + (pair * k_chunks + row)[:, None] * D + column[None, :]
        centres = tl.load(pointers, mask=(row < k_chunks)[:, None] & used, other=0.0)
        centre += tl.sum(centres * share[:, None], 0)
        count += tl.sum(share, 0)
    centre = centre / tl.maximum(count, 1.0)
    total = tl.zeros([DP], tl.float32)
    for step in range(0, (k_chunks + M - 1) // M):
        row = step * M + tl.arange(0, M)
        share = tl.load(weight + pair * k_chunks + row, mask=row < k_chunks, other=0.0)
        inside = (row < k_chunks)[:, None] & used
        place = (pair * k_chunks + row)[:, None] * D + column[None, :]
        shift = tl.load(mean + place, mask=inside, other=0.0) - centre[None, :]
        total += tl.sum(tl.load(spread + place, mask=inside, other=0.0) + shift * shift * share[:, None], 0)
    own = power * (total / tl.maximum(count, 1.0))
    tl.store(strength + pair * D + column, own, mask=column < D)
    tl.debug_barrier()
    rank = tl.zeros([DP], tl.int32)
    for step in range(0, (D + M - 1) // M):
        rival = step * M + tl.arange(0, M)
        other = tl.load(strength + pair * D + rival, mask=rival < D, other=-1.0)[:, None]
        ahead = (other > own[None, :]) | ((other == own[None, :]) & (rival[:, None] < column[None, :]))
        rank += tl.sum((ahead & (rival < D)[:, None]).to(tl.int32), 0)
    keep = (rank < r) & (column < D)
    place = tl.cumsum(keep.to(tl.int32), 0) - 1
    tl.store(chosen + pair * r + place, column, mask=keep & (place < r))


@triton.jit
def _narrow(x, kind: tl.constexpr):
    """float32 to ``kind``; bfloat16's largest values saturate in float16 instead of overflowing."""
    if kind == tl.float16:
        x = tl.minimum(tl.maximum(x, -65504.0), 65504.0)
    return x.to(kind)


@triton.jit
def _halve(x, M: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, NATIVE: tl.constexpr):
    """[M, 2 ROWS, COLUMNS] -> [M, ROWS, COLUMNS]: the larger of the two halves, two numbers at a time."""
    first, second = tl.split(tl.permute(tl.reshape(x, [M, 2, ROWS, COLUMNS]), [0, 2, 3, 1]))
    if NATIVE:
        return tl.inline_asm_elementwise(
            "max.f16x2 $0, $1, $2;", "=r,r,r", [first, second], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        return tl.maximum(first, second)


@triton.jit
def _block_maximum(
    s, M: tl.constexpr, LP: tl.constexpr, BLOCKS: tl.constexpr, NATIVE: tl.constexpr
):  # fmt: skip
    """[M, columns in packed order] -> float32 [M, BLOCKS]: no thread meets another for four blocks.

    float16 goes as packed pairs, twice the rate: rows of a block are halved until one pair is left.
    """
    pair: tl.constexpr = 2 if LP > 1 else 1
    if s.dtype == tl.float16:
        s = tl.reshape(s, [M, LP // pair, BLOCKS * pair])
        if LP >= 256:
            s = _halve(s, M, 64, BLOCKS * pair, NATIVE)
        if LP >= 128:
            s = _halve(s, M, 32, BLOCKS * pair, NATIVE)
        if LP >= 64:
            s = _halve(s, M, 16, BLOCKS * pair, NATIVE)
        if LP >= 32:
            s = _halve(s, M, 8, BLOCKS * pair, NATIVE)
        if LP >= 16:
            s = _halve(s, M, 4, BLOCKS * pair, NATIVE)
        if LP >= 8:
            s = _halve(s, M, 2, BLOCKS * pair, NATIVE)
        if LP >= 4:
            s = _halve(s, M, 1, BLOCKS * pair, NATIVE)
        return tl.max(tl.reshape(s, [M, BLOCKS, pair]), 2).to(tl.float32)
    else:
        return tl.max(tl.max(tl.reshape(s, [M, LP // pair, BLOCKS, pair]), 3), 1)


@triton.jit
def _packed_key(column, group, BLOCKS: tl.constexpr, L: tl.constexpr, LP: tl.constexpr):
    """Block and lane of each column of a packed group of BLOCKS blocks of LP lanes.

    A tensor-core tile gives lane t of four the column pairs 8 j + 2 t; blocks follow pairs, so with
    four blocks in a group each lane has a block of its own.
    """
    pair: tl.constexpr = 2 if LP > 1 else 1
    block = group * BLOCKS + column // pair % BLOCKS
    lane = column // (pair * BLOCKS) * pair + column % pair
    return block, lane


@triton.jit
def _pack_keys(
    k, chosen, valid, packed, some, kv_heads, kv_len, groups, blocks, k_batch, k_head, k_row, k_column,
    valid_batch, valid_row, r, C: tl.constexpr, L: tl.constexpr, LP: tl.constexpr,
    BLOCKS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """The chosen channels of a group of blocks, in the order of ``_packed_key``.

    A lane without a valid key repeats the block's first valid one: the block's maximum is that of
    its valid keys, with nothing to mask. ``some`` says whether a block has one.
    """
    pid = tl.program_id(0).to(tl.int64)
    pair = pid // groups
    group = (pid % groups).to(tl.int32)
    batch = pair // kv_heads
    column = tl.arange(0, BLOCKS * LP)
    block, lane = _packed_key(column, group, BLOCKS, L, LP)
    good = (lane < L) & (block * L + lane < kv_len)
    first = lane * 0
    if PADDED:
        valid_base = valid + batch * valid_batch
        own = group * BLOCKS + tl.arange(0, BLOCKS)
        within = tl.arange(0, LP)
        at = own[:, None] * L + within[None, :]
        there = (within < L)[None, :] & (at < kv_len)
        real = tl.load(valid_base + at.to(tl.int64) * valid_row, mask=there, other=0) != 0
        leader = tl.min(tl.where(real, within[None, :], LP), 1)
        tl.store(some + pair * blocks + own, (leader < LP).to(tl.int8), mask=own < blocks)
        leader = tl.where(leader < LP, leader, 0)
        first = tl.sum(tl.where(block[:, None] == own[None, :], leader[None, :], 0), 1)
        key = (block * L + lane).to(tl.int64)
        good = good & (tl.load(valid_base + key * valid_row, mask=good, other=0) != 0)
    key = block * L + tl.where(good, lane, first)
    channel = tl.arange(0, C)
    picked = tl.load(chosen + pair * r + channel, mask=channel < r, other=0)
    base = k + batch * k_batch + pair % kv_heads * k_head
    pointers = base + key.to(tl.int64)[:, None] * k_row + picked[None, :].to(tl.int64) * k_column
    tile = tl.load(pointers, mask=(key < kv_len)[:, None] & (channel < r)[None, :], other=0.0)
    place = (pid * BLOCKS * LP + column)[:, None] * C + channel[None, :]
    tl.store(packed + place, _narrow(tile.to(tl.float32), packed.dtype.element_ty))


@triton.jit
def _block_logits(
    top, total, q, packed, strip, some, valid, start, stop, position, kv_len, blocks, window,
    valid_row, M: tl.constexpr, C: tl.constexpr, L: tl.constexpr, LP: tl.constexpr,
    BLOCKS: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PADDED: tl.constexpr,
    NATIVE: tl.constexpr, STAGES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Groups [start, stop): logits to the strip; running maximum and sum, by block of a group."""
    column = tl.arange(0, BLOCKS * LP)
    channel = tl.arange(0, C)
    own = tl.arange(0, BLOCKS)
    row = tl.arange(0, M)
    offsets = column[:, None] * C + channel[None, :]
    strip_offsets = own[None, :] * M + row[:, None]
    packed_group = tl.full([], BLOCKS * LP * C, tl.int64)
    strip_group = tl.full([], BLOCKS * M, tl.int64)
    for group in tl.range(start, stop, num_stages=STAGES):
        keys = tl.load(packed + group * packed_group + offsets)
        s = tl.dot(q, tl.trans(keys), input_precision="ieee", out_dtype=strip.dtype.element_ty)
        if MASKED:
            block, lane = _packed_key(column, group, BLOCKS, L, LP)
            key = block * L + lane
            inside = (lane < L) & (key < kv_len)
            seen = _visible(position[:, None], key[None, :], kv_len, window, CAUSAL, WINDOWED)
            if PADDED:
                inside = inside & (tl.load(valid + key.to(tl.int64) * valid_row, mask=inside, other=0) != 0)
            s = tl.where(seen & inside[None, :], s, float("-inf"))
        x = _block_maximum(s, M, LP, BLOCKS, NATIVE)
        if PADDED:
            number = group * BLOCKS + own
            alive = tl.load(some + number, mask=number < blocks, other=0) != 0
            x = tl.where(alive[None, :], x, float("-inf"))
        new_top = tl.maximum(top, x)
        base = new_top
        if MASKED or PADDED:
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp2(top - base) + tl.exp2(x - base)
        place = strip + group * strip_group
        tl.store(place + strip_offsets, x.to(strip.dtype.element_ty))
        top = new_top
    return top, total


@triton.jit
def _channel_scores(
    q, packed, chosen, some, valid, strips, ticket, part, scale, items, kv_heads, q_len, kv_len, offset,
    window, groups, blocks, r, first_tile, tiles, tile_groups, q_batch, q_head, q_row, q_column,
    valid_batch, valid_row, G: tl.constexpr, R: tl.constexpr, C: tl.constexpr, L: tl.constexpr,
    LP: tl.constexpr, BLOCKS: tl.constexpr, M: tl.constexpr, LANES: tl.constexpr, HEADS: tl.constexpr,
    TILES: tl.constexpr, PARTS: tl.constexpr, CHUNK: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr, PADDED: tl.constexpr, NATIVE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Scores of TILES tiles against all blocks, from M rows; programs draw such items by ticket.

    Items of one kv head are neighbours, so its packed keys stay in L2, the longest first.
    """
    strip = strips + tl.program_id(0).to(tl.int64) * groups * BLOCKS * M
    row = tl.arange(0, M)
    channel = tl.arange(0, C)
    item = tl.atomic_add(ticket, 1)
    while item < items:
        piece = item % PARTS
        tile_group = tile_groups - 1 - (item // PARTS) % tile_groups
        pair = (item // PARTS // tile_groups).to(tl.int64)
        batch = pair // kv_heads
        cuts: tl.constexpr = PARTS * HEADS // G
        lane = piece % cuts * LANES + row % LANES
        head = pair % kv_heads * G + piece // cuts * HEADS + row // LANES % HEADS
        tile = tile_group * TILES + row // (LANES * HEADS)
        query = (first_tile + tile) * R + lane
        mine = (lane < R) & (tile < tiles) & (query < q_len)
        picked = tl.load(chosen + pair * r + channel, mask=channel < r, other=0)
        q_rows = batch * q_batch + head * q_head + query.to(tl.int64) * q_row
        pointers = q + q_rows[:, None] + picked[None, :].to(tl.int64) * q_column
        q_tile = tl.load(pointers, mask=mine[:, None] & (channel < r)[None, :], other=0.0)
        # The scale goes into the query, so that a product is a logit and float16 has its range.
        q_tile = _narrow(q_tile.to(tl.float32) * scale, packed.dtype.element_ty)
        position = query + offset
        first = tl.min(tl.where(mine, position, 2147483647))
        last = tl.max(tl.where(mine, position, -2147483648))
        empty = first > last
        first = tl.where(empty, 0, first)
        last = tl.where(empty, -1, last)
        low, high, low_all, high_all = _key_ranges(first, last, kv_len, window, CAUSAL, WINDOWED)
        start = low // (BLOCKS * L)
        stop = tl.where(empty, start, tl.maximum((high + BLOCKS * L - 1) // (BLOCKS * L), start))
        start_all = (low_all + BLOCKS * L - 1) // (BLOCKS * L)
        start_all = tl.minimum(tl.maximum(start_all, start), stop)
        stop_all = tl.minimum(tl.maximum(high_all // (BLOCKS * L), start_all), stop)
        keys = packed + pair * groups * (BLOCKS * LP * C)
        top = tl.full([M, BLOCKS], float("-inf"), tl.float32)
        total = tl.zeros([M, BLOCKS], tl.float32)
        if WINDOWED:
            top, total = _block_logits(
                top, total, q_tile, keys, strip, some + pair * blocks, valid + batch * valid_batch, start,
                start_all, position, kv_len, blocks, window, valid_row, M, C, L, LP, BLOCKS,
                CAUSAL, WINDOWED, PADDED, NATIVE, 1, True,
            )  # fmt: skip
        top, total = _block_logits(
            top, total, q_tile, keys, strip, some + pair * blocks, valid + batch * valid_batch, start_all,
            stop_all, position, kv_len, blocks, window, valid_row, M, C, L, LP, BLOCKS,
            CAUSAL, WINDOWED, PADDED, NATIVE, STAGES, False,
        )  # fmt: skip
        top, total = _block_logits(
            top, total, q_tile, keys, strip, some + pair * blocks, valid + batch * valid_batch, stop_all,
            stop, position, kv_len, blocks, window, valid_row, M, C, L, LP, BLOCKS,
            CAUSAL, WINDOWED, PADDED, NATIVE, 1, True,
        )  # fmt: skip
        peak = tl.max(top, 1)
        base = tl.where(peak == float("-inf"), 0.0, peak)
        row_sum = tl.sum(total * tl.exp2(top - base[:, None]), 1)
        alive = mine & (row_sum > 0)
        log_sum = tl.where(alive, base + tl.log2(tl.where(alive, row_sum, 1.0)), float("inf"))
        tl.debug_barrier()
        # Every block that the tiles see gets a number, also those that only other rows see.
        tile_first = (first_tile + tile_group * TILES) * R
        tile_last = tl.minimum(tl.minimum(tile_first + TILES * R, (first_tile + tiles) * R), q_len) - 1
        low, high, low_all, high_all = _key_ranges(
            tile_first + offset, tile_last + offset, kv_len, window, CAUSAL, WINDOWED
        )
        number = tl.arange(0, CHUNK)
        slot = tl.arange(0, TILES)
        out = part + ((pair * PARTS + piece) * tiles + tile_group * TILES) * blocks
        for chunk in range(low // L // CHUNK, (high + L * CHUNK - 1) // (L * CHUNK)):
            block = chunk * CHUNK + number
            there = (block >= start * BLOCKS) & (block < stop * BLOCKS)
            place = strip + block[:, None].to(tl.int64) * M + row[None, :]
            x = tl.load(place, mask=there[:, None], other=float("-inf")).to(tl.float32)
            p = tl.exp2(x - log_sum[None, :])
            score = tl.sum(tl.reshape(p, [CHUNK, TILES, M // TILES]), 2)
            spot = out + slot[None, :].to(tl.int64) * blocks + block[:, None]
            keep = (block < blocks)[:, None] & (tile_group * TILES + slot < tiles)[None, :]
            tl.store(spot, score, mask=keep)
        tl.debug_barrier()
        item = tl.atomic_add(ticket, 1)


@triton.jit
def _row_steps(
    top, total, q, y, some, start, stop, position, scale, count, window, y_row, l: tl.constexpr,
    d: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Running maximum and sum of four interleaved columns a row: a thread meets no other."""
    column = tl.arange(0, BN)
    dim = tl.arange(0, DP)
    y_step = tl.full([], BN, tl.int64) * y_row
    for step in range(start, stop):
        c = step * BN + column
        pointers = y + step * y_step + (column * y_row)[:, None] + dim[None, :]
        if MASKED or D != DP:
            keys = tl.load(pointers, mask=(c < count)[:, None] & (dim < D)[None, :], other=0.0)
        else:
            keys = tl.load(pointers)
        s = tl.dot(q, tl.trans(keys), input_precision="ieee")
        if MASKED:
            seen = (c < count)[None, :]
            last = (c * d + (l - 1))[None, :]
            seen = seen & _visible(position[:, None], last, 2147483647, window, CAUSAL, WINDOWED)
            if PADDED:
                seen = seen & (tl.load(some + c, mask=c < count, other=0) != 0)[None, :]
            s = tl.where(seen, s * scale, float("-inf"))
        elif PADDED:
            s = tl.where((tl.load(some + c) != 0)[None, :], s * scale, float("-inf"))
        s = tl.reshape(s, [M, BN // 8, 4, 2])
        if MASKED or PADDED:
            new_top = tl.maximum(top, tl.max(tl.max(s, 3), 1))
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            p = tl.exp2(s - base[:, None, :, None])
        else:
            new_top = tl.maximum(top, tl.max(tl.max(s, 3), 1) * scale)
            base = new_top
            p = tl.exp2(s * scale - base[:, None, :, None])
        total = total * tl.exp2(top - base) + tl.sum(tl.sum(p, 3), 1)
        top = new_top
    return top, total


@triton.jit
def _complete(position, l: tl.constexpr, d: tl.constexpr):
    """Compressed blocks whose last key is at most ``position``."""
    return tl.maximum(position + 1 - l + d, 0) // d


@triton.jit
def _row_sums(
    q, y, some, log_sums, scale, q_heads, kv_heads, q_len, count, offset, window, chunks,
    q_batch, q_head, q_row, y_batch, y_head, y_row, G: tl.constexpr, l: tl.constexpr, d: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr, PADDED: tl.constexpr, NEGATIVE: tl.constexpr,
):  # fmt: skip
    """log2 of the row sums over compressed keys; +inf where a query sees none, so that p is 0."""
    pid = tl.program_id(0).to(tl.int64)
    chunk = (chunks - 1 - pid % chunks).to(tl.int32)
    head = pid // chunks % q_heads
    batch = pid // chunks // q_heads
    row = chunk * M + tl.arange(0, M)
    dim = tl.arange(0, DP)
    mine = row < q_len
    q_base = q + batch * q_batch + head * q_head
    pointers = q_base + row.to(tl.int64)[:, None] * q_row + dim[None, :]
    q_tile = tl.load(pointers, mask=mine[:, None] & (dim < D)[None, :], other=0.0)
    if NEGATIVE:
        q_tile = -q_tile
    position = row + offset
    first = chunk * M + offset
    last = tl.minimum(chunk * M + M, q_len) - 1 + offset
    start = first * 0
    stop = start + count
    start_all = start
    stop_all = stop
    if CAUSAL:
        stop = tl.minimum(_complete(last, l, d), stop)
        stop_all = tl.minimum(_complete(first, l, d), stop)
    elif WINDOWED:
        stop = tl.minimum(_complete(last + window - 1, l, d), stop)
        stop_all = tl.minimum(_complete(first + window - 1, l, d), stop)
    if WINDOWED:
        start = tl.minimum(_complete(first - window, l, d), stop)
        start_all = tl.minimum(_complete(last - window, l, d), stop)
    stop = (stop + BN - 1) // BN
    start = tl.minimum(start // BN, stop)
    start_all = tl.minimum((start_all + BN - 1) // BN, stop)
    stop_all = tl.minimum(tl.maximum(stop_all // BN, start_all), stop)
    y_base = y + batch * y_batch + head // G * y_head
    some_base = some + batch * count
    top = tl.full([M, 4], float("-inf"), tl.float32)
    total = tl.zeros([M, 4], tl.float32)
    if WINDOWED:
        top, total = _row_steps(
            top, total, q_tile, y_base, some_base, start, start_all, position, scale, count, window,
            y_row, l, d, D, DP, M, BN, CAUSAL, WINDOWED, PADDED, True,
        )  # fmt: skip
    top, total = _row_steps(
        top, total, q_tile, y_base, some_base, start_all, stop_all, position, scale, count, window,
        y_row, l, d, D, DP, M, BN, CAUSAL, WINDOWED, PADDED, False,
    )  # fmt: skip
    top, total = _row_steps(
        top, total, q_tile, y_base, some_base, stop_all, stop, position, scale, count, window,
        y_row, l, d, D, DP, M, BN, CAUSAL, WINDOWED, PADDED, True,
    )  # fmt: skip
    peak = tl.max(top, 1)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    row_sum = tl.sum(total * tl.exp2(top - base[:, None]), 1)
    log_sum = tl.where(row_sum > 0, base + tl.log2(tl.where(row_sum > 0, row_sum, 1.0)), float("inf"))
    tl.store(log_sums + (batch * q_heads + head) * q_len + row, log_sum, mask=mine)


@triton.jit
def _dealt_rows(
    step, first_tile, tiles, q_len, R: tl.constexpr, G: tl.constexpr, M: tl.constexpr,
    LANES: tl.constexpr, HEADS: tl.constexpr, TILES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Head and first query (scalars where they can be), each row's query, rows in use; see Rows."""
    row = tl.arange(0, M)
    piece = step % PARTS
    tile_group = step // PARTS
    cuts: tl.constexpr = PARTS * HEADS // G
    if TILES * HEADS == 1 and R % M == 0:  # neighbouring queries of one head
        head = piece // cuts
        start = (first_tile + tile_group) * R + piece % cuts * LANES
        query = start + row
        mine = query < q_len
    else:
        lane = piece % cuts * LANES + row % LANES
        head = piece // cuts * HEADS + row // LANES % HEADS
        tile = tile_group * TILES + row // (LANES * HEADS)
        start = step * 0
        query = (first_tile + tile) * R + lane
        mine = (lane < R) & (tile < tiles) & (query < q_len)
    return head, start, query, mine


@triton.jit
def _column_steps(
    y, q, log_sums, mass, alive, real, c, start, stop, scale, q_len, count, offset, window, q_head, q_row,
    first_tile, tiles, G: tl.constexpr, R: tl.constexpr, l: tl.constexpr, d: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, BC: tl.constexpr, M: tl.constexpr, LANES: tl.constexpr,
    HEADS: tl.constexpr, TILES: tl.constexpr, PARTS: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr, NEGATIVE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Tile groups [start, stop); the next step's row sums are fetched a step ahead."""
    dim = tl.arange(0, DP)
    slot = tl.arange(0, TILES)
    subtotal = tl.zeros([BC, TILES], tl.float32)
    head, first, query, mine = _dealt_rows(
        start * PARTS, first_tile, tiles, q_len, R, G, M, LANES, HEADS, TILES, PARTS
    )
    next_sum = tl.load(log_sums + head.to(tl.int64) * q_len + query, mask=mine, other=float("inf"))
    for step in range(start * PARTS, stop * PARTS):
        log_sum = next_sum
        head, first, query, mine = _dealt_rows(
            step + 1, first_tile, tiles, q_len, R, G, M, LANES, HEADS, TILES, PARTS
        )
        next_sum = tl.load(log_sums + head.to(tl.int64) * q_len + query, mask=mine, other=float("inf"))
        head, first, query, mine = _dealt_rows(
            step, first_tile, tiles, q_len, R, G, M, LANES, HEADS, TILES, PARTS
        )
        q_base = q + first.to(tl.int64) * q_row
        if TILES * HEADS == 1:
            q_base += head.to(tl.int64) * q_head
            q_rows = (query - first) * q_row
        else:
            q_rows = head.to(tl.int64) * q_head + (query - first).to(tl.int64) * q_row
        pointers = q_base + q_rows[:, None] + dim[None, :]
        q_tile = tl.load(pointers, mask=mine[:, None] & (dim < D)[None, :], other=0.0)
        if NEGATIVE:
            q_tile = -q_tile
        s = tl.dot(y, tl.trans(q_tile), input_precision="ieee")
        p = tl.exp2(s * scale - log_sum[None, :])
        if MASKED:
            last = (c * d + (l - 1))[:, None]
            seen = _visible((query + offset)[None, :], last, 2147483647, window, CAUSAL, WINDOWED)
            p = tl.where(seen, p, 0.0)
        subtotal += tl.sum(tl.reshape(p, [BC, TILES, M // TILES]), 2)
        done = step % PARTS == PARTS - 1
        tile = step // PARTS * TILES + slot
        there = tile.to(tl.int64)[None, :] * count + c[:, None]
        tl.store(
            mass + there, tl.where(real[:, None], subtotal, 0.0),
            mask=alive[:, None] & (tile < tiles)[None, :] & done,
        )  # fmt: skip
        subtotal = tl.where(done, 0.0, subtotal)


@triton.jit
def _column_sums(
    q, y, some, log_sums, mass, scale, kv_heads, q_len, count, offset, window, chunks, ranges, span,
    first_tile, tiles, tile_groups, q_batch, q_head, q_row, y_batch, y_head, y_row,
    G: tl.constexpr, R: tl.constexpr, l: tl.constexpr, d: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, BC: tl.constexpr, M: tl.constexpr, LANES: tl.constexpr, HEADS: tl.constexpr,
    TILES: tl.constexpr, PARTS: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
    PADDED: tl.constexpr, NEGATIVE: tl.constexpr,
):  # fmt: skip
    """mass of BC compressed keys for a range of tiles; transposed, so that rows are summed in place."""
    pid = tl.program_id(0).to(tl.int64)
    part = (pid % ranges).to(tl.int32)
    chunk = (pid // ranges % chunks).to(tl.int32)
    pair = pid // ranges // chunks
    batch = pair // kv_heads
    start = part * span
    stop = tl.minimum(start + span, tile_groups)
    full = start
    before = first_tile * R + offset
    if CAUSAL:
        newest = chunk * BC * d + l - 1 - before
        start = tl.maximum(start, tl.maximum(newest, 0) // (TILES * R))
        newest = (tl.minimum(chunk * BC + BC, count) - 1) * d + l - 1 - before
        full = (tl.maximum(newest, 0) + TILES * R - 1) // (TILES * R)
    if WINDOWED:
        full = stop
    start = tl.minimum(start, stop)
    full = tl.minimum(tl.maximum(full, start), stop)
    if start < stop:
        c = chunk * BC + tl.arange(0, BC)
        dim = tl.arange(0, DP)
        alive = c < count
        real = alive
        if PADDED:
            real = tl.load(some + batch * count + c, mask=alive, other=0) != 0
        pointers = y + batch * y_batch + pair % kv_heads * y_head + c.to(tl.int64)[:, None] * y_row + dim[None, :]
        keys = tl.load(pointers, mask=alive[:, None] & (dim < D)[None, :], other=0.0)
        q_base = q + batch * q_batch + pair % kv_heads * G * q_head
        sums = log_sums + pair * G * q_len
        out = mass + pair * tiles * count
        _column_steps(
            keys, q_base, sums, out, alive, real, c, start, full, scale, q_len, count, offset, window, q_head,
            q_row, first_tile, tiles, G, R, l, d, D, DP, BC, M, LANES, HEADS, TILES, PARTS, CAUSAL,
            WINDOWED, NEGATIVE, True,
        )  # fmt: skip
        _column_steps(
            keys, q_base, sums, out, alive, real, c, full, stop, scale, q_len, count, offset, window, q_head,
            q_row, first_tile, tiles, G, R, l, d, D, DP, BC, M, LANES, HEADS, TILES, PARTS, CAUSAL,
            WINDOWED, NEGATIVE, False,
        )  # fmt: skip


def channels(
    q: torch.Tensor, k: torch.Tensor, valid: torch.Tensor | None, num_channels: int
) -> torch.Tensor:
    """int32 [B, Hkv, r], ascending: the channels with the largest E[q_c^2] Var[k_c]."""
    q, k = _dense_rows(q), _dense_rows(k)
    batch, kv_heads, _, dim = k.shape
    chosen = torch.empty(batch, kv_heads, num_channels, dtype=torch.int32, device=q.device)
    if chosen.numel() == 0:
        return chosen
    energy, _, _, q_chunks = _partial_moments(q, None, centred=False)
    spread, mean, weight, k_chunks = _partial_moments(k, valid, centred=True)
    strength = torch.empty(batch * kv_heads, dim, dtype=torch.float32, device=q.device)
    _strongest[(batch * kv_heads,)](
        energy, mean, spread, weight, strength, chosen, q_chunks, k_chunks, num_channels,
        G=q.shape[1] // kv_heads, D=dim, DP=triton.next_power_of_2(dim), M=32, num_warps=8,
    )  # fmt: skip
    return chosen


def _partial_moments(
    x: torch.Tensor, valid: torch.Tensor | None, centred: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Sums of squares [B, H, chunks, D], means likewise, counts [B, H, chunks], and the chunks."""
    batch, heads, length, dim = x.shape
    chunks = triton.cdiv(length, STATISTIC_ROWS)
    spread = x.new_empty(batch, heads, chunks, dim, dtype=torch.float32)
    mean = torch.empty_like(spread) if centred else spread
    weight = x.new_empty(batch, heads, chunks, dtype=torch.float32) if centred else spread
    if spread.numel():
        _moments[(batch * heads * chunks,)](
            x, _mask_pointer(valid, x), mean, spread, weight, heads, length, *x.stride()[:3],
            *_mask_strides(valid), chunks, D=dim, DP=triton.next_power_of_2(dim), ROWS=STATISTIC_ROWS,
            M=64, CENTRED=centred, PADDED=valid is not None, num_warps=4,
        )  # fmt: skip
    return spread, mean, weight, chunks


class PackedKeys(NamedTuple):
    """The chosen channels of all keys, grouped for the score kernel, and which blocks hold a key."""

    keys: torch.Tensor
    some: torch.Tensor
    groups: int
    blocks_in_group: int


def pack_keys(
    k: torch.Tensor, chosen: torch.Tensor, valid: torch.Tensor | None, block: int
) -> PackedKeys:
    """[B, Hkv, groups, columns, r padded to a power of two]; see ``_packed_key`` for the order."""
    batch, kv_heads, kv_len, _ = k.shape
    lanes = triton.next_power_of_2(block)
    columns = max(lanes, LAUNCHES["channels", k.element_size() == 2].keys)
    in_group, blocks = columns // lanes, triton.cdiv(kv_len, block)
    groups = triton.cdiv(blocks, in_group)
    width = max(16, triton.next_power_of_2(chosen.shape[2]))
    packed = k.new_empty(batch, kv_heads, groups, columns, width, dtype=_strip_dtype(k))
    some = k.new_empty(batch, kv_heads, blocks, dtype=torch.int8)
    _pack_keys[(batch * kv_heads * groups,)](
        k, chosen, _mask_pointer(valid, k), packed, some, kv_heads, kv_len, groups, blocks, *k.stride(),
        *_mask_strides(valid), chosen.shape[2], C=width, L=block, LP=lanes, BLOCKS=in_group,
        PADDED=valid is not None, num_warps=4,
    )  # fmt: skip
    return PackedKeys(packed, some, groups, in_group)


def parts(q: torch.Tensor, kv_heads: int, query_tile: int) -> int:
    """Programs of ``channel_scores`` that share a tile."""
    launch = LAUNCHES["channels", q.element_size() == 2]
    return deal_rows(launch.rows, q.shape[1] // kv_heads, query_tile).parts


def channel_scores(
    q: torch.Tensor, packed: PackedKeys, chosen: torch.Tensor, valid: torch.Tensor | None,
    kv_len: int, scale: float, causal: bool, offset: int, window: int | None, query_tile: int,
    block: int, first_tile: int, tiles: int,
) -> torch.Tensor:  # fmt: skip
    """float32 [B, Hkv, parts, tiles, Ns]: sum over the parts for the scores of ``tiles`` tiles.

    Blocks that a tile does not see are left unwritten.
    """
    launch = LAUNCHES["channels", q.element_size() == 2]
    batch, q_heads, q_len, _ = q.shape
    kv_heads = chosen.shape[1]
    dealt = deal_rows(launch.rows, q_heads // kv_heads, query_tile)
    blocks, tile_groups = triton.cdiv(kv_len, block), triton.cdiv(tiles, dealt.tiles)
    items = batch * kv_heads * tile_groups * dealt.parts
    programs = min(items, _processors(q.device) * launch.programs)
    strips = q.new_empty(programs * packed.groups * packed.blocks_in_group * launch.rows, dtype=_strip_dtype(q))
    ticket = torch.zeros(1, dtype=torch.int32, device=q.device)
    part = q.new_empty(batch, kv_heads, dealt.parts, tiles, blocks, dtype=torch.float32)
    _channel_scores[(programs,)](
        q, packed.keys, chosen, packed.some, _mask_pointer(valid, q), strips, ticket, part,
        scale * LOG2_E, items, kv_heads, q_len, kv_len, offset, window or 0, packed.groups, blocks,
        chosen.shape[2], first_tile, tiles, tile_groups, *q.stride(), *_mask_strides(valid),
        G=q_heads // kv_heads, R=query_tile, C=packed.keys.shape[4], L=block,
        LP=triton.next_power_of_2(block), BLOCKS=packed.blocks_in_group, M=launch.rows, LANES=dealt.lanes,
        HEADS=dealt.heads, TILES=dealt.tiles, PARTS=dealt.parts, CHUNK=64, CAUSAL=causal,
        WINDOWED=window is not None, PADDED=valid is not None,
        NATIVE=_native(q), STAGES=launch.stages, num_warps=launch.warps, num_stages=launch.stages,
        maxnreg=launch.registers,
    )  # fmt: skip
    return part


def row_sums(
    q: torch.Tensor, compressed: torch.Tensor, some: torch.Tensor | None, scale: float, causal: bool,
    offset: int, window: int | None, compress_block: int, compress_stride: int,
) -> torch.Tensor:  # fmt: skip
    """log2 of the softmax denominators over compressed keys, float32 [B, Hq, Tq]; +inf for none.

    ``some`` is int8 [B, Nc]: whether a compressed key holds a valid one.
    """
    q, compressed = _dense_rows(q), _dense_rows(compressed)
    batch, q_heads, q_len, dim = q.shape
    kv_heads, count = compressed.shape[1:3]
    launch = LAUNCHES["row sums", q.element_size() == 2]
    log_sums = q.new_empty(batch, q_heads, q_len, dtype=torch.float32)
    chunks = triton.cdiv(q_len, launch.rows)
    _row_sums[(batch * q_heads * chunks,)](
        q, compressed, compressed if some is None else some, log_sums, abs(scale) * LOG2_E, q_heads,
        kv_heads, q_len, count, offset, window or 0, chunks, *q.stride()[:3], *compressed.stride()[:3],
        G=q_heads // kv_heads, l=compress_block, d=compress_stride, D=dim,
        DP=max(16, triton.next_power_of_2(dim)), M=launch.rows, BN=launch.keys, CAUSAL=causal,
        WINDOWED=window is not None, PADDED=some is not None, NEGATIVE=scale < 0,
        num_warps=launch.warps, num_stages=launch.stages, maxnreg=launch.registers,
    )  # fmt: skip
    return log_sums


def compressed_mass(
    q: torch.Tensor, compressed: torch.Tensor, some: torch.Tensor | None, log_sums: torch.Tensor,
    scale: float, causal: bool, offset: int, window: int | None, query_tile: int, compress_block: int, compress_stride: int,
    first_tile: int, tiles: int,
) -> torch.Tensor:  # fmt: skip
    """float32 [B, Hkv, tiles, Nc]: probability of each compressed key, summed over tile and heads.

    Keys that a tile does not see are left unwritten.
    """
    q, compressed = _dense_rows(q), _dense_rows(compressed)
    batch, q_heads, q_len, dim = q.shape
    kv_heads, count = compressed.shape[1:3]
    launch = LAUNCHES["column sums", q.element_size() == 2]
    dealt = deal_rows(launch.rows, q_heads // kv_heads, query_tile)
    tile_groups = triton.cdiv(tiles, dealt.tiles)
    span = max(1, COLUMN_STEPS // dealt.parts)
    ranges, chunks = triton.cdiv(tile_groups, span), triton.cdiv(count, launch.keys)
    mass = q.new_empty(batch, kv_heads, tiles, count, dtype=torch.float32)
    _column_sums[(batch * kv_heads * chunks * ranges,)](
        q, compressed, compressed if some is None else some, log_sums, mass, abs(scale) * LOG2_E, kv_heads, q_len, count, offset,
        window or 0, chunks, ranges, span, first_tile, tiles, tile_groups, *q.stride()[:3],
        *compressed.stride()[:3], G=q_heads // kv_heads, R=query_tile, l=compress_block,
        d=compress_stride, D=dim, DP=max(16, triton.next_power_of_2(dim)), BC=launch.keys, M=launch.rows,
        LANES=dealt.lanes, HEADS=dealt.heads, TILES=dealt.tiles, PARTS=dealt.parts, CAUSAL=causal,
        WINDOWED=window is not None, PADDED=some is not None, NEGATIVE=scale < 0,
        num_warps=launch.warps, num_stages=launch.stages, maxnreg=launch.registers,
    )  # fmt: skip
    return mass


def _strip_dtype(x: torch.Tensor) -> torch.dtype:
    """What logits are kept in: float16 products run at twice float32's rate and order blocks as well."""
    return torch.float16 if x.element_size() == 2 else torch.float32


def _native(x: torch.Tensor) -> bool:
    """Whether inline assembly runs: everywhere but in Triton's interpreter."""
    return x.is_cuda


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _dense_rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _mask_pointer(valid: torch.Tensor | None, placeholder: torch.Tensor) -> torch.Tensor:
    return placeholder if valid is None else valid.view(torch.uint8)


def _mask_strides(valid: torch.Tensor | None) -> tuple[int, int]:
    return (0, 0) if valid is None else (valid.stride(0), valid.stride(1))
