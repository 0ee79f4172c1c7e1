"""Which keys and blocks a query position sees, as tensors, for the PyTorch kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_compile.kernels.geometry import Tiling, num_compressed


def sees(positions: Tensor, keys: Tensor, tiling: Tiling) -> Tensor:
    """bool: which of ``keys`` each position sees, both broadcast against each other."""
    mask = keys < tiling.kv_len
    if tiling.causal:
        mask = mask & (keys <= positions)
    if tiling.window is not None and tiling.causal:
        mask = mask & (keys > positions - tiling.window)
    elif tiling.window is not None:
        mask = mask & ((positions - keys).abs() < tiling.window)
    return mask


def holds_valid_key(valid: Tensor, block: int, stride: int) -> Tensor:
    """bool [B, Nc]: the compressed block ``[c * stride, c * stride + block)`` holds a valid key."""
    if num_compressed(valid.shape[1], block, stride) == 0:
        return valid[:, :0]
    before = torch.nn.functional.pad(valid.cumsum(dim=1), (1, 0))
    edges = before.unfold(1, block + 1, stride)
    return edges[..., -1] > edges[..., 0]


@dataclass(frozen=True)
class Visibility:
    """The terms of the mask that come as tensors; causality and window are the tiling's.

    ``valid`` bool [B, Tk] hides padding. Query i sees the keys ``ranges[b, i, 0] <= j <
    ranges[b, i, 1]``, int32 [B or 1, Tq, 2]. ``query_segments`` int32 [B or 1, Tq] and
    ``key_segments`` int32 [B or 1, Tk], both or neither: a key is seen where they are equal.
    """

    valid: Tensor | None = None
    ranges: Tensor | None = None
    query_segments: Tensor | None = None
    key_segments: Tensor | None = None

    @property
    def unlimited(self) -> bool:
        """No term hides anything."""
        return self.valid is None and self.ranges is None and self.query_segments is None

    def sees(self, batch: int, queries: Tensor, keys: Tensor) -> Tensor:
        """bool: which of ``keys`` each query sees as far as these terms go, both broadcast.

        Keys past the end are read as the last one: ``sees`` above hides them.
        """
        mask = torch.ones((), dtype=torch.bool, device=keys.device)
        if self.valid is not None:
            mask = mask & self.valid[batch][keys.clamp(0, self.valid.shape[1] - 1)]
        if self.ranges is not None:
            low, high = self.ranges[batch % len(self.ranges)][queries].unbind(-1)
            mask = mask & (keys >= low) & (keys < high)
        if self.query_segments is not None and self.key_segments is not None:
            mine = self.query_segments[batch % len(self.query_segments)][queries]
            theirs = self.key_segments[batch % len(self.key_segments)]
            mask = mask & (mine == theirs[keys.clamp(0, len(theirs) - 1)])
        return mask


def key_bounds(
    tiling: Tiling, visibility: Visibility, first_tile: int, last_tile: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Keys that some query of the tiles may see, and keys that each of them sees but for padding.

    Half-open; low >= high where there are none.
    """
    positions = tiling.positions(first_tile, last_tile)
    some, every = tiling.visible_keys(positions), tiling.fully_visible_keys(positions)
    if visibility.ranges is not None:
        mine = visibility.ranges[:, positions[0] - tiling.offset : positions[1] - tiling.offset]
        low, high = (x.flatten() for x in mine.unbind(-1))
        some = max(some[0], int(low.amin())), min(some[1], int(high.amax()))
        every = max(every[0], int(low.amax())), min(every[1], int(high.amin()))
    return some, every if visibility.query_segments is None else (0, 0)


