"""Which keys, blocks and compressed blocks belong to which query, in plain integers.

Nothing here looks at a tensor. Ranges are half-open. Query i stands at
position ``p = i + offset``; tile t holds the queries ``[t * R, (t + 1) * R)`` that exist.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch


def num_tiles(q_len: int, query_tile: int) -> int:
    """NT, tiles of ``query_tile`` queries; the last one may be short."""
    return (q_len + query_tile - 1) // query_tile


def num_blocks(kv_len: int, block: int) -> int:
    """Ns, selection blocks of ``block`` keys; the last one may be short."""
    return (kv_len + block - 1) // block


def num_compressed(kv_len: int, block: int, stride: int) -> int:
    """Nc, whole blocks ``[c * stride, c * stride + block)``; lengths may be symbolic."""
    return torch.sym_max(0, (kv_len - block) // stride + 1)


def tile_positions(
    tile: int, query_tile: int, q_len: int, offset: int, count: int = 1
) -> tuple[int, int]:
    """Positions ``[first, stop)`` of the queries of ``count`` tiles from ``tile`` on."""
    stop = min((tile + count) * query_tile, q_len)
    return tile * query_tile + offset, stop + offset


def visible_keys(
    positions: tuple[int, int], causal: bool, window: int | None, kv_len: int
) -> tuple[int, int]:
    """Keys that some position of ``[first, stop)`` may see: causality and the site's window.

    Causal: ``p - window < j <= p``. Otherwise ``|p - j| < window``. Empty ranges have low == high.
    """
    first, stop = positions
    low = 0 if window is None else max(0, first - window + 1)
    high = kv_len
    if causal:
        high = stop
    elif window is not None:
        high = stop - 1 + window
    high = max(0, min(high, kv_len))
    return min(low, high), high


def fully_visible_keys(
    positions: tuple[int, int], causal: bool, window: int | None, kv_len: int
) -> tuple[int, int]:
    """Keys that every position of ``[first, stop)`` sees; low == high when there is none."""
    first, stop = positions
    low = 0 if window is None else max(0, stop - window)
    high = kv_len
    if causal:
        high = first + 1
    elif window is not None:
        high = first + window
    high = max(0, min(high, kv_len))
    return min(low, high), high


def local_keys(positions: tuple[int, int], causal: bool, local_window: int) -> tuple[int, int]:
    """Keys inside the always-read window of some position of ``[first, stop)``; not clipped.

    Causal: ``0 <= p - j < w``. Otherwise the w keys ``p - (w - 1) // 2 <= j <= p + w // 2``.
    """
    first, stop = positions
    if causal:
        return first - local_window + 1, stop
    return first - (local_window - 1) // 2, stop + local_window // 2


def block_range(keys: tuple[int, int], block: int, kv_len: int) -> tuple[int, int]:
    """Blocks that hold a key of the range, clipped to the blocks that exist."""
    low, high = max(keys[0], 0), min(keys[1], kv_len)
    if low >= high:
        return 0, 0
    return low // block, (high - 1) // block + 1


def window_blocks(
    tile: int, query_tile: int, q_len: int, kv_len: int, offset: int, causal: bool,
    local_window: int, block: int,
) -> tuple[int, int]:  # fmt: skip
    """Blocks ``[first, stop)`` that the always-read window of a tile touches."""
    positions = tile_positions(tile, query_tile, q_len, offset)
    return block_range(local_keys(positions, causal, local_window), block, kv_len)


@functools.lru_cache(maxsize=256)
def most_forced_blocks(
    query_tile: int, q_len: int, kv_len: int, offset: int, causal: bool, window: int | None,
    init_blocks: int, local_window: int, block: int,
) -> int:  # fmt: skip
    """Most blocks that any tile must read: the initial ones and those its window touches.

    Exact for keys without padding. Which blocks a tile forces repeats with the least common
    multiple of tile and block, once away from both ends, so only so many tiles are looked at.
    """
    tiles = num_tiles(q_len, query_tile)
    period = block // math.gcd(query_tile, block)
    reach = (local_window + (init_blocks + 2) * block + abs(offset)) // query_tile + period + 2
    crossing = max(0, kv_len - offset) // query_tile
    near = set(range(min(tiles, reach)))
    near |= set(range(max(0, min(tiles, crossing) - reach), min(tiles, crossing + reach)))
    near |= set(range(max(0, tiles - reach), tiles))
    most = 0
    for tile in near:
        positions = tile_positions(tile, query_tile, q_len, offset)
        visible = block_range(visible_keys(positions, causal, window, kv_len), block, kv_len)
        local = block_range(local_keys(positions, causal, local_window), block, kv_len)
        first, stop = max(visible[0], local[0]), min(visible[1], local[1])
        initial = max(0, min(init_blocks, visible[1]) - visible[0])
        doubled = max(0, min(init_blocks, stop) - first) if stop > first else 0
        most = max(most, max(0, stop - first) + initial - doubled)
    return most


def check_budget(
    num_selected: int, query_tile: int, q_len: int, kv_len: int, offset: int, causal: bool,
    window: int | None, init_blocks: int, local_window: int, block: int,
) -> None:  # fmt: skip
    """Refuse a budget that cannot hold the forced blocks.

    Raises:
        ValueError: naming ``num_selected`` and ``local_window``.
    """
    if num_selected >= num_blocks(kv_len, block):
        return
    forced = most_forced_blocks(
        query_tile, q_len, kv_len, offset, causal, window, init_blocks, local_window, block
    )
    if forced > num_selected:
        raise ValueError(
            f"num_selected={num_selected} cannot hold the {forced} blocks of {block} that "
            f"init_blocks={init_blocks} and local_window={local_window} force on a tile of "
            f"{query_tile} queries at offset {offset}; raise num_selected or lower local_window"
        )


def complete_compressed(position: int, block: int, stride: int, count: int) -> int:
    """Compressed blocks ``[0, result)`` of ``count`` that are complete at ``position``."""
    return max(0, min(count, (position + 1 - block) // stride + 1))


def fold_phases(compress_stride: int, block: int) -> int:
    """After how many blocks blocks and strides begin together again."""
    return compress_stride // math.gcd(compress_stride, block)


@functools.lru_cache(maxsize=256)
def fold_weights(
    compress_block: int, compress_stride: int, block: int, importance: str
) -> tuple[tuple[tuple[int, float], ...], ...]:
    """How the probabilities of compressed blocks add up to the score of a selection block.

    Selection block s, the tokens ``[s * L, (s + 1) * L)``, takes ``weight`` of the compressed block
    ``c = s * L // d + delta`` for the pairs (delta, weight) of its phase ``s % fold_phases(d, L)``:

        overlap       |tokens of c inside s| / d
        interpolate   sum over the tokens j of s of max(0, 1 - |j - m_c| / d) / d

    with ``m_c = c * d + (l - 1) / 2`` the centre of c. The paper (arXiv 2502.11089, eq. 9) has the
    first one: weights 1, 2, 2, 2, 1 for delta -1..3 at 32/16/64. The second is what
    native-sparse-attention-pytorch called interpolated_importance_score (commits 6aa5fd8 to
    1798a2c): torch.nn.functional.interpolate(mode="bilinear") to single tokens, then a mean over
    the block; only that its compressed blocks did not overlap, d = l. Before the first centre the
    first block's value holds, as it does there; behind the last one that of the last block, or,
    under causality, it falls to 0 within a stride: the block to come has no probability yet, and
    how long the sequence will be must not matter.
    """
    phases = []
    for phase in range(fold_phases(compress_stride, block)):
        first, pairs = phase * block % compress_stride, []
        for delta in fold_range(compress_block, compress_stride, block, importance):
            start = delta * compress_stride
            if importance == "overlap":
                shared = min(start + compress_block, first + block) - max(start, first)
                worth = max(0, shared) / compress_stride
            else:
                centre = start + (compress_block - 1) / 2
                away = (abs(token - centre) for token in range(first, first + block))
                worth = sum(max(0.0, 1 - x / compress_stride) for x in away) / compress_stride
            if worth > 0:
                pairs.append((delta, worth))
        phases.append(tuple(pairs))
    return tuple(phases)


def fold_range(compress_block: int, compress_stride: int, block: int, importance: str) -> range:
    """Every delta of :func:`fold_weights` that may have a weight."""
    # A block begins at most d - gcd(d, L) tokens behind a compressed one.
    last = 1 + -(-(block - math.gcd(compress_stride, block)) // compress_stride)
    if importance == "overlap":
        return range(-((compress_block - 1) // compress_stride), last)
    return range(-1 - (compress_block - 1) // (2 * compress_stride), last + 1)


@dataclass(frozen=True)
class Tiling:
    """The lengths, mask and block sizes that decide which keys a run of query tiles may see."""

    q_len: int
    kv_len: int
    causal: bool
    offset: int
    window: int | None
    query_tile: int
    block: int

    @property
    def tiles(self) -> int:
        return num_tiles(self.q_len, self.query_tile)

    @property
    def blocks(self) -> int:
        return num_blocks(self.kv_len, self.block)

    def positions(self, first_tile: int, last_tile: int) -> tuple[int, int]:
        """Positions ``[first, stop)`` of the queries of tiles ``[first_tile, last_tile)``."""
        count = last_tile - first_tile
        return tile_positions(first_tile, self.query_tile, self.q_len, self.offset, count)

    def visible_keys(self, positions: tuple[int, int]) -> tuple[int, int]:
        """Keys that some position sees."""
        return visible_keys(positions, self.causal, self.window, self.kv_len)

    def fully_visible_keys(self, positions: tuple[int, int]) -> tuple[int, int]:
        """Keys that every position sees; may be empty."""
        return fully_visible_keys(positions, self.causal, self.window, self.kv_len)
