"""Triton kernels of the scorer "mean": probability of each compressed key, summed over a tile.

    p_ic = exp(scale q_i.y_c) / sum_c' exp(scale q_i.y_c'),   mass_tc = sum_{i in t, heads} p_ic

Two passes over the product: row sums, then column sums of the recomputed p, which costs less than
a [Tq, Nc] matrix in memory. Selection spreads the mass over the selection blocks.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from nsa_compile.kernels.score.triton_rows import Launch, deal_rows, dealt_rows
from nsa_compile.kernels.triton_descriptors import describable, describe, head_rows, load_tile
from nsa_compile.kernels.triton_site import (
    LOG2_E,
    Terms,
    capped,
    dense_rows,
    place_of,
    row_range,
    row_slope,
    seen_in_terms,
    visible,
)

# One H100, 131,072 tokens, 32/8 heads of 128, bfloat16, ms. Row sums, keys through descriptors:
# 128x64 8.3 (through pointers 9.0), with 3 stages 9.2, without a limit 9.4; 128x128 in 112
# registers 8.4, 128x64 with 4 warps 8.6, 256x64 with 16 warps 9.0, 64x64 9.1; more than one program
# on a processor hides the exponentials. A bound in place of the running maximum, or half of the
# exponentials as polynomials, gains nothing; two exponentials in half precision take the unit as
# long as two in single. Column sums: 64x256 with 3 stages 9.2, with 2 9.5, in 120 registers 9.5,
# without a limit 11.9; 64x128 11.2 and more, 64x64 12.5, 128x128 12.4; queries through descriptors
# spill and take 10.8 and more.
LAUNCHES: dict[tuple[str, bool], Launch] = {
    ("row sums", True): Launch(128, 64, 8, 2, registers=80),
    ("row sums", False): Launch(32, 32, 4, 1),
    ("column sums", True): Launch(64, 256, 8, 3, registers=128),
    ("column sums", False): Launch(32, 32, 4, 1),
}

COLUMN_STEPS = 128  # tiles times heads that one program of the column sums goes through


@triton.jit
def _modified(
    x, slope, last, place, positions, cap, kv_len, SLOPED: tl.constexpr, PLACED: tl.constexpr,
    CAPPED: tl.constexpr,
):  # fmt: skip
    """Cap and ALiBi on logits in base 2; a compressed key stands where its last key stands."""
    if CAPPED:
        x = capped(x, cap)
    if SLOPED:
        x = x + slope * (place_of(last, positions, kv_len, SLOPED, PLACED) - place)
    return x


@triton.jit
def _row_steps(
    top, total, q, y, batch, head, some, start, stop, position, scale, count, window, y_row, kv_len,
    row_low, row_high, slope, place, positions, cap, CB: tl.constexpr, CD: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr, PADDED: tl.constexpr, RANGED: tl.constexpr, SLOPED: tl.constexpr,
    PLACED: tl.constexpr, CAPPED: tl.constexpr, DESCRIBED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Running maximum and sum of four interleaved columns a row: a thread meets no other."""
    column = tl.arange(0, BN)
    for step in range(start, stop):
        c = step * BN + column
        keys = load_tile(
            y, batch, head, step * BN, column, y_row, c < count, D, DP, BN, MASKED, DESCRIBED
        )
        s = tl.dot(q, tl.trans(keys), input_precision="ieee")
        last = c * CD + (CB - 1)
        if MASKED or PADDED or SLOPED or CAPPED:
            s = _modified(
                s * scale, slope[:, None], last[None, :], place[:, None], positions, cap,
                kv_len, SLOPED, PLACED, CAPPED,
            )  # fmt: skip
        if MASKED:
            seen = (c < count)[None, :]
            seen = seen & visible(
                position[:, None], last[None, :], 2147483647, window, CAUSAL, WINDOWED
            )
            seen = seen_in_terms(seen, last, c < count, row_low, row_high, c, some, RANGED, False)
            if PADDED:
                seen = seen & (tl.load(some + c, mask=c < count, other=0) != 0)[None, :]
            s = tl.where(seen, s, float("-inf"))
        elif PADDED:
            s = tl.where((tl.load(some + c) != 0)[None, :], s, float("-inf"))
        s = tl.reshape(s, [M, BN // 8, 4, 2])
        if MASKED or PADDED or SLOPED or CAPPED:
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
def _complete(position, CB: tl.constexpr, CD: tl.constexpr):
    """Compressed blocks whose last key is at most ``position``."""
    return tl.maximum(position + 1 - CB + CD, 0) // CD


@triton.jit
def _row_sums(
    q, y, some, shifts, scale, q_heads, kv_heads, q_len, count, offset, window, chunks,
    q_batch, q_head, q_row, y_batch, y_head, y_row, kv_len, ranges, ranges_batch, slopes,
    positions, positions_batch, cap, G: tl.constexpr, CB: tl.constexpr, CD: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr, PADDED: tl.constexpr, RANGED: tl.constexpr, SLOPED: tl.constexpr,
    PLACED: tl.constexpr, CAPPED: tl.constexpr, NEGATIVE: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Shifts: minus log2 of the row sums over compressed keys; -inf where a query sees none.

    What a logit is shifted by becomes the log2 of its probability.
    """
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
        stop = tl.minimum(_complete(last, CB, CD), stop)
        stop_all = tl.minimum(_complete(first, CB, CD), stop)
    elif WINDOWED:
        stop = tl.minimum(_complete(last + window - 1, CB, CD), stop)
        stop_all = tl.minimum(_complete(first + window - 1, CB, CD), stop)
    if WINDOWED:
        start = tl.minimum(_complete(first - window, CB, CD), stop)
        start_all = tl.minimum(_complete(last - window, CB, CD), stop)
    row_low, row_high = row_range(ranges + batch * ranges_batch, row, mine, RANGED)
    slope = row_slope(slopes, head + row * 0, mine, SLOPED)
    places = positions + batch * positions_batch
    place = place_of(position, places, kv_len, SLOPED, PLACED)
    if RANGED:
        newest = tl.max(tl.where(mine, row_high, 0)) - 1
        oldest = tl.min(tl.where(mine, row_low, 2147483647)) - 1
        stop = tl.minimum(stop, _complete(newest, CB, CD))
        start = tl.minimum(tl.maximum(start, _complete(tl.minimum(oldest, newest), CB, CD)), stop)
        start_all = stop  # any of them may be hidden
    stop = (stop + BN - 1) // BN
    start = tl.minimum(start // BN, stop)
    start_all = tl.minimum((start_all + BN - 1) // BN, stop)
    stop_all = tl.minimum(tl.maximum(stop_all // BN, start_all), stop)
    y_base = head_rows(y, batch, head // G, y_batch, y_head, DESCRIBED)
    where = batch.to(tl.int32), (head // G).to(tl.int32)
    some_base = some + batch * count
    top = tl.full([M, 4], float("-inf"), tl.float32)
    total = tl.zeros([M, 4], tl.float32)
    if WINDOWED or RANGED:
        top, total = _row_steps(
            top, total, q_tile, y_base, where[0], where[1], some_base, start, start_all, position,
            scale, count, window, y_row, kv_len, row_low, row_high, slope, place, places, cap, CB,
            CD, D, DP, M, BN, CAUSAL, WINDOWED, PADDED, RANGED, SLOPED, PLACED, CAPPED, DESCRIBED,
            True,
        )  # fmt: skip
    top, total = _row_steps(
        top, total, q_tile, y_base, where[0], where[1], some_base, start_all, stop_all, position,
        scale, count, window, y_row, kv_len, row_low, row_high, slope, place, places, cap, CB, CD,
        D, DP, M, BN, CAUSAL, WINDOWED, PADDED, RANGED, SLOPED, PLACED, CAPPED, DESCRIBED, False,
    )  # fmt: skip
    top, total = _row_steps(
        top, total, q_tile, y_base, where[0], where[1], some_base, stop_all, stop, position, scale,
        count, window, y_row, kv_len, row_low, row_high, slope, place, places, cap, CB, CD, D, DP,
        M, BN, CAUSAL, WINDOWED, PADDED, RANGED, SLOPED, PLACED, CAPPED, DESCRIBED, True,
    )  # fmt: skip
    peak = tl.max(top, 1)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    row_sum = tl.sum(total * tl.exp2(top - base[:, None]), 1)
    shift = tl.where(
        row_sum > 0, -base - tl.log2(tl.where(row_sum > 0, row_sum, 1.0)), float("-inf")
    )
    tl.store(shifts + (batch * q_heads + head) * q_len + row, shift, mask=mine)


@triton.jit
def _shifts(shifts, head, first, query, mine, q_len, EVEN: tl.constexpr):
    """Of the rows of a step; -inf for rows that are not there."""
    if EVEN:
        return tl.load(shifts + (head.to(tl.int64) * q_len + first) + (query - first))
    return tl.load(shifts + head.to(tl.int64) * q_len + query, mask=mine, other=float("-inf"))


@triton.jit
def _column_steps(
    y, q, shifts, mass, alive, real, c, start, stop, scale, q_len, count, offset, window, q_head,
    q_row, first_tile, tiles, kv_len, ranges, slopes, positions, cap, G: tl.constexpr,
    R: tl.constexpr, CB: tl.constexpr, CD: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BC: tl.constexpr, M: tl.constexpr, LANES: tl.constexpr, HEADS: tl.constexpr,
    TILES: tl.constexpr, PARTS: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
    RANGED: tl.constexpr, SLOPED: tl.constexpr, PLACED: tl.constexpr, CAPPED: tl.constexpr,
    NEGATIVE: tl.constexpr, EVEN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Tile groups [start, stop); the next step's shifts are fetched a step ahead.

    Columns of one tile are summed four interleaved ones apart, so that a thread meets no other
    before the tile is done.
    """
    dim = tl.arange(0, DP)
    slot = tl.arange(0, TILES)
    apart: tl.constexpr = 4 if TILES == 1 else TILES
    subtotal = tl.zeros([BC, apart], tl.float32)
    newest = tl.maximum(stop * PARTS - 1, 0)  # What is fetched ahead must be there.
    head, first, query, mine = dealt_rows(
        tl.minimum(start * PARTS, newest), first_tile, tiles, q_len, R, G, M, LANES, HEADS, TILES,
        PARTS,
    )  # fmt: skip
    next_shift = _shifts(shifts, head, first, query, mine, q_len, EVEN)
    for step in range(start * PARTS, stop * PARTS):
        shift = next_shift
        head, first, query, mine = dealt_rows(
            tl.minimum(step + 1, newest), first_tile, tiles, q_len, R, G, M, LANES,
            HEADS, TILES, PARTS,
        )  # fmt: skip
        next_shift = _shifts(shifts, head, first, query, mine, q_len, EVEN)
        head, first, query, mine = dealt_rows(
            step, first_tile, tiles, q_len, R, G, M, LANES, HEADS, TILES, PARTS
        )
        q_base = q + first.to(tl.int64) * q_row
        if TILES * HEADS == 1:
            q_base += head.to(tl.int64) * q_head
            q_rows = (query - first) * q_row
        else:
            q_rows = head.to(tl.int64) * q_head + (query - first).to(tl.int64) * q_row
        pointers = q_base + q_rows[:, None] + dim[None, :]
        if EVEN:
            q_tile = tl.load(pointers)
        else:
            q_tile = tl.load(pointers, mask=mine[:, None] & (dim < D)[None, :], other=0.0)
        if NEGATIVE:
            q_tile = -q_tile
        s = tl.dot(y, tl.trans(q_tile), input_precision="ieee")
        last = (c * CD + (CB - 1))[:, None]
        slope = row_slope(slopes, head + query * 0, mine, SLOPED)
        place = place_of(query + offset, positions, kv_len, SLOPED, PLACED)
        x = _modified(
            s * scale, slope[None, :], last, place[None, :], positions, cap, kv_len, SLOPED, PLACED,
            CAPPED,
        )  # fmt: skip
        p = tl.exp2(x + shift[None, :])
        if MASKED:
            seen = visible((query + offset)[None, :], last, 2147483647, window, CAUSAL, WINDOWED)
            if RANGED:
                row_low, row_high = row_range(ranges, query, mine, RANGED)
                seen = seen & (last >= row_low[None, :]) & (last < row_high[None, :])
            p = tl.where(seen, p, 0.0)
        if TILES == 1:
            subtotal += tl.sum(tl.sum(tl.reshape(p, [BC, M // 8, 4, 2]), 3), 1)
        else:
            subtotal += tl.sum(tl.reshape(p, [BC, TILES, M // TILES]), 2)
        if step % PARTS == PARTS - 1:
            tile = step // PARTS * TILES + slot
            there = tile.to(tl.int64)[None, :] * count + c[:, None]
            total = subtotal
            if TILES == 1:
                total = tl.sum(subtotal, 1)[:, None]
            tl.store(
                mass + there, tl.where(real[:, None], total, 0.0),
                mask=alive[:, None] & (tile < tiles)[None, :],
            )  # fmt: skip
            subtotal = tl.zeros([BC, apart], tl.float32)


@triton.jit
def _column_sums(
    q, y, some, shifts, mass, scale, kv_heads, q_len, count, offset, window, chunks, ranges, span,
    first_tile, tiles, tile_groups, q_batch, q_head, q_row, y_batch, y_head, y_row, kv_len,
    row_ranges, row_ranges_batch, slopes, positions, positions_batch, cap, G: tl.constexpr,
    R: tl.constexpr, CB: tl.constexpr, CD: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BC: tl.constexpr, M: tl.constexpr, LANES: tl.constexpr, HEADS: tl.constexpr,
    TILES: tl.constexpr, PARTS: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
    PADDED: tl.constexpr, RANGED: tl.constexpr, SLOPED: tl.constexpr, PLACED: tl.constexpr,
    CAPPED: tl.constexpr, NEGATIVE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """mass of BC compressed keys for a range of tiles; transposed, so rows are summed in place."""
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
        newest = chunk * BC * CD + CB - 1 - before
        start = tl.maximum(start, tl.maximum(newest, 0) // (TILES * R))
        newest = (tl.minimum(chunk * BC + BC, count) - 1) * CD + CB - 1 - before
        full = (tl.maximum(newest, 0) + TILES * R - 1) // (TILES * R)
    if WINDOWED or RANGED:
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
        pointers = (
            y
            + batch * y_batch
            + pair % kv_heads * y_head
            + c.to(tl.int64)[:, None] * y_row
            + dim[None, :]
        )
        keys = tl.load(pointers, mask=alive[:, None] & (dim < D)[None, :], other=0.0)
        q_base = q + batch * q_batch + pair % kv_heads * G * q_head
        own_shifts = shifts + pair * G * q_len
        own_ranges = row_ranges + batch * row_ranges_batch
        places = positions + batch * positions_batch
        own_slopes = slopes + pair % kv_heads * G
        out = mass + pair * tiles * count
        _column_steps(
            keys, q_base, own_shifts, out, alive, real, c, start, full, scale, q_len, count, offset,
            window, q_head, q_row, first_tile, tiles, kv_len, own_ranges, own_slopes, places, cap,
            G, R, CB, CD, D, DP, BC, M, LANES, HEADS, TILES, PARTS, CAUSAL, WINDOWED, RANGED,
            SLOPED, PLACED, CAPPED, NEGATIVE, EVEN, True,
        )  # fmt: skip
        _column_steps(
            keys, q_base, own_shifts, out, alive, real, c, full, stop, scale, q_len, count, offset,
            window, q_head, q_row, first_tile, tiles, kv_len, own_ranges, own_slopes, places, cap,
            G, R, CB, CD, D, DP, BC, M, LANES, HEADS, TILES, PARTS, CAUSAL, WINDOWED, RANGED,
            SLOPED, PLACED, CAPPED, NEGATIVE, EVEN, False,
        )  # fmt: skip


def row_shifts(
    q: torch.Tensor, compressed: torch.Tensor, some: torch.Tensor | None, kv_len: int,
    extra: Terms, scale: float, causal: bool, offset: int, window: int | None, compress_block: int,
    compress_stride: int,
) -> torch.Tensor:  # fmt: skip
    """Minus log2 of the softmax denominators over compressed keys, float32 [B, Hq, Tq]; -inf: none.

    ``some`` is int8 [B, Nc]: whether a compressed key holds a valid one.
    """
    q, compressed = dense_rows(q), dense_rows(compressed)
    arguments, flags = _without_segments(extra)
    batch, q_heads, q_len, dim = q.shape
    kv_heads, count = compressed.shape[1:3]
    launch = LAUNCHES["row sums", q.element_size() == 2]
    read, described = compressed, describable(compressed)
    if described:
        read = describe(compressed, (1, 1, launch.keys, max(16, triton.next_power_of_2(dim))))
    shifts = q.new_empty(batch, q_heads, q_len, dtype=torch.float32)
    chunks = triton.cdiv(q_len, launch.rows)
    _row_sums[(batch * q_heads * chunks,)](
        q, read, compressed if some is None else some, shifts, abs(scale) * LOG2_E, q_heads,
        kv_heads, q_len, count, offset, window or 0, chunks, *q.stride()[:3],
        *compressed.stride()[:3], kv_len, *arguments, G=q_heads // kv_heads, CB=compress_block,
        CD=compress_stride, D=dim, DP=max(16, triton.next_power_of_2(dim)), M=launch.rows,
        BN=launch.keys, CAUSAL=causal, WINDOWED=window is not None, PADDED=some is not None,
        **flags, NEGATIVE=scale < 0, DESCRIBED=described, num_warps=launch.warps,
        num_stages=launch.stages, maxnreg=None if any(flags.values()) else launch.registers,
    )  # fmt: skip
    return shifts


def compressed_mass(
    q: torch.Tensor, compressed: torch.Tensor, some: torch.Tensor | None, shifts: torch.Tensor,
    kv_len: int, extra: Terms, scale: float, causal: bool, offset: int, window: int | None,
    query_tile: int, compress_block: int, compress_stride: int, first_tile: int, tiles: int,
) -> torch.Tensor:  # fmt: skip
    """float32 [B, Hkv, tiles, Nc]: probability of each compressed key, summed over tile and heads.

    Keys that a tile does not see are left unwritten.
    """
    q, compressed = dense_rows(q), dense_rows(compressed)
    arguments, flags = _without_segments(extra)
    batch, q_heads, q_len, dim = q.shape
    kv_heads, count = compressed.shape[1:3]
    launch = LAUNCHES["column sums", q.element_size() == 2]
    dealt = deal_rows(launch.rows, q_heads // kv_heads, query_tile)
    tile_groups = triton.cdiv(tiles, dealt.tiles)
    span = max(1, COLUMN_STEPS // dealt.parts)
    whole = dealt.tiles * dealt.heads == 1 and query_tile % launch.rows == 0
    even = whole and q_len % query_tile == 0 and dim == triton.next_power_of_2(dim)
    ranges, chunks = triton.cdiv(tile_groups, span), triton.cdiv(count, launch.keys)
    mass = q.new_empty(batch, kv_heads, tiles, count, dtype=torch.float32)
    _column_sums[(batch * kv_heads * chunks * ranges,)](
        q, compressed, compressed if some is None else some, shifts, mass, abs(scale) * LOG2_E,
        kv_heads, q_len, count, offset, window or 0, chunks, ranges, span, first_tile, tiles,
        tile_groups, *q.stride()[:3], *compressed.stride()[:3], kv_len, *arguments,
        G=q_heads // kv_heads, R=query_tile, CB=compress_block, CD=compress_stride, D=dim,
        DP=max(16, triton.next_power_of_2(dim)), BC=launch.keys, M=launch.rows, LANES=dealt.lanes,
        HEADS=dealt.heads, TILES=dealt.tiles, PARTS=dealt.parts, CAUSAL=causal,
        WINDOWED=window is not None, PADDED=some is not None, **flags, NEGATIVE=scale < 0,
        EVEN=even, num_warps=launch.warps, num_stages=launch.stages,
        maxnreg=None if any(flags.values()) else launch.registers,
    )  # fmt: skip
    return mass


def _without_segments(extra: Terms) -> tuple[tuple[Any, ...], dict[str, bool]]:
    """A compressed key has no segment of its own; it is not asked for one."""
    ranges = extra.arguments[:2]
    return (*ranges, *extra.arguments[6:]), {
        name: there for name, there in extra.flags.items() if name != "SEGMENTED"
    }
