"""Splits token-granular lists: blocks that neighbouring queries share, and readers of the others.

A group of neighbouring tiles (``Split.together`` of them) is a tile itself for the blocks that all
of them list: the first block, those on the diagonal, and whatever the data make common. Every other
(tile, slot) pair is an entry in the list of the block it names, so that a program can hold one
block and gather its readers. Segments are stretches of tiles of one (batch, kv head) pair; each has
lists of its own, so that what a segment's readers leave behind fits into scratch memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from nsa_compile.kernels.attend.site import Site
from nsa_compile.kernels.triton_site import key_ranges, valid_before


class Sizes(NamedTuple):
    """How the tiles of a pair are cut: everything here depends on shapes alone."""

    pairs: int
    tiles: int  # of one pair
    width: int  # n, slots of a tile
    rows: int  # G * R, rows of a tile
    together: int  # tiles of a group
    segment: int  # tiles of a segment, a multiple of ``together``
    segments: int  # of one pair
    batch: int  # segments that share the scratch memory at one time

    @property
    def entries(self) -> int:
        """Entries of one segment."""
        return self.segment * self.width

    @property
    def groups(self) -> int:
        """Groups of tiles of one pair that hold a tile."""
        return triton.cdiv(self.tiles, self.together)

    def rounds(self) -> list[tuple[int, int]]:
        """First segment and number of segments of each use of the scratch memory."""
        total = self.pairs * self.segments
        return [(at, min(self.batch, total - at)) for at in range(0, total, self.batch)]


class Split(NamedTuple):
    """Shared blocks of each group, and what is left of each tile.

    ``shared`` int32 [B, Hkv, groups, n], -1 where there is none. ``left`` [pairs * segments,
    entries]: the block of each (tile, slot), Ns where it is shared, repeated or seen by nobody.
    ``kept`` int32 [pairs, tiles * n]: shared or not, -1 where repeated or seen by nobody.
    """

    shared: torch.Tensor
    left: torch.Tensor
    kept: torch.Tensor


class Readers(NamedTuple):
    """For every segment and block the entries that read it, ascending, and how they are cut.

    ``entries`` int32 [segments, entries], ``starts`` int32 [segments, Ns + 1] into it;
    ``item_first`` [segments, Ns + 1] the first work item of a block, ``item_block`` [segments,
    items] the block of an item (Ns and more: unused). An item has up to ``piece`` entries.
    """

    entries: torch.Tensor
    starts: torch.Tensor
    item_first: torch.Tensor
    item_block: torch.Tensor
    piece: int

    @property
    def items(self) -> int:
        return self.item_block.shape[1]


def sizes_of(
    block_indices: torch.Tensor, group: int, query_tile: int, entry_bytes: int, scratch: int
) -> Sizes:
    """``entry_bytes``: what one row leaves behind for each entry."""
    batch, kv_heads, tiles, width = block_indices.shape
    rows, pairs = group * query_tile, batch * kv_heads
    # Groups have 128 rows if their queries still lie in one block of 64.
    together = _power_of_2(min(64, _power_of_2(128 // group)) // query_tile)
    tile_bytes = max(1, width * rows * entry_bytes)
    most = max(1, scratch // tile_bytes // together) * together
    segments = triton.cdiv(tiles, most)
    segment = triton.cdiv(triton.cdiv(tiles, segments), together) * together
    segments = triton.cdiv(tiles, segment)
    at_once = max(1, min(pairs * segments, scratch // (tile_bytes * segment)))
    return Sizes(pairs, tiles, width, rows, together, segment, segments, at_once)


def _power_of_2(most: int) -> int:
    """The largest power of two up to ``most``; 1 at least."""
    return 1 << max(0, most.bit_length() - 1)


@triton.jit
def _split_lists(
    ids, shared, left, kept, tally, tiles, kv_heads, groups, q_len, kv_len, offset, window, blocks,
    segment_tiles, N: tl.constexpr, N_PAD: tl.constexpr, R: tl.constexpr, L: tl.constexpr,
    TOGETHER: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PADDED: tl.constexpr,
    KEPT: tl.constexpr,
):  # fmt: skip
    """One group of tiles; groups past the last tile only fill ``left`` up."""
    pid = tl.program_id(0).to(tl.int64)
    group = pid % groups
    pair = pid // groups
    tile = (group * TOGETHER + tl.arange(0, TOGETHER)).to(tl.int32)
    real = tile < tiles
    slot = tl.arange(0, N_PAD)
    row = ids + (pair * tiles + tile.to(tl.int64)) * N
    own = real[:, None] & (slot < N)[None, :]
    block = tl.load(row[:, None] + slot[None, :], mask=own, other=-1)
    first = tile * R + offset
    last = tl.minimum(tile * R + R, q_len) - 1 + offset
    low, high, _, _ = key_ranges(first, last, kv_len, window, CAUSAL, WINDOWED)
    seen_from = tl.maximum(block * L, low[:, None])
    seen_to = tl.minimum(tl.minimum(block * L + L, kv_len), high[:, None])
    seen = (block >= 0) & (block < blocks) & (seen_from < seen_to)
    if PADDED:
        before = tally + (pair // kv_heads) * (kv_len + 1)
        valid = tl.load(before + seen_to, mask=seen, other=0)
        valid -= tl.load(before + seen_from, mask=seen, other=0)
        seen = seen & (valid > 0)
    repeated = tl.zeros([TOGETHER, N_PAD], tl.int32)
    for j in range(0, N):
        other = tl.load(row + j, mask=real, other=-1)[:, None]
        repeated += ((other == block) & (slot > j)[None, :]).to(tl.int32)
    seen = seen & (repeated == 0)
    common = tl.zeros([TOGETHER, N_PAD], tl.int32)
    leader = ids + (pair * tiles + group * TOGETHER) * N
    exists = group * TOGETHER < tiles
    for j in range(0, N):
        candidate = tl.load(leader + j, mask=exists, other=-1)
        equal = (seen & (block == candidate)).to(tl.int32)
        by_all = tl.min(tl.where(real, tl.max(equal, 1), 1)) > 0
        common += tl.where(by_all, equal, 0)
        chosen = tl.where(by_all & exists, candidate, -1)
        tl.store(shared + (pair * groups + group) * N + j, chosen, mask=exists)
    # [pair, segment, tile of the segment] is [pair, tile] with tiles to spare at the end.
    spare = (pair * tl.cdiv(tiles, segment_tiles) * segment_tiles + tile) * N
    rest = tl.where(seen & (common == 0), block, blocks)
    inside = (slot < N)[None, :] & (tile >= 0)[:, None]
    tl.store(left + spare[:, None] + slot[None, :], rest.to(left.dtype.element_ty), mask=inside)
    if KEPT:
        there = kept + (pair * tiles + tile.to(tl.int64)[:, None]) * N + slot[None, :]
        tl.store(there, tl.where(seen, block, -1), mask=own)


def split_lists(
    block_indices: torch.Tensor, q_len: int, kv_len: int, site: Site, sizes: Sizes, kept: bool
) -> Split:
    """``kept`` asks for ``Split.kept``, which only the backward reads."""
    ids = block_indices.contiguous()
    batch, kv_heads, tiles, width = ids.shape
    blocks = triton.cdiv(kv_len, site.block)
    groups = sizes.segments * sizes.segment // sizes.together
    shared = ids.new_empty(batch, kv_heads, groups, width)
    small = torch.int16 if blocks < 2**15 else torch.int32  # halves the passes of a radix sort
    left = ids.new_empty(sizes.pairs * sizes.segments, sizes.entries, dtype=small)
    keep = torch.empty_like(ids) if kept else ids
    _split_lists[(sizes.pairs * groups,)](
        ids, shared, left, keep, ids if site.valid is None else valid_before(site.valid), tiles,
        kv_heads, groups, q_len, kv_len, site.offset, site.window or 0, blocks, sizes.segment,
        N=width, N_PAD=triton.next_power_of_2(width), R=site.query_tile, L=site.block,
        TOGETHER=sizes.together, CAUSAL=site.causal, WINDOWED=site.window is not None,
        PADDED=site.valid is not None, KEPT=kept, num_warps=4,
    )  # fmt: skip
    return Split(shared[:, :, : sizes.groups], left, keep)


def readers_of(left: torch.Tensor, blocks: int, piece: int) -> Readers:
    """Inverts ``Split.left`` without atomics or host synchronisation: a stable sort."""
    segments, entries = left.shape
    chosen, order = left.sort(dim=1, stable=True)
    edges = torch.arange(blocks + 1, device=left.device, dtype=left.dtype)
    starts = torch.searchsorted(chosen, edges.expand(segments, -1).contiguous(), out_int32=True)
    needed = (starts.diff(dim=1) + (piece - 1)) // piece
    item_first = torch.nn.functional.pad(needed.cumsum(1, dtype=torch.int32), (1, 0))
    # A list of c entries takes at most c / piece + 1 items, and an empty one none.
    items = entries // piece + min(blocks, entries)
    item = torch.arange(items, device=left.device, dtype=torch.int32).expand(segments, -1)
    item_block = torch.searchsorted(
        item_first[:, 1:].contiguous(), item.contiguous(), right=True, out_int32=True
    )
    return Readers(order.to(torch.int32), starts, item_first, item_block, piece)
