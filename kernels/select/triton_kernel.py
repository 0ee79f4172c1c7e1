"""Triton kernel that picks each tile's blocks, and the launcher that scores and picks.

A block's rank key is the bit pattern of its score, which orders like the score because scores are
not negative; 0 is a block the tile does not see, the largest integer a forced one. The n-th largest
key is found by bisection, which stops once n keys are told from the rest. Ties go to the lower
index, and a running count writes the picked blocks in ascending order: no sort.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from nsa_compile.kernels import geometry
from nsa_compile.kernels.geometry import Tiling
from nsa_compile.kernels.modifiers import Modifiers
from nsa_compile.kernels.score import triton_block_scores, triton_mean
from nsa_compile.kernels.score import triton_kernel as channels_scorer
from nsa_compile.kernels.select.triton_visible import seen_and_forced
from nsa_compile.kernels.triton_site import LOG2_E, terms, valid_before
from nsa_compile.kernels.visibility import Visibility, blocks_of_queries, holds_valid_key

SCRATCH_BYTES = 256 << 20  # scores alive at a time; more tiles go in several rounds
WIDEST = 16384  # blocks whose rank keys one program holds in registers
_BEYOND_PADDING = ("RANGED", "SLOPED", "CAPPED")

# Warps by number of blocks. One H100, 1,024 blocks, a list for each of 65,536 tokens and 32 heads,
# scores and choice, ms: 1 warp 12.0, 2 warps 12.3, 4 warps 13.9.
WARPS = ((512, 1), (2048, 2), (WIDEST, 8))


@triton.jit
def _folded_mass(
    mass, block, seen, first, last, window, count, FROM: tl.constexpr, TO: tl.constexpr,
    BETWEEN: tl.constexpr, CB: tl.constexpr, CD: tl.constexpr, L: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """A block's part of the tile's mass on compressed keys; see ``geometry.fold_weights``."""
    worth = tl.zeros_like(block).to(tl.float32)
    for delta in tl.static_range(FROM, TO):
        c = block * L // CD + delta
        lead = block * L - c * CD  # tokens from the start of c to that of the block
        if BETWEEN:
            share = tl.zeros_like(worth)
            for token in range(0, L):
                away = tl.abs((lead + token).to(tl.float32) - (CB - 1) / 2)
                share += tl.maximum(1.0 - away / CD, 0.0)
            c = tl.maximum(c, 0)
            if not CAUSAL:
                c = tl.minimum(c, count - 1)
        else:
            share = tl.maximum(tl.minimum(CB - lead, L) - tl.maximum(-lead, 0), 0).to(tl.float32)
        final = c * CD + CB - 1
        there = seen & (c >= 0) & (c < count)
        if CAUSAL:
            there = there & (final <= last)
        elif WINDOWED:
            there = there & (final < last + window)
        if WINDOWED:
            there = there & (final > first - window)
        worth += tl.load(mass + c, mask=there, other=0.0) * (share / CD)
    return worth


@triton.jit
def _rank_keys(
    source, before, spans, at, pair, batch, block, first, last, kv_len, window, blocks, count,
    tiles, init_blocks, local_window, PARTS: tl.constexpr, MEAN: tl.constexpr, FROM: tl.constexpr,
    TO: tl.constexpr, BETWEEN: tl.constexpr, CB: tl.constexpr, CD: tl.constexpr, L: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PADDED: tl.constexpr, RANGED: tl.constexpr,
):  # fmt: skip
    """int32 keys of the blocks ``block`` for the tile at ``at``."""
    seen, forced = seen_and_forced(
        before, spans, batch, block, first, last, kv_len, window, init_blocks, local_window,
        last - first + 1, L, CAUSAL, WINDOWED, PADDED, RANGED,
    )  # fmt: skip
    if MEAN:
        mass = source + (pair * tiles + at) * count
        worth = _folded_mass(
            mass, block, seen, first, last, window, count, FROM, TO, BETWEEN, CB, CD, L, CAUSAL,
            WINDOWED,
        )  # fmt: skip
    else:
        worth = tl.zeros_like(block).to(tl.float32)
        for piece in range(0, PARTS):
            place = ((pair * PARTS + piece) * tiles + at) * blocks + block
            worth += tl.load(source + place, mask=seen, other=0.0)
    worth = tl.where(worth == worth, tl.minimum(worth, 3.0e38), 0.0)
    key = tl.where(seen, worth.to(tl.int32, bitcast=True) + 1, 0)
    return tl.where(forced, 2147483647, key)


@triton.jit
def _held_keys(held, strip, chunk, lane, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """The keys of a chunk: in registers if there is one chunk, else from scratch memory."""
    if CHUNKS > 1:
        held = tl.load(strip + chunk * CHUNK + lane)
    return held


@triton.jit
def _reach(held, strip, threshold, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """How many keys are at least ``threshold``."""
    lane = tl.arange(0, CHUNK)
    reach = threshold * 0
    for chunk in range(0, CHUNKS):
        held = _held_keys(held, strip, chunk, lane, CHUNK, CHUNKS)
        reach += tl.sum((held >= threshold).to(tl.int32), 0)
    return reach


@triton.jit
def _largest_score(held, strip, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """The largest key of a block that is not forced, at least 1."""
    lane = tl.arange(0, CHUNK)
    largest = tl.full([], 1, tl.int32)
    for chunk in range(0, CHUNKS):
        held = _held_keys(held, strip, chunk, lane, CHUNK, CHUNKS)
        largest = tl.maximum(largest, tl.max(tl.where(held == 2147483647, 1, held), 0))
    return largest


@triton.jit
def _nth_largest(held, strip, n, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """A threshold that n keys reach, else 1, and how many reach it.

    More than n keys reach it only if those at it tie for the last places.
    """
    floor = tl.full([], 1, tl.int32)
    reached = _reach(held, strip, floor, CHUNK, CHUNKS)
    ceiling = floor
    if reached > n:  # above the largest score are the forced blocks alone, which n holds
        ceiling = _largest_score(held, strip, CHUNK, CHUNKS) + 1
    # Keys order like logarithms: the places are mostly decided within four octaves of the largest.
    middle = tl.maximum(ceiling - (1 << 25), floor + 1)
    while floor < ceiling:
        reach = _reach(held, strip, middle, CHUNK, CHUNKS)
        enough = reach >= n
        floor = tl.where(enough, middle, floor)
        reached = tl.where(enough, reach, reached)
        ceiling = tl.where(reach == n, middle, tl.where(enough, ceiling, middle - 1))
        middle = floor + (ceiling - floor + 1) // 2
    return floor, reached


@triton.jit
def _pick_blocks(
    source, before, spans, spans_batch, keys, picked, kv_heads, q_len, kv_len, offset, window,
    blocks, count, first_tile, tiles, all_tiles, init_blocks, local_window, n, PARTS: tl.constexpr,
    MEAN: tl.constexpr, FROM: tl.constexpr, TO: tl.constexpr, BETWEEN: tl.constexpr,
    CB: tl.constexpr, CD: tl.constexpr, R: tl.constexpr, L: tl.constexpr,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, N_PAD: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr, PADDED: tl.constexpr, RANGED: tl.constexpr,
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
    mine = spans + pair // kv_heads * spans_batch + tile.to(tl.int64) * R * 2
    for chunk in range(0, CHUNKS):
        held = _rank_keys(
            source, before, mine, at, pair, pair // kv_heads, chunk * CHUNK + lane, first, last,
            kv_len, window, blocks, count, tiles, init_blocks, local_window, PARTS, MEAN, FROM, TO,
            BETWEEN, CB, CD, L, CAUSAL, WINDOWED, PADDED, RANGED,
        )  # fmt: skip
        if CHUNKS > 1:
            tl.store(strip + chunk * CHUNK + lane, held)
    if CHUNKS > 1:
        tl.debug_barrier()
    threshold, reached = _nth_largest(held, strip, n, CHUNK, CHUNKS)
    ties = n
    if reached > n:
        ties = n - _reach(held, strip, threshold + 1, CHUNK, CHUNKS)
    out = picked + (pair * all_tiles + tile) * n
    written = tl.zeros([1], tl.int32)
    for chunk in range(0, CHUNKS):
        held = _held_keys(held, strip, chunk, lane, CHUNK, CHUNKS)
        keep = (held >= threshold).to(tl.int32)
        if reached > n:
            equal = (held == threshold).to(tl.int32)
            turn = tl.cumsum(equal, 0) - equal
            keep = ((held > threshold) | ((equal > 0) & (turn < ties))).to(tl.int32)
            ties -= tl.sum(equal, 0)
        place = written + tl.cumsum(keep, 0) - keep
        tl.store(out + place, chunk * CHUNK + lane, mask=(keep > 0) & (place < n))
        written += tl.sum(keep, 0)
    slot = tl.arange(0, N_PAD)
    tl.store(out + slot, -1, mask=(slot >= written) & (slot < n))


def select_blocks(
    q: torch.Tensor, k: torch.Tensor, summary: torch.Tensor, visibility: Visibility,
    modifiers: Modifiers, scorer: str, scale: float, causal: bool, offset: int,
    window: int | None, query_tile: int, block: int, num_selected: int, init_blocks: int,
    local_window: int, compress_block: int, compress_stride: int, lse: torch.Tensor | None = None,
    importance: str = "overlap",
) -> torch.Tensor:  # fmt: skip
    """int32 [B, Hkv, NT, n], ascending, -1 padded: the blocks each tile reads.

    ``lse`` are the log-sum-exps of scorer "mean", where they are known.
    """
    batch, kv_heads, kv_len, _ = k.shape
    q_len, pairs = q.shape[2], batch * kv_heads
    tiles, blocks = geometry.num_tiles(q_len, query_tile), geometry.num_blocks(kv_len, block)
    picked = torch.empty(batch, kv_heads, tiles, num_selected, dtype=torch.int32, device=q.device)
    if picked.numel() == 0:
        return picked
    if blocks == 0:
        return picked.fill_(-1)
    valid, ranged = visibility.valid, visibility.ranges is not None
    before = None if valid is None else valid_before(valid)
    spans = picked
    if ranged:
        tiling = Tiling(q_len, kv_len, causal, offset, window, query_tile, block)
        rows = torch.arange(q_len, device=q.device)
        spans = blocks_of_queries(tiling, visibility, rows)
    mean = scorer == "mean"
    site = (scale, causal, offset, window)
    if mean:
        compression = (compress_block, compress_stride)
        mass = _Mass(q, summary, visibility, modifiers, kv_len, site, query_tile, compression, lse)
        group, dim = q.shape[1] // kv_heads, q.shape[3]
        nested = importance == "overlap" and block % compress_stride == 0
        folded = nested and mass.plain and triton_block_scores.fits(group, query_tile, dim)
        score, parts = mass.block_scores(k, block) if folded else mass.scores(), 1
        width = blocks if folded else summary.shape[2]
    else:
        score, parts = _channel_scores(
            q, k, summary, visibility, modifiers, site, query_tile, block
        )
        width, folded = blocks, True
    deltas = geometry.fold_range(compress_block, compress_stride, block, importance)
    step = max(1, SCRATCH_BYTES // (4 * pairs * max(width, 1) * parts))
    for first_tile in range(0, tiles, step):
        here = min(step, tiles - first_tile)
        chunk, chunks = _chunks(blocks, (first_tile + here) * query_tile + offset, causal, block)
        keys = picked
        if chunks > 1:
            keys = picked.new_empty(pairs * here * chunks * chunk)
        _pick_blocks[(pairs * here,)](
            score(first_tile, here), picked if before is None else before, spans,
            spans.stride(0) if ranged and len(spans) > 1 else 0, keys, picked, kv_heads, q_len,
            kv_len, offset, window or 0, blocks, width, first_tile, here, tiles, init_blocks,
            local_window, num_selected, PARTS=parts, MEAN=not folded, FROM=deltas.start,
            TO=deltas.stop, BETWEEN=importance == "interpolate", CB=compress_block,
            CD=compress_stride, R=query_tile, L=block, CHUNK=chunk, CHUNKS=chunks,
            N_PAD=triton.next_power_of_2(num_selected), CAUSAL=causal, WINDOWED=window is not None,
            PADDED=valid is not None, RANGED=ranged,
            num_warps=next(w for most, w in WARPS if chunk <= most),
        )  # fmt: skip
    return picked


def _chunks(blocks: int, stop: int, causal: bool, block: int) -> tuple[int, int]:
    """Keys of a chunk and chunks, of the blocks that queries before position ``stop`` may see."""
    widest = min(WIDEST, triton.next_power_of_2(max(blocks, 32)))
    seen = min(blocks, max(1, triton.cdiv(stop, block))) if causal else blocks
    # No less than a quarter, for each width is a kernel of its own.
    chunk = min(widest, max(32, widest // 4, triton.next_power_of_2(seen)))
    return chunk, triton.cdiv(seen, chunk)


Site = tuple[float, bool, int, "int | None"]


def _channel_scores(
    q: torch.Tensor, k: torch.Tensor, chosen: torch.Tensor, visibility: Visibility,
    modifiers: Modifiers, site: Site, query_tile: int, block: int,
) -> tuple[Callable[[int, int], torch.Tensor], int]:  # fmt: skip
    """Scores of the tiles from a first one on, in how many parts."""
    sloped = modifiers.slopes is not None
    packed = channels_scorer.pack_keys(k, chosen, visibility.valid, block, modifiers)

    def score(first_tile: int, tiles: int) -> torch.Tensor:
        return channels_scorer.channel_scores(
            q, packed, chosen, visibility, modifiers, k.shape[2], *site, query_tile, block,
            first_tile, tiles,
        )  # fmt: skip

    return score, channels_scorer.parts(q, k.shape[1], query_tile, sloped)


class _Mass:
    """Scorer "mean": probabilities of compressed keys, and what it takes to compute them."""

    def __init__(
        self, q: torch.Tensor, compressed: torch.Tensor, visibility: Visibility,
        modifiers: Modifiers, kv_len: int, site: Site, query_tile: int,
        compression: tuple[int, int], lse: torch.Tensor | None,
    ) -> None:  # fmt: skip
        self.q, self.compressed, self.lse = q, compressed, lse
        self.some = None
        if visibility.valid is not None:
            self.some = holds_valid_key(visibility.valid, *compression).to(torch.int8)
        extra = terms(visibility, modifiers, q)
        # No term but causality and padding.
        self.plain = site[3] is None and not any(extra.flags[name] for name in _BEYOND_PADDING)
        self.mask = (kv_len, extra, *site)
        self.compression, self.query_tile = compression, query_tile

    def shifts(self) -> torch.Tensor:
        """Minus log2 of the softmax denominators, float32 [B, Hq, Tq]; -inf for none."""
        if self.lse is not None and self.plain:
            lse = self.lse.masked_fill(self.lse == -torch.inf, torch.inf)
            return lse.mul_(-LOG2_E).contiguous()
        if self.compressed.shape[2] == 0:
            return self.q.new_full(self.q.shape[:3], -torch.inf, dtype=torch.float32)
        return triton_mean.row_shifts(
            self.q, self.compressed, self.some, *self.mask, *self.compression
        )

    def block_scores(self, k: torch.Tensor, block: int) -> Callable[[int, int], torch.Tensor]:
        """The scores of the blocks for the tiles from a first one on."""
        shifts, blocks = self.shifts(), geometry.num_blocks(k.shape[2], block)

        def score(first_tile: int, tiles: int) -> torch.Tensor:
            return triton_block_scores.block_scores(
                self.q, self.compressed, self.some, shifts, k.shape[1], *self.mask[2:5],
                self.query_tile, block, *self.compression, blocks, first_tile, tiles,
            )  # fmt: skip

        return score

    def scores(self) -> Callable[[int, int], torch.Tensor]:
        """The mass of the tiles from a first one on."""
        if self.compressed.shape[2] == 0:  # every score is 0, and nothing is read
            return lambda first_tile, tiles: self.compressed
        shifts = self.shifts()

        def score(first_tile: int, tiles: int) -> torch.Tensor:
            return triton_mean.compressed_mass(
                self.q, self.compressed, self.some, shifts, *self.mask, self.query_tile,
                *self.compression, first_tile, tiles,
            )  # fmt: skip

        return score
