"""How the tiles of one (batch, kv head) pair read its blocks of keys, in plain PyTorch.

The keys of a pair become a table of blocks [Ns, L * D]. Consecutive tiles form a run. The blocks
that a run's tiles read fall into at most two parts: slots that are gathered, and a stretch of slots
that hold neighbouring blocks in every tile (the local window), read in place as one view.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from nsa_compile.kernels.geometry import Tiling
from nsa_compile.kernels.visibility import sees

# Elements of the blocks that one run gathers for each thread: 2 MB of float32, an L2 cache.
_GATHERED = 1 << 19
# Shortest stretch worth a matmul of its own.
_LEAST_STRETCH = 3
_KEPT_MASKS = 16


class Workspace:
    """Memory that every run uses again: fresh pages cost more than what is computed in them."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """Uninitialised [shape], the same memory for the same name."""
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size or buffer.dtype != dtype:
            buffer = self._buffers[name] = torch.empty(size, dtype=dtype)
        return buffer[:size].view(shape)


class Plan:
    """Which blocks the tiles of every pair read, and which of them need a mask.

    ``valid`` becomes None when every key is valid.
    """

    def __init__(self, block_indices: Tensor, valid: Tensor | None, tiling: Tiling) -> None:
        self.tiling, self.workspace = tiling, Workspace()
        self.index = without_duplicates(block_indices.long(), tiling.blocks)
        self.valid = None
        if valid is not None and not bool(valid.all()):
            self.valid = torch.nn.functional.pad(valid, (0, self.short))
            self.valid = self.valid.unflatten(1, (tiling.blocks, tiling.block))
        ranges = [
            tiling.fully_visible_keys(tiling.positions(t, t + 1)) for t in range(tiling.tiles)
        ]
        self.low, self.high = torch.tensor(ranges, dtype=torch.int64).view(-1, 2).T[..., None]
        self._masks: dict[Any, Tensor] = {}

    @property
    def short(self) -> int:
        """Keys that the last block lacks."""
        return self.tiling.blocks * self.tiling.block - self.tiling.kv_len

    def mask(self, key: Any, build: Callable[[], Tensor]) -> Tensor:
        """What ``build`` returns, kept by ``key``: along a diagonal all runs have one mask."""
        if key not in self._masks:
            if len(self._masks) >= _KEPT_MASKS:
                self._masks.clear()
            self._masks[key] = build()
        return self._masks[key]

    def pairs(self) -> Iterator[tuple[int, int, Pair]]:
        """Every batch entry and kv head."""
        for batch, head in itertools.product(*map(range, self.index.shape[:2])):
            yield batch, head, Pair(self, batch, self.index[batch, head])


class Pair:
    """Tiles and block tables of one batch entry and kv head."""

    def __init__(self, plan: Plan, batch: int, index: Tensor) -> None:
        self.plan, self.tiling, self.index = plan, plan.tiling, index
        self.rows = index.clamp(min=0)
        self.valid = None if plan.valid is None else plan.valid[batch]

    def table(self, name: str, x: Tensor, dtype: torch.dtype, width: int | None = None) -> Tensor:
        """[Tk, X] -> [Ns, L * width], in workspace ``name``; what is not there is 0.

        Padding becomes 0 too: it may hold inf or NaN, which a weight of 0 would not silence.
        """
        tiling, width = self.tiling, width or x.shape[1]
        shape = (tiling.blocks * tiling.block, width)
        table = self.plan.workspace.take(name, dtype, *shape)
        table[: tiling.kv_len, : x.shape[1]] = x
        table[: tiling.kv_len, x.shape[1] :] = 0
        table[tiling.kv_len :] = 0
        if self.valid is not None:
            table.masked_fill_(~self.valid.flatten()[:, None], 0)
        return table.view(tiling.blocks, -1)

    def runs(self, width: int) -> Iterator[Run]:
        """Runs of whole tiles; a last tile that is short is a run of its own."""
        tiling = self.tiling
        whole = tiling.q_len // tiling.query_tile
        size = self.index.shape[1] * tiling.block * width
        step = max(1, _GATHERED * torch.get_num_threads() // max(1, size))
        flags = _Flags(self, step)
        for number, first in enumerate(range(0, whole, step)):
            yield Run(self, first, min(first + step, whole), tiling.query_tile, flags, number)
        if whole < tiling.tiles:
            rows = tiling.q_len - whole * tiling.query_tile
            yield Run(self, whole, tiling.tiles, rows, _Flags(self, 1, whole), 0)


class Run:
    """Tiles [first, stop) of ``rows`` queries each, computed together, in parts."""

    def __init__(
        self, pair: Pair, first: int, stop: int, rows: int, flags: _Flags, number: int
    ) -> None:
        self.pair, self.first, self.stop, self.rows = pair, first, stop, rows
        self.tiles = stop - first
        self.parts = [
            Part(self, slots, step, *flags.masked(number, slots))
            for slots, step in flags.split(number)
        ]

    def of(self, x: Tensor) -> Tensor:
        """The run's queries of x [G, Tq, X], a view [tiles, G, rows, X]."""
        start = self.first * self.pair.tiling.query_tile
        mine = x[:, start : start + self.tiles * self.rows]
        return mine.unflatten(1, (self.tiles, self.rows)).transpose(0, 1)


