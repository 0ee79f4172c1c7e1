"""Triton kernel that picks each tile's blocks, and the launcher that scores and picks.

A block's rank key is the bit pattern of its score, which orders like the score because scores are
not negative; 0 is a block the tile does not see, the largest integer a forced one. The n-th largest
key is found by bisection over the 31 bits, ties go to the lower index, and a running count writes
the picked blocks in ascending order: no sort.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from nsa_compile.kernels import geometry
from nsa_compile.kernels.score import triton_kernel as score

SCRATCH_BYTES = 256 << 20  # scores alive at a time; more tiles go in several rounds
WIDEST = 16384  # blocks whose rank keys one program holds in registers

# Warps by number of blocks: 8 rank keys a thread at 1,024 blocks keep a bisection step short.
WARPS = ((512, 1), (2048, 4), (WIDEST, 8))


@triton.jit
def _rank_keys(
    source, before, at, pair, batch, block, first, last, kv_len, window, blocks, count, tiles,
    init_blocks, local_window, PARTS: tl.constexpr, MEAN: tl.constexpr, l: tl.constexpr,
    d: tl.constexpr, L: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    """int32 keys of the blocks ``block`` for the tile at ``at`` whose positions are [first, last]."""
    low = first * 0
    high = low + kv_len - 1
    if CAUSAL:
        high = tl.minimum(high, last)
        near = first - local_window + 1
        far = last
    else:
        near = first - (local_window - 1) // 2
        far = last + local_window // 2
        if WINDOWED:
            high = tl.minimum(high, last + window - 1)
    if WINDOWED:
        low = tl.maximum(low, first - window + 1)
    start = block * L
    stop = tl.minimum(start + L, kv_len)
    seen_from = tl.maximum(start, low)
    seen_to = tl.minimum(stop - 1, high)
    seen = (block < blocks) & (seen_from <= seen_to)
    if PADDED:
        tally = before + batch * (kv_len + 1)
        reals = tl.load(tally + seen_to + 1, mask=seen, other=0)
        reals -= tl.load(tally + seen_from, mask=seen, other=0)
        seen = seen & (reals > 0)
    forced = seen & ((block < init_blocks) | ((start <= far) & (stop - 1 >= near)))
    worth = tl.zeros_like(block).to(tl.float32)
    if MEAN:
        for delta in tl.static_range(-((l - 1) // d), L // d):
            tokens = tl.minimum(delta * d + l, L) - tl.maximum(delta * d, 0)
            c = block * (L // d) + delta
            final = c * d + l - 1
            there = seen & (c >= 0) & (c < count)
            if CAUSAL:
                there = there & (final <= last)
            elif WINDOWED:
                there = there & (final < last + window)
            if WINDOWED:
                there = there & (final > first - window)
            mass = tl.load(source + (pair * tiles + at) * count + c, mask=there, other=0.0)
            worth += mass * (tokens / d)
    else:
        for piece in range(0, PARTS):
            place = ((pair * PARTS + piece) * tiles + at) * blocks + block
            worth += tl.load(source + place, mask=seen & (forced == 0), other=0.0)
    worth = tl.where(worth == worth, tl.minimum(worth, 3.0e38), 0.0)
    key = tl.where(seen, worth.to(tl.int32, bitcast=True) + 1, 0)
    return tl.where(forced, 2147483647, key)


@triton.jit
def _pick_blocks(
    source, before, keys, picked, kv_heads, q_len, kv_len, offset, window, blocks, count, first_tile,
    tiles, all_tiles, init_blocks, local_window, n, PARTS: tl.constexpr, MEAN: tl.constexpr,
    l: tl.constexpr, d: tl.constexpr, R: tl.constexpr, L: tl.constexpr, CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr, N_PAD: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    at = pid % tiles
    pair = pid // tiles
    tile = (at + first_tile).to(tl.int32)
    first = tile * R + offset
    last = tl.minimum(tile * R + R, q_len) - 1 + offset
    lane = tl.arange(0, CHUNK)
    held = tl.zeros([CHUNK], tl.int32)
    strip = keys + pid * CHUNKS * CHUNK
    for chunk in range(0, CHUNKS):
        held = _rank_keys(
            source, before, at, pair, pair // kv_heads, chunk * CHUNK + lane, first, last, kv_len, window,
            blocks, count, tiles, init_blocks, local_window, PARTS, MEAN, l, d, L, CAUSAL, WINDOWED,
            PADDED,
        )  # fmt: skip
        if CHUNKS > 1:
            tl.store(strip + chunk * CHUNK + lane, held)
    if CHUNKS > 1:
        tl.debug_barrier()
    # The largest threshold in [1, 2^31) that n keys reach, or 1 when fewer blocks are seen.
    floor = tl.full([1], 1, tl.int32)
    ceiling = tl.full([1], 2147483647, tl.int32)
    for _ in range(0, 31):
        middle = floor + (ceiling - floor + 1) // 2
        reach = tl.zeros([1], tl.int32)
        for chunk in range(0, CHUNKS):
            if CHUNKS > 1:
                held = tl.load(strip + chunk * CHUNK + lane)
            reach += tl.sum((held >= middle).to(tl.int32), 0)
        enough = reach >= n
        floor = tl.where(enough, middle, floor)
        ceiling = tl.where(enough, ceiling, tl.maximum(middle - 1, floor))
    above = tl.zeros([1], tl.int32)
    for chunk in range(0, CHUNKS):
        if CHUNKS > 1:
            held = tl.load(strip + chunk * CHUNK + lane)
        above += tl.sum((held > floor).to(tl.int32), 0)
    ties = n - above
    out = picked + (pair * all_tiles + tile) * n
    written = tl.zeros([1], tl.int32)
    for chunk in range(0, CHUNKS):
        if CHUNKS > 1:
            held = tl.load(strip + chunk * CHUNK + lane)
        equal = (held == floor).to(tl.int32)
        turn = tl.cumsum(equal, 0) - equal
        keep = ((held > floor) | ((equal > 0) & (turn < ties))).to(tl.int32)
        place = written + tl.cumsum(keep, 0) - keep
        tl.store(out + place, chunk * CHUNK + lane, mask=keep > 0)
        ties -= tl.sum(equal, 0)
        written += tl.sum(keep, 0)
    slot = tl.arange(0, N_PAD)
    tl.store(out + slot, -1, mask=(slot >= written) & (slot < n))


def select_blocks(
    q: torch.Tensor, k: torch.Tensor, summary: torch.Tensor, valid: torch.Tensor | None, scorer: str,
    scale: float, causal: bool, offset: int, window: int | None, query_tile: int, block: int,
    num_selected: int, init_blocks: int, local_window: int, compress_block: int, compress_stride: int,
) -> torch.Tensor:  # fmt: skip
    """int32 [B, Hkv, NT, n], ascending, -1 padded: the blocks each tile reads.

    Raises:
        ValueError: when the forced blocks do not fit into ``num_selected``.
    """
    batch, kv_heads, kv_len, _ = k.shape
    q_len = q.shape[2]
    geometry.check_budget(
        num_selected, query_tile, q_len, kv_len, offset, causal, window, init_blocks, local_window, block
    )
    tiles, blocks = geometry.num_tiles(q_len, query_tile), geometry.num_blocks(kv_len, block)
    picked = torch.empty(batch, kv_heads, tiles, num_selected, dtype=torch.int32, device=q.device)
    if picked.numel() == 0:
        return picked
    if blocks == 0:
        return picked.fill_(-1)
    before = picked
    if valid is not None:
        before = torch.nn.functional.pad(valid.cumsum(1, dtype=torch.int32), (1, 0))
    sites = (scale, causal, offset, window)
    compressed = scorer == "mean"
    width = blocks
    if compressed:
        width = summary.shape[2]
        some = None
        if valid is not None:
            edges = before.unfold(1, compress_block + 1, compress_stride)
            some = (edges[..., -1] > edges[..., 0]).to(torch.int8).contiguous()
        sums = score.row_sums(q, summary, some, *sites, compress_block, compress_stride) if width else None
    else:
        packed = score.pack_keys(k, summary, valid, block)
    # No compressed key at all: every score is 0, read from nowhere.
    parts = 1 if compressed else score.parts(q, kv_heads, query_tile)
    per_tile = 4 * batch * kv_heads * max(width, 1) * parts
    step = min(tiles, max(1, SCRATCH_BYTES // per_tile))
    for first_tile in range(0, tiles, step):
        here = min(step, tiles - first_tile)
        if not compressed:
            source = score.channel_scores(
                q, packed, summary, valid, kv_len, *sites, query_tile, block, first_tile, here
            )
        elif width:
            source = score.compressed_mass(
                q, summary, some, sums, *sites, query_tile, compress_block, compress_stride, first_tile,
                here,
            )  # fmt: skip
        else:
            source = torch.empty(1, dtype=torch.float32, device=q.device)
        chunk = min(WIDEST, triton.next_power_of_2(max(blocks, 32)))
        chunks = triton.cdiv(blocks, chunk)
        programs = batch * kv_heads * here
        keys = picked
        if chunks > 1:
            keys = torch.empty(programs * chunks * chunk, dtype=torch.int32, device=q.device)
        _pick_blocks[(programs,)](
            source, before, keys, picked, kv_heads, q_len, kv_len, offset, window or 0, blocks, width,
            first_tile, here, tiles, init_blocks, local_window, num_selected, PARTS=parts,
            MEAN=compressed, l=compress_block, d=compress_stride, R=query_tile, L=block, CHUNK=chunk,
            CHUNKS=chunks, N_PAD=triton.next_power_of_2(num_selected), CAUSAL=causal,
            WINDOWED=window is not None, PADDED=valid is not None,
            num_warps=next(warps for most, warps in WARPS if chunk <= most),
        )  # fmt: skip
    return picked
