"""What both directions of block-sparse attention share: lists of blocks, row access, launches."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from nsa_compile.kernels.attend.site import Site
from nsa_compile.kernels.triton_site import capped, key_ranges, valid_before


class Launch(NamedTuple):
    """Rows of queries, keys a step, warps, pipeline stages and most registers of one kernel."""

    rows: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None


# By kernel, whether inputs have sixteen bits, and the widest head dim padded to a power of two.
# One H100, 65,536 tokens, heads of 128, bfloat16, ms at 32/8 heads and (64/4). Forward: 128x64 with
# 8 warps in 128 registers, so that two programs overlap, 2.34 (4.68); without a limit 3.14;
# 64x64 2.81 (5.80); 128x32 2.86; with keys and values through tensor descriptors at best as long.
# Query side: 64x64 3.12, 128x32 3.34, 128x64 3.59, 3 stages 5.4.
# Key side: 64x64 7.0, 32 rows 8.1, one stage 7.2, 8 warps 12.7.
LAUNCHES: dict[tuple[str, bool, int], Launch] = {
    ("forward", True, 64): Launch(128, 64, 4, 3),
    ("forward", True, 128): Launch(128, 64, 8, 2, registers=128),
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
# Segments of a tile and of a block that hold several: equal to no other.
_MIXED_TILE, _MIXED_BLOCK = 1 << 40, 1 << 41
# Where tile and group give a program 64 rows or fewer; ms at 32/32 heads: 2.90. (64x32 in 128
# registers takes 2.74, but has not been through the correctness grid.)
SHORT: dict[tuple[str, bool, int], Launch] = {
    ("forward", True, 128): Launch(64, 64, 4, 2),
}
# At 16 rows or fewer one warp does; many programs hide each other's loads. 64/4 heads, a program a
# query, 13 blocks each, ms by keys and stages. Forward: 32 and 2 13.7, 32 and 3 14.2, 32 and 4
# 14.9, 16 and 4 14.9, 64 and 2 16.5; with two warps 64 and 2 14.7, 32 and 3 16.5. Query side: 32
# and 2 14.6, 32 and 3 15.1, 16 and 3 14.9, 64 and 2 19.6; with two warps 64 and 2 15.3, 32 and 3
# 16.1. With keys on the long side and heads on the short one 15.2 and 15.0. All read 110 GB of keys
# and values, which the counters show at 73% and 79% of what the L2 cache can do.
FEW: dict[tuple[str, bool, int], Launch] = {
    ("forward", True, 128): Launch(16, 32, 1, 2),
    ("query", True, 128): Launch(16, 32, 1, 2),
}
# Rows of short tiles are gathered on the key side, and pointers to 64 of them spill registers.
# Token granular, ms at 64/4 and 32/8 heads: 32 rows and 2 stages 13.7 and 7.3, 3 stages 13.7 and
# 8.6, 64 rows and 2 14.3 and 8.0; read head by head 19.9 and 10.5. At 32/32 heads, an earlier
# version: 32 rows 12.8, 64 rows 11.3.
SHORT_KEY: dict[tuple[bool, int], Launch] = {(True, 128): Launch(32, 64, 4, 2)}
LEAST_SHORT_ROWS = 4
# Blocks that a step of the query side goes through: with 32 of them, one warp and padding Triton
# 3.6 fails to compile.
_MOST_BLOCKS = 16


@triton.jit
def load_rows(
    base, row, stride, inside, WIDTH: tl.constexpr, PADDED: tl.constexpr, CHECK: tl.constexpr
):
    """Rows of a matrix with dense last dimension, zero outside ``inside`` and past ``WIDTH``."""
    column = tl.arange(0, PADDED)
    pointers = base + row.to(tl.int64)[:, None] * stride + column[None, :]
    if CHECK:
        return tl.load(pointers, mask=inside[:, None] & (column < WIDTH)[None, :], other=0.0)
    elif WIDTH != PADDED:
        return tl.load(pointers, mask=(column < WIDTH)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def store_rows(base, row, stride, inside, value, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    column = tl.arange(0, PADDED)
    pointers = base + row.to(tl.int64)[:, None] * stride + column[None, :]
    mask = inside[:, None] & (column < WIDTH)[None, :]
    tl.store(pointers, value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def listed_keys(ids, step, first, stop, L: tl.constexpr, BN: tl.constexpr):
    """Keys of one step through ``ids[first:stop]``: a base, each lane's offset, lanes in use.

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
def whole_steps(count, L: tl.constexpr, BN: tl.constexpr):
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
def last_steps(count, L: tl.constexpr, BN: tl.constexpr):
    """Steps that read all of a list of ``count`` blocks, the last one perhaps in part."""
    blocks: tl.constexpr = BN // L
    if blocks > 1:
        steps = (count + blocks - 1) // blocks
    else:
        pieces: tl.constexpr = (L + BN - 1) // BN
        steps = count * pieces
    return steps