def whole_keys(tiling: Tiling, visibility: Visibility) -> Tensor:
    """int64 [B or 1, NT, 2]: the keys that every query of a tile sees, but for padding."""
    tiles = range(tiling.tiles)
    every = [tiling.fully_visible_keys(tiling.positions(t, t + 1)) for t in tiles]
    bounds = torch.tensor(every, dtype=torch.int64).view(1, -1, 2)
    if visibility.query_segments is not None:
        return torch.zeros_like(bounds)
    if visibility.ranges is not None:
        # The last tile may be short: its last query then stands for the missing ones.
        rows = torch.arange(tiling.tiles * tiling.query_tile).clamp(max=tiling.q_len - 1)
        low, high = visibility.ranges[:, rows].unflatten(1, (tiling.tiles, -1)).unbind(-1)
        mine = torch.stack((low.amax(dim=2), high.amin(dim=2)), dim=-1)
        bounds = torch.stack(
            (
                torch.maximum(bounds[..., 0], mine[..., 0]),
                torch.minimum(bounds[..., 1], mine[..., 1]),
            ),
            dim=-1,
        )
    return bounds


def visible_blocks(tiling: Tiling, tiles: range, visibility: Visibility) -> Tensor:
    """bool [B or 1, len(tiles), Ns]: some query of the tile sees some valid key of the block.

    Segments are not looked at.
    """
    blocks = torch.arange(tiling.blocks)
    if visibility.ranges is not None:
        start, stop = (p - tiling.offset for p in tiling.positions(tiles.start, tiles.stop))
        # The last tile may be short: its last query then stands for the missing ones.
        rows = torch.arange(start, start + len(tiles) * tiling.query_tile).clamp(max=stop - 1)
        low, high = blocks_of_queries(tiling, visibility, rows)[..., None].unbind(2)
        seen = ((blocks >= low) & (blocks < high)).unflatten(1, (len(tiles), -1)).any(dim=2)
        return seen if visibility.valid is None else seen & _holds_any(visibility.valid, tiling)
    ranges = [tiling.visible_keys(tiling.positions(t, t + 1)) for t in tiles]
    low, high = torch.tensor(ranges, dtype=torch.int64).view(-1, 2).T[..., None]
    start = blocks * tiling.block
    low, high = torch.maximum(low, start), torch.minimum(high, start + tiling.block)
    if visibility.valid is None:
        return (low < high)[None]
    before = torch.nn.functional.pad(visibility.valid.cumsum(dim=1), (1, 0))
    return before[:, torch.maximum(low, high)] > before[:, low]


def blocks_of_queries(tiling: Tiling, visibility: Visibility, rows: Tensor) -> Tensor:
    """int32 [B or 1, rows, 2]: first and past the last block in which a query sees a valid key.

    In a block between the two it sees every valid key. On the device of the rows; segments are not
    looked at.
    """
    assert visibility.ranges is not None
    p = rows + tiling.offset
    low, high = visibility.ranges[:, rows].long().unbind(-1)
    if tiling.causal:
        high = torch.minimum(high, p + 1)
    elif tiling.window is not None:
        high = torch.minimum(high, p + tiling.window)
    if tiling.window is not None:
        low = torch.maximum(low, p - tiling.window + 1)
    low = low.clamp(0, tiling.kv_len)
    high = torch.maximum(high.clamp(max=tiling.kv_len), low)
    alive, last = low < high, high - 1
    if visibility.valid is not None:
        # To the first and the last valid key in between.
        before = torch.nn.functional.pad(visibility.valid.cumsum(dim=1), (1, 0))
        low, high = (x.expand(len(before), -1).contiguous() for x in (low, high))
        counted = before.gather(1, low), before.gather(1, high)
        low = torch.searchsorted(before, counted[0] + 1) - 1
        last = torch.searchsorted(before, counted[1]) - 1
        alive = counted[0] < counted[1]
    bounds = torch.stack((low // tiling.block, last // tiling.block + 1), dim=-1)
    return bounds.where(alive[..., None], 0).to(torch.int32)


def _holds_any(valid: Tensor, tiling: Tiling) -> Tensor:
    """bool [B, 1, Ns]: the block holds a valid key."""
    short = tiling.blocks * tiling.block - tiling.kv_len
    padded = torch.nn.functional.pad(valid, (0, short))
    return padded.unflatten(1, (tiling.blocks, tiling.block)).any(dim=2)[:, None]
