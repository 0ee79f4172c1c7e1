"""Triton kernels of the scorer "channels": blocks of keys for tiles of queries, linear memory.

    x_ib = scale max_{j in b, j seen by i} sum_c q_ic k_jc,  c over r of the D channels
    score_tb = sum_{i in t, heads} exp(x_ib) / sum_b' exp(x_ib')

One persistent kernel walks the keys once. A row's logits, one a block, go to a strip of device
memory that belongs to the program and mostly stays in L2; once the row's sum is known the strip is
read back and summed over the tile. Keys are packed so that a thread of a tensor-core tile owns all
columns of one block: the maximum over a block then needs no other thread. Half-precision inputs
are multiplied as float16 with float16 sums, whose maxima go two an instruction; many channels in
8 bits (e4m3), at the cost of half as many in 16. Their keys are centred, which moves all logits of
a row alike and no choice, and divided by each channel's deviation, with which queries are
multiplied; a row of these gets the length that keeps every sum within float16.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from nsa_compile.kernels.modifiers import Modifiers
from nsa_compile.kernels.score.triton_rows import Launch, deal_rows
from nsa_compile.kernels.score.triton_statistic import channels, key_moments
from nsa_compile.kernels.triton_site import (
    LOG2_E,
    capped,
    common_keys,
    key_ranges,
    mask_pointer,
    mask_strides,
    place_of,
    row_range,
    row_segment,
    row_slope,
    seen_in_terms,
    terms,
    visible,
)
from nsa_compile.kernels.visibility import Visibility

__all__ = ["channel_scores", "channels", "pack_keys"]

# A packed channel has this deviation, and a packed query row this length: the largest e4m3, 448, is
# then 112 deviations away, and no sum of 64 products passes float16's 65504 (of more: of 256, a
# quarter of the length).
KEY_DEVIATION: tl.constexpr = tl.constexpr(4.0)
QUERY_LENGTH: tl.constexpr = tl.constexpr(16.0)
# More channels than this are multiplied in 8 bits where the device can.
MOST_WIDE = 32
# Fewer keys a step where their channels take more: three stages of three programs fit a processor.
GROUP_BYTES = 1 << 14
# One H100, 65,536 tokens, 32/8 heads, ms. 32 channels: 128x256 with 4 warps and 3 programs a
# processor 7.2 (rows that are computed and not loaded 7.4), 8 warps 8.0, 128x128 8.6, 256x128 8.5,
# two programs a processor 8.8; with float32 products 10.0. The product alone takes 5.5. 64 channels
# in 8 bits 7.9 (in 16 bits 15.7), 2 stages 8.9, 128x128 10.1, two programs 9.1; 128 channels in 8
# bits 15.7, 2 stages 17.2.
# By sixteen-bit inputs and whether logits are float32, which ALiBi's distances ask for.
LAUNCHES: dict[tuple[bool, bool], Launch] = {
    (True, False): Launch(128, 256, 4, 3, programs=3, registers=168),
    (True, True): Launch(64, 128, 4, 2, programs=2),
    (False, True): Launch(32, 64, 4, 1, programs=4),
}


@triton.jit
def _narrow(x, kind: tl.constexpr):
    """float32 to ``kind``; what is too large saturates instead of overflowing."""
    if kind == tl.float16:
        x = tl.minimum(tl.maximum(x, -65504.0), 65504.0)
    if kind == tl.float8e4nv:
        x = tl.minimum(tl.maximum(x, -448.0), 448.0)
    return x.to(kind)


@triton.jit
def _halve(x, M: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, NATIVE: tl.constexpr):
    """[M, 2 ROWS, COLUMNS] -> [M, ROWS, COLUMNS]: the larger of two halves, in packed pairs."""
    first, second = tl.split(tl.permute(tl.reshape(x, [M, 2, ROWS, COLUMNS]), [0, 2, 3, 1]))
    if NATIVE:
        return tl.inline_asm_elementwise(
            "max.f16x2 $0, $1, $2;",
            "=r,r,r",
            [first, second],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
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
    k, chosen, means, deviations, valid, packed, some, kv_heads, kv_len, groups, blocks, k_batch,
    k_head, k_row, k_column, valid_batch, valid_row, dim, r, C: tl.constexpr, L: tl.constexpr,
    LP: tl.constexpr, BLOCKS: tl.constexpr, PADDED: tl.constexpr, SCALED: tl.constexpr,
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
    tile = tile.to(tl.float32)
    if SCALED:
        centre = tl.load(means + pair * dim + picked, mask=channel < r, other=0.0)
        deviation = tl.load(deviations + pair * dim + picked, mask=channel < r, other=0.0)
        factor = 1.0 / tl.where(deviation > 0, deviation, 1.0) * KEY_DEVIATION
        tile = tl.where((deviation > 0)[None, :], (tile - centre[None, :]) * factor[None, :], 0.0)
    place = (pid * BLOCKS * LP + column)[:, None] * C + channel[None, :]
    tl.store(packed + place, _narrow(tile, packed.dtype.element_ty))


@triton.jit
def _block_logits(
    top, total, q, unit, packed, strip, some, valid, start, stop, position, kv_len, blocks, window,
    valid_row, row_low, row_high, segment, slope, place, key_segments, positions, cap,
    M: tl.constexpr, C: tl.constexpr, L: tl.constexpr, LP: tl.constexpr, BLOCKS: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PADDED: tl.constexpr, RANGED: tl.constexpr,
    SEGMENTED: tl.constexpr, SLOPED: tl.constexpr, PLACED: tl.constexpr, CAPPED: tl.constexpr,
    NATIVE: tl.constexpr, SCALED: tl.constexpr, STAGES: tl.constexpr, MASKED: tl.constexpr,
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
            seen = visible(position[:, None], key[None, :], kv_len, window, CAUSAL, WINDOWED)
            seen = seen_in_terms(
                seen, key, inside, row_low, row_high, segment, key_segments, RANGED, SEGMENTED
            )
            if SLOPED:
                if CAPPED:
                    s = capped(s, cap)
                away = place_of(key, positions, kv_len, SLOPED, PLACED)[None, :] - place[:, None]
                s = s + slope[:, None] * away
            if PADDED:
                inside = inside & (
                    tl.load(valid + key.to(tl.int64) * valid_row, mask=inside, other=0) != 0
                )
            s = tl.where(seen & inside[None, :], s, float("-inf"))
        x = _block_maximum(s, M, LP, BLOCKS, NATIVE)
        if SCALED:
            x = x * unit[:, None]
        if CAPPED and not SLOPED:  # without slopes the cap is monotone
            x = capped(x, cap)
        if PADDED:
            number = group * BLOCKS + own
            alive = tl.load(some + number, mask=number < blocks, other=0) != 0
            x = tl.where(alive[None, :], x, float("-inf"))
        new_top = tl.maximum(top, x)
        base = new_top
        if MASKED or PADDED:
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp2(top - base) + tl.exp2(x - base)
        tl.store(strip + group * strip_group + strip_offsets, x.to(strip.dtype.element_ty))
        top = new_top
    return top, total


@triton.jit
def _scaled_rows(x, C: tl.constexpr):
    """Rows of one length, and by what their products with packed keys give logits."""
    length: tl.constexpr = QUERY_LENGTH if C <= 64 else QUERY_LENGTH / 4
    norm = tl.sqrt(tl.sum(x * x, 1))
    norm = tl.where(norm > 0, norm, 1.0)  # A row of zeros stays one, and its logits 0.
    return x * (1.0 / norm * length)[:, None], norm / (length * KEY_DEVIATION)


@triton.jit
def _channel_scores(
    q, packed, chosen, deviations, some, valid, rows, strips, ticket, part, scale, items, kv_heads,
    q_len, kv_len, offset, window, groups, blocks, dim, r, first_tile, tiles, tile_groups, q_batch,
    q_head, q_row, q_column, valid_batch, valid_row, ranges, ranges_batch, query_segments,
    query_segments_batch, key_segments, key_segments_batch, slopes, positions, positions_batch, cap,
    G: tl.constexpr, R: tl.constexpr, C: tl.constexpr, L: tl.constexpr, LP: tl.constexpr,
    BLOCKS: tl.constexpr, M: tl.constexpr, LANES: tl.constexpr, HEADS: tl.constexpr,
    TILES: tl.constexpr, PARTS: tl.constexpr, CHUNK: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr, PADDED: tl.constexpr, RANGED: tl.constexpr, SEGMENTED: tl.constexpr,
    SLOPED: tl.constexpr, PLACED: tl.constexpr, CAPPED: tl.constexpr, NATIVE: tl.constexpr,
    SCALED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Scores of TILES tiles against all blocks, from M rows; programs draw such items by ticket.

    Items of one kv head are neighbours, so its packed keys stay in L2, the longest first.
    """
    strip = strips + tl.program_id(0).to(tl.int64) * groups * BLOCKS * M
    own_rows = rows + tl.program_id(0) * (M * C)
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
        q_tile = q_tile.to(tl.float32) * scale
        unit = tl.full([M], 1.0, tl.float32)
        if SCALED:
            deviation = tl.load(deviations + pair * dim + picked, mask=channel < r, other=0.0)
            q_tile, unit = _scaled_rows(q_tile * deviation[None, :], C)
        q_tile = _narrow(q_tile, packed.dtype.element_ty)
        # Computed, the operand would pass through registers in every step, byte by byte where it
        # has eight bits; loaded, it lies in shared memory.
        here = own_rows + row[:, None] * C + channel[None, :]
        tl.store(here, q_tile)
        tl.debug_barrier()
        q_tile = tl.load(here)
        position = query + offset
        first = tl.min(tl.where(mine, position, 2147483647))
        last = tl.max(tl.where(mine, position, -2147483648))
        empty = first > last
        first = tl.where(empty, 0, first)
        last = tl.where(empty, -1, last)
        low, high, low_all, high_all = key_ranges(first, last, kv_len, window, CAUSAL, WINDOWED)
        row_low, row_high = row_range(ranges + batch * ranges_batch, query, mine, RANGED)
        segment = row_segment(query_segments + batch * query_segments_batch, query, mine, SEGMENTED)
        slope = row_slope(slopes, head, mine, SLOPED)
        segments = key_segments + batch * key_segments_batch
        places = positions + batch * positions_batch
        place = place_of(position, places, kv_len, SLOPED, PLACED)
        low, high, low_all, high_all = common_keys(
            low, high, low_all, high_all, row_low, row_high, mine, RANGED
        )
        if SEGMENTED or SLOPED:
            # Any key may be hidden; and ALiBi tells the lanes that repeat a key apart.
            low_all = low * 0
            high_all = low * 0
        start = low // (BLOCKS * L)
        stop = tl.where(empty, start, tl.maximum((high + BLOCKS * L - 1) // (BLOCKS * L), start))
        start_all = (low_all + BLOCKS * L - 1) // (BLOCKS * L)
        start_all = tl.minimum(tl.maximum(start_all, start), stop)
        stop_all = tl.minimum(tl.maximum(high_all // (BLOCKS * L), start_all), stop)
        keys = packed + pair * groups * (BLOCKS * LP * C)
        top = tl.full([M, BLOCKS], float("-inf"), tl.float32)
        total = tl.zeros([M, BLOCKS], tl.float32)
        own_some, own_valid = some + pair * blocks, valid + batch * valid_batch
        if WINDOWED or RANGED:
            top, total = _block_logits(
                top, total, q_tile, unit, keys, strip, own_some, own_valid, start, start_all,
                position, kv_len, blocks, window, valid_row, row_low, row_high, segment, slope,
                place, segments, places, cap, M, C, L, LP, BLOCKS, CAUSAL, WINDOWED, PADDED, RANGED,
                SEGMENTED, SLOPED, PLACED, CAPPED, NATIVE, SCALED, 1, True,
            )  # fmt: skip
        top, total = _block_logits(
            top, total, q_tile, unit, keys, strip, own_some, own_valid, start_all, stop_all,
            position, kv_len, blocks, window, valid_row, row_low, row_high, segment, slope, place,
            segments, places, cap, M, C, L, LP, BLOCKS, CAUSAL, WINDOWED, PADDED, RANGED, SEGMENTED,
            SLOPED, PLACED, CAPPED, NATIVE, SCALED, STAGES, False,
        )  # fmt: skip
        top, total = _block_logits(
            top, total, q_tile, unit, keys, strip, own_some, own_valid, stop_all, stop, position,
            kv_len, blocks, window, valid_row, row_low, row_high, segment, slope, place, segments,
            places, cap, M, C, L, LP, BLOCKS, CAUSAL, WINDOWED, PADDED, RANGED, SEGMENTED, SLOPED,
            PLACED, CAPPED, NATIVE, SCALED, 1, True,
        )  # fmt: skip
        peak = tl.max(top, 1)
        base = tl.where(peak == float("-inf"), 0.0, peak)
        row_sum = tl.sum(total * tl.exp2(top - base[:, None]), 1)
        alive = mine & (row_sum > 0)
        log_sum = tl.where(alive, base + tl.log2(tl.where(alive, row_sum, 1.0)), float("inf"))
        tl.debug_barrier()
        # Every block that the tiles see gets a number, also those that only other rows see.
        tile_first = (first_tile + tile_group * TILES) * R
        tile_last = (
            tl.minimum(tl.minimum(tile_first + TILES * R, (first_tile + tiles) * R), q_len) - 1
        )
        low, high, low_all, high_all = key_ranges(
            tile_first + offset, tile_last + offset, kv_len, window, CAUSAL, WINDOWED
        )
        number = tl.arange(0, CHUNK)
        slot = tl.arange(0, TILES)
        out = part + ((pair * PARTS + piece) * tiles + tile_group * TILES) * blocks
        for chunk in range(low // L // CHUNK, (high + L * CHUNK - 1) // (L * CHUNK)):
            block = chunk * CHUNK + number
            there = (block >= start * BLOCKS) & (block < stop * BLOCKS)
            spot = strip + block[:, None].to(tl.int64) * M + row[None, :]
            x = tl.load(spot, mask=there[:, None], other=float("-inf")).to(tl.float32)
            p = tl.exp2(x - log_sum[None, :])
            score = tl.sum(tl.reshape(p, [CHUNK, TILES, M // TILES]), 2)
            spot = out + slot[None, :].to(tl.int64) * blocks + block[:, None]
            keep = (block < blocks)[:, None] & (tile_group * TILES + slot < tiles)[None, :]
            tl.store(spot, score, mask=keep)
        tl.debug_barrier()
        item = tl.atomic_add(ticket, 1)


class PackedKeys(NamedTuple):
    """The chosen channels of all keys in groups of blocks, and which blocks hold a valid key.

    ``deviations`` float32 [B, Hkv, D], where keys were divided by them.
    """

    keys: torch.Tensor
    some: torch.Tensor
    groups: int
    blocks_in_group: int
    deviations: torch.Tensor | None


def pack_keys(
    k: torch.Tensor, chosen: torch.Tensor, valid: torch.Tensor | None, block: int,
    modifiers: Modifiers,
) -> PackedKeys:  # fmt: skip
    """[B, Hkv, groups, columns, r padded to a power of two]; see ``_packed_key`` for the order."""
    batch, kv_heads, kv_len, dim = k.shape
    lanes, kept = triton.next_power_of_2(block), chosen.shape[2]
    width = max(16, triton.next_power_of_2(kept))
    means, deviations, dtype = chosen, None, _narrow_dtype(k)
    if kept > MOST_WIDE and _may_shift(modifiers) and _eight_bits(k):
        (means, deviations), dtype = key_moments(k, valid), torch.float8_e4m3fn
    most = max(16, GROUP_BYTES // (width * dtype.itemsize))
    columns = max(lanes, min(_launch(k, modifiers.slopes is not None).keys, most))
    in_group, blocks = columns // lanes, triton.cdiv(kv_len, block)
    groups = triton.cdiv(blocks, in_group)
    packed = k.new_empty(batch, kv_heads, groups, columns, width, dtype=dtype)
    some = k.new_empty(batch, kv_heads, blocks, dtype=torch.int8)
    _pack_keys[(batch * kv_heads * groups,)](
        k, chosen, means, chosen if deviations is None else deviations, mask_pointer(valid, k),
        packed, some, kv_heads, kv_len, groups, blocks, *k.stride(), *mask_strides(valid), dim,
        kept, C=width, L=block, LP=lanes, BLOCKS=in_group, PADDED=valid is not None,
        SCALED=deviations is not None, num_warps=4,
    )  # fmt: skip
    return PackedKeys(packed, some, groups, in_group, deviations)


def _launch(x: torch.Tensor, sloped: bool) -> Launch:
    return LAUNCHES[x.element_size() == 2, sloped or x.element_size() != 2]


def parts(q: torch.Tensor, kv_heads: int, query_tile: int, sloped: bool) -> int:
    """Programs of ``channel_scores`` that share a tile."""
    launch = _launch(q, sloped)
    return deal_rows(launch.rows, q.shape[1] // kv_heads, query_tile).parts


def channel_scores(
    q: torch.Tensor, packed: PackedKeys, chosen: torch.Tensor, visibility: Visibility,
    modifiers: Modifiers, kv_len: int, scale: float, causal: bool, offset: int,
    window: int | None, query_tile: int, block: int, first_tile: int, tiles: int,
) -> torch.Tensor:  # fmt: skip
    """float32 [B, Hkv, parts, tiles, Ns]: sum over the parts for the scores of ``tiles`` tiles.

    Blocks that a tile does not see are left unwritten.
    """
    sloped, valid = modifiers.slopes is not None, visibility.valid
    launch, extra = _launch(q, sloped), terms(visibility, modifiers, q)
    batch, q_heads, q_len, dim = q.shape
    kv_heads = chosen.shape[1]
    dealt = deal_rows(launch.rows, q_heads // kv_heads, query_tile)
    blocks, tile_groups = triton.cdiv(kv_len, block), triton.cdiv(tiles, dealt.tiles)
    items = batch * kv_heads * tile_groups * dealt.parts
    programs = min(items, _processors(q.device) * launch.programs)
    strips = q.new_empty(
        programs * packed.groups * packed.blocks_in_group * launch.rows,
        dtype=torch.float32 if sloped else _narrow_dtype(q),
    )
    scaled, width = packed.deviations is not None, packed.keys.shape[4]
    rows = packed.keys.new_empty(programs * launch.rows * width)
    ticket = torch.zeros(1, dtype=torch.int32, device=q.device)
    part = q.new_empty(batch, kv_heads, dealt.parts, tiles, blocks, dtype=torch.float32)
    _channel_scores[(programs,)](
        q, packed.keys, chosen, chosen if packed.deviations is None else packed.deviations,
        packed.some, mask_pointer(valid, q), rows, strips, ticket, part, scale * LOG2_E, items,
        kv_heads, q_len, kv_len, offset, window or 0, packed.groups, blocks, dim, chosen.shape[2],
        first_tile, tiles, tile_groups, *q.stride(), *mask_strides(valid), *extra.arguments,
        G=q_heads // kv_heads, R=query_tile, C=width, L=block, LP=triton.next_power_of_2(block),
        BLOCKS=packed.blocks_in_group, M=launch.rows, LANES=dealt.lanes, HEADS=dealt.heads,
        TILES=dealt.tiles, PARTS=dealt.parts, CHUNK=64, CAUSAL=causal, WINDOWED=window is not None,
        PADDED=valid is not None, **extra.flags, NATIVE=_native(q), SCALED=scaled,
        STAGES=launch.stages, num_warps=launch.warps, num_stages=launch.stages,
        maxnreg=launch.registers,
    )  # fmt: skip
    return part


def _narrow_dtype(x: torch.Tensor) -> torch.dtype:
    """Of keys and logits: float16 maxima run at twice the rate and order blocks as well."""
    return torch.float16 if x.element_size() == 2 else torch.float32


def _may_shift(modifiers: Modifiers) -> bool:
    """Whether all logits of a row may move by one number: a cap looks at their size."""
    return modifiers.slopes is None and not modifiers.softcap


def _eight_bits(x: torch.Tensor) -> bool:
    """Whether 16-bit ``x`` is on a device that multiplies e4m3 (capability 8.9 and later)."""
    if x.element_size() != 2 or not x.is_cuda:
        return False
    return torch.cuda.get_device_capability(x.device) >= (8, 9)


def _native(x: torch.Tensor) -> bool:
    """Whether inline assembly runs: everywhere but in Triton's interpreter."""
    return x.is_cuda


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