@triton.jit
def modified(
    product, scale, cap, slope, place, key_place, CAPPED: tl.constexpr, SLOPED: tl.constexpr
):
    """Base-2 logits of q.k products after cap and ALiBi, and the cap's slope (if there is one)."""
    logit = product * scale
    bend = logit
    if CAPPED:
        logit = capped(logit, cap)
        bend = 1.0 - (logit / cap) * (logit / cap)
    if SLOPED:
        logit = logit + slope * (key_place - place)
    return logit, bend


@triton.jit
def _order_blocks(
    ids, ordered, counts, tally, tile_ranges, tile_segments, block_segments, total, tiles, kv_heads,
    q_len, kv_len, offset, window, blocks, ranges_batch, tile_segments_batch, block_segments_batch,
    N: tl.constexpr, N_PAD: tl.constexpr, R: tl.constexpr, L: tl.constexpr, TILES: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PADDED: tl.constexpr, RANGED: tl.constexpr,
    SEGMENTED: tl.constexpr,
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
    low, high, low_all, high_all = key_ranges(first, last, kv_len, window, CAUSAL, WINDOWED)
    if RANGED:
        there = tile_ranges + batch * ranges_batch + tile * 4
        low = tl.maximum(low, tl.load(there, mask=row < total, other=0)[:, None])
        high = tl.minimum(high, tl.load(there + 1, mask=row < total, other=0)[:, None])
        low_all = tl.maximum(low_all, tl.load(there + 2, mask=row < total, other=0)[:, None])
        high_all = tl.minimum(high_all, tl.load(there + 3, mask=row < total, other=0)[:, None])
    seen_from = tl.maximum(start, low)
    seen_to = tl.minimum(stop, high)
    seen = (block >= 0) & (block < blocks) & (seen_from < seen_to)
    full = (start >= low_all) & (start + L <= high_all)
    if PADDED:
        before = tally + batch[:, None] * (kv_len + 1)
        some = tl.load(before + seen_to, mask=seen, other=0)
        some -= tl.load(before + seen_from, mask=seen, other=0)
        every = tl.load(before + stop, mask=seen, other=0)
        every -= tl.load(before + start, mask=seen, other=0)
        seen = seen & (some > 0)
        full = full & (every == L)
    if SEGMENTED:
        mine = tl.load(
            tile_segments + batch * tile_segments_batch + tile, mask=row < total, other=0
        )
        theirs = block_segments + batch[:, None] * block_segments_batch + block
        full = full & (mine[:, None] == tl.load(theirs, mask=seen, other=0))
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
def program(tiles, kv_heads, CHUNKS: tl.constexpr):
    """Which (batch, kv head, tile, chunk of rows) this program of the query side owns."""
    pid = tl.program_id(0).to(tl.int64)
    chunk = (pid % CHUNKS).to(tl.int32)
    entry = pid // CHUNKS
    tile = (entry % tiles).to(tl.int32)
    pair = entry // tiles
    return entry, pair // kv_heads, (pair % kv_heads).to(tl.int32), tile, chunk


def order_blocks(
    block_indices: torch.Tensor, q_len: int, kv_len: int, site: Site
) -> tuple[torch.Tensor, torch.Tensor]:
    """The lists with whole blocks first, and how many of each kind: int32 [B, Hkv, NT, 2]."""
    ids = block_indices.contiguous()
    batch, kv_heads, tiles, width = ids.shape
    ordered = torch.empty_like(ids)
    counts = ids.new_empty(batch, kv_heads, tiles, 2)
    before = ids if site.valid is None else valid_before(site.valid)
    ranges = tile_segments = block_segments = ids  # not read where there are none
    if site.ranges is not None:
        ranges = _tile_ranges(site.ranges, site.query_tile)
    if site.query_segments is not None and site.key_segments is not None:
        tile_segments = _segments(site.query_segments, site.query_tile, _MIXED_TILE)
        block_segments = _segments(site.key_segments, site.block, _MIXED_BLOCK)
    tables = (ranges, tile_segments, block_segments)
    strides = tuple(0 if len(x) == 1 else x[0].numel() for x in tables)
    padded = triton.next_power_of_2(width)
    per_program = max(1, 128 // padded)
    total = batch * kv_heads * tiles
    _order_blocks[(triton.cdiv(total, per_program),)](
        ids, ordered, counts, before, *tables, total, tiles, kv_heads, q_len, kv_len, site.offset,
        site.window or 0, triton.cdiv(kv_len, site.block), *strides, N=width, N_PAD=padded,
        R=site.query_tile, L=site.block, TILES=per_program, CAUSAL=site.causal,
        WINDOWED=site.window is not None, PADDED=site.valid is not None,
        RANGED=site.ranges is not None, SEGMENTED=site.query_segments is not None, num_warps=1,
    )  # fmt: skip
    return ordered, counts


def _folded(x: torch.Tensor, size: int) -> torch.Tensor:
    """[B, T, ...] -> [B, ceil(T / size), size, ...], the last entry repeated."""
    length = x.shape[1]
    at = torch.arange(-(-length // size) * size, device=x.device).clamp(max=length - 1)
    return x[:, at].unflatten(1, (-1, size))


def _tile_ranges(ranges: torch.Tensor, query_tile: int) -> torch.Tensor:
    """int32 [B or 1, NT, 4]: [low, high) that some query of the tile sees, and that all see."""
    low, high = _folded(ranges, query_tile).unbind(-1)
    bounds = (low.amin(2), high.amax(2), low.amax(2), high.amin(2))
    return torch.stack(bounds, dim=2).to(torch.int32)


def _segments(ids: torch.Tensor, size: int, mixed: int) -> torch.Tensor:
    """int64 [B or 1, ceil(T / size)]: the one segment of each stretch, ``mixed`` if several."""
    folded = _folded(ids, size).long()
    first = folded[:, :, 0]
    return torch.where((folded == first[:, :, None]).all(2), first, mixed)


def launch_for(
    kernel: str, q: torch.Tensor, v: torch.Tensor, group: int, query_tile: int, block: int
) -> Launch:
    """The launch of a kernel, its rows and warps cut to what ``group`` and ``query_tile`` fill."""
    key = kernel, q.element_size() == 2, max(64, padded_dim(max(q.shape[3], v.shape[3])))
    launch = LAUNCHES[key]
    if kernel != "key":
        rows = program_rows(launch.rows, group, query_tile)
        if rows <= 64:
            launch = (FEW if rows <= 16 else SHORT).get(key, launch)
        launch = launch._replace(rows=rows)
        if q.element_size() == 2:
            launch = launch._replace(warps=warps_for(launch, rows))
        if rows < 64:  # too few for the warpgroup's product; its register limit would only spill
            launch = launch._replace(registers=None)
    elif query_tile % launch.rows and group * query_tile >= LEAST_SHORT_ROWS:
        launch = SHORT_KEY.get(key[1:], launch)
    lone = triton.next_power_of_2(block)
    if lone != block:  # not a power of two: a step reads one block, its last lanes masked
        return launch._replace(keys=max(16, lone))
    return launch._replace(keys=min(launch.keys, max(16, _MOST_BLOCKS * block)))


def program_rows(most: int, group: int, query_tile: int) -> int:
    """Rows of a query-side program: all heads of a short tile together, no mostly empty program."""
    rows = max(16, triton.next_power_of_2(group * query_tile))
    if rows <= most:
        return rows
    waste = -(group * query_tile) % most
    return most if waste * 4 <= group * query_tile or most <= 64 else 64


def warps_for(launch: Launch, rows: int) -> int:
    """A warp multiplies at least 16 rows."""
    return max(1, min(launch.warps, rows // 16))


def padded_dim(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))