class _Flags:
    """What the slots of each run of ``step`` tiles need, found for all runs at once."""

    def __init__(self, pair: Pair, step: int, first: int = 0) -> None:
        plan, tiling = pair.plan, pair.tiling
        index, self.step = pair.index[first:], step
        start = index * tiling.block
        stop = start + tiling.block
        whole = (index >= 0) & (start >= plan.low[first:]) & (stop <= plan.high[first:])
        if pair.valid is not None:
            whole &= pair.valid.all(dim=1)[pair.rows[first:]]
        self._used = self._in_runs(index >= 0)
        self._cut = self._in_runs(~whole)
        self._jumps = self._in_runs(index.diff(dim=1) != 1)
        self._last = index[:, -1].tolist()
        distance = torch.arange(first, tiling.tiles)[:, None] * tiling.query_tile - start
        begin = distance[torch.arange(len(index)) // step * step]
        odd = (distance != begin) | (index < 0) | (stop > tiling.kv_len)
        self._differ = self._in_runs(odd | (pair.valid is not None))
        self._distance = distance[::step].tolist()

    def split(self, run: int) -> list[tuple[slice, int | None]]:
        """Slots to gather, then the stretch to read in place with its step from tile to tile.

        Slots at the end that all tiles leave empty are left out.
        """
        slots = len(self._used[run])
        if not self._used[run][-1]:
            used = [slot for slot, any_tile in enumerate(self._used[run]) if any_tile]
            return [(slice(0, used[-1] + 1 if used else 1), None)]
        start = slots - 1
        while start > 0 and not self._jumps[run][start - 1]:
            start -= 1
        last = self._last[run * self.step : (run + 1) * self.step]
        steps = {later - earlier for earlier, later in itertools.pairwise(last)} or {0}
        if slots - start < _LEAST_STRETCH or len(steps) > 1 or min(steps) < 0:
            return [(slice(0, slots), None)]
        stretch = (slice(start, slots), steps.pop())
        return [(slice(0, start), None), stretch] if start else [stretch]

    def masked(self, run: int, slots: slice) -> tuple[slice, tuple[int, ...] | None]:
        """The slots among ``slots`` that the mask cuts, counted from the first of them.

        Also how far they lie before each tile's first query, if that is the same for all tiles of
        the run and nothing else cuts them: then one mask serves all.
        """
        cut = [n for n, partly in enumerate(self._cut[run][slots]) if partly]
        if not cut:
            return slice(0, 0), None
        masked = slice(cut[0], cut[-1] + 1)
        if any(self._differ[run][slots][masked]):
            return masked, None
        return masked, tuple(self._distance[run][slots][masked])

    def _in_runs(self, flags: Tensor) -> list[list[bool]]:
        """[tiles, slots] -> for each run, which slots have the flag in any of its tiles."""
        flags = torch.nn.functional.pad(flags, (0, 0, 0, -len(flags) % self.step))
        return flags.unflatten(0, (-1, self.step)).any(dim=1).tolist()


class Part:
    """Some slots of a run: gathered blocks, or (with ``step``) blocks read in place.

    ``step`` is how many blocks further each tile's stretch starts than the tile's before;
    ``masked`` the slots, counted within the part, that some tile does not see whole; ``distance``
    where those lie, when it is the same for all tiles.
    """

    def __init__(
        self, run: Run, slots: slice, step: int | None, masked: slice,
        distance: tuple[int, ...] | None,
    ) -> None:  # fmt: skip
        self.run, self.slots, self.step = run, slots, step
        self.masked, self.distance = masked, distance
        self.plan, self.tiling = run.pair.plan, run.pair.tiling
        self.rows = run.pair.rows[run.first : run.stop, slots].flatten()
        self.keys = (slots.stop - slots.start) * self.tiling.block

    def read(self, name: str, table: Tensor) -> Tensor:
        """[tiles, keys, X]: the tiles' blocks of a table, in workspace ``name`` if gathered."""
        tiles, width = self.run.tiles, table.shape[1] // self.tiling.block
        if self.step is None:
            shape = (len(self.rows), table.shape[1])
            gathered = self.plan.workspace.take(name, table.dtype, *shape)
            torch.index_select(table, 0, self.rows, out=gathered)
            return gathered.view(tiles, self.keys, width)
        first = table.storage_offset() + int(self.rows[0]) * table.shape[1]
        strides = (self.step * table.shape[1], width, 1)
        return table.as_strided((tiles, self.keys, width), strides, first)

    def scatter_add(self, table: Tensor, left: Tensor, right: Tensor) -> None:
        """Add ``left^T right`` [tiles, keys, X] to what ``read`` would have read.

        Blocks that several tiles read sum up.
        """
        shape = (len(left), self.keys, right.shape[2])
        values = self.plan.workspace.take("scattered", right.dtype, *shape)
        torch.bmm(left.transpose(1, 2), right, out=values)
        table.index_add_(0, self.rows, values.view(len(self.rows), -1))

    def product(self, name: str, rows: Tensor, blocks: Tensor) -> Tensor:
        """[tiles, M, keys]: rows [tiles, M, X] times blocks as read, in workspace ``name``."""
        out = self.plan.workspace.take(name, rows.dtype, *rows.shape[:2], self.keys)
        return torch.bmm(rows, blocks.transpose(1, 2), out=out)

    def hide(self, scores: Tensor) -> Tensor:
        """Set logits [tiles, G * rows, keys] that the mask forbids to -inf, in place."""
        if self.masked.stop:
            shape = (self.run.tiles, -1, self.run.rows, self.keys // self.tiling.block)
            by_slot = scores.view(*shape, self.tiling.block)[..., self.masked, :]
            by_slot.masked_fill_(~self._seen()[:, None], -torch.inf)
        return scores

    def bias(self, group: int, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """The mask as what it adds to logits, and the rows that see nothing in this part.

        [tiles or 1, 1, G * rows, keys], None if the mask cuts nothing; bool [tiles or 1, 1,
        G * rows], None if there is no such row.
        """
        if not self.masked.stop:
            return None, None
        if self.distance is None:
            bias = self._bias(group, dtype)
        else:
            key = (self.distance, self.masked.start, self.keys, self.run.rows, group, dtype)
            bias = self.plan.mask(key, lambda: self._bias(group, dtype))
        if self.masked.stop - self.masked.start < self.keys // self.tiling.block:
            return bias, None  # Some slot is seen whole, by every row.
        dead = (bias == -torch.inf).all(dim=-1)
        return bias, dead if bool(dead.any()) else None

    def _bias(self, group: int, dtype: torch.dtype) -> Tensor:
        seen = self._seen()
        tiles, rows, _, block = seen.shape
        bias = torch.zeros(tiles, rows, self.keys // block, block, dtype=dtype)
        bias[:, :, self.masked].masked_fill_(~seen, -torch.inf)
        bias = bias.view(tiles, 1, rows, self.keys)
        return bias.expand(-1, group, -1, -1).reshape(tiles, 1, group * rows, self.keys)

    def _seen(self) -> Tensor:
        """bool [tiles or 1, rows, masked slots, L]; one entry when all tiles have the same."""
        run, tiling = self.run, self.tiling
        stop = run.stop if self.distance is None else run.first + 1
        tile = torch.arange(run.first, stop)
        index = run.pair.index[run.first : stop, self.slots][:, self.masked]
        rows = tile[:, None] * tiling.query_tile + torch.arange(run.rows)
        keys = (index * tiling.block)[..., None] + torch.arange(tiling.block)
        seen = sees(rows[:, :, None, None] + tiling.offset, keys[:, None], tiling)
        seen = seen & (index >= 0)[:, None, :, None]
        if run.pair.valid is not None:
            seen = seen & run.pair.valid[index.clamp(min=0)][:, None]
        # Without causality or a window no query differs from another.
        return seen.expand(-1, run.rows, -1, -1)


def without_duplicates(index: Tensor, blocks: int) -> Tensor:
    """Ascending, each block once, -1 at the end: what select_blocks gives already."""
    later, earlier = index[..., 1:], index[..., :-1]
    in_order = (later == -1) | ((later > earlier) & (earlier >= 0))
    if bool(in_order.all()) and bool((index < blocks).all()) and bool((index >= -1).all()):
        return index
    index = index.masked_fill((index < 0) | (index >= blocks), blocks).sort(dim=-1).values
    again = torch.zeros_like(index, dtype=torch.bool)
    again[..., 1:] = index[..., 1:] == index[..., :-1]
    index = index.masked_fill(again, blocks).sort(dim=-1).values
    return index.masked_fill(index == blocks, -1)
