"""How tiles of queries read a table of key blocks, a run of tiles at a time, in plain PyTorch.

Queries become tiles [B * Hkv * NT, G * R, D], keys and values tables of blocks [B * Hkv * Ns,
L * D]. Consecutive tiles form a run, whose logits stay in cache. The blocks that a run's tiles read
fall into at most two parts: slots that are gathered, and a stretch of slots that hold neighbouring
blocks in every tile (the local window), which is read in place as one overlapping view.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from nsa_compile.kernels.geometry import Tiling
from nsa_compile.kernels.precision import accumulator
from nsa_compile.kernels.visibility import sees
from nsa_compile.kernels.workers import share_pairs

# Logits of one run for each thread, in elements: 2 MB of float32, an L2 cache.
_LOGITS = 1 << 18
# Shortest stretch worth a matmul of its own.
_LEAST_STRETCH = 3


class Plan:
    """Tiles, block tables and runs of one attention."""

    def __init__(
        self, q: Tensor, k: Tensor, block_indices: Tensor, valid: Tensor | None, tiling: Tiling
    ) -> None:
        self.tiling, self.batch, self.kv_heads = tiling, k.shape[0], k.shape[1]
        self.group = q.shape[1] // k.shape[1]
        self.dtype = accumulator(q.dtype)
        self.valid = None
        if valid is not None and not bool(valid.all()):
            padded = torch.nn.functional.pad(valid, (0, self._short()))
            self.valid = padded.unflatten(1, (tiling.blocks, tiling.block))
        index = without_duplicates(block_indices.long(), tiling.blocks)
        self.whole = self._whole(index).flatten(0, 2)
        self.index = index.flatten(0, 2)
        pairs = torch.arange(self.batch * self.kv_heads).repeat_interleave(tiling.tiles)
        self.table_rows = self.index.clamp(min=0) + (pairs * tiling.blocks)[:, None]

    def tiles(self, x: Tensor) -> Tensor:
        """[B, Hq, Tq, X] -> a fresh [B * Hkv * NT, G * R, X] in the accumulating dtype."""
        tiling, width = self.tiling, x.shape[3]
        tile = tiling.query_tile
        shape = (self.batch, self.kv_heads, tiling.tiles, self.group, tile, width)
        out = torch.empty(shape, dtype=self.dtype)
        by_query = out.movedim(3, 2)
        grouped = x.unflatten(1, (self.kv_heads, self.group))
        whole = tiling.q_len // tile
        split = whole * tile
        by_query[:, :, :, :whole] = grouped[:, :, :, :split].unflatten(3, (whole, tile))
        if split < tiling.q_len:
            by_query[:, :, :, whole, : tiling.q_len - split] = grouped[:, :, :, split:]
            by_query[:, :, :, whole, tiling.q_len - split :] = 0.0
        return out.view(-1, self.group * tile, width)

    def untile(self, x: Tensor) -> Tensor:
        """Inverse of ``tiles``; in memory [B, Tq, Hq, X]."""
        tiling = self.tiling
        shape = (self.batch, self.kv_heads, tiling.tiles, self.group, tiling.query_tile, x.shape[2])
        by_query = x.view(shape).permute(0, 2, 4, 1, 3, 5)
        return by_query.flatten(3, 4).flatten(1, 2)[:, : tiling.q_len].transpose(1, 2)

    def without_padding(self, x: Tensor, at: slice) -> Tensor:
        """[tiles, G * R, X] of a run, in place: rows that complete a last tile become 0."""
        tiling = self.tiling
        short = -tiling.q_len % tiling.query_tile
        if short:
            tile = torch.arange(at.start, at.stop) % tiling.tiles
            (last,) = (tile == tiling.tiles - 1).nonzero(as_tuple=True)
            rows = x.view(len(x), self.group, tiling.query_tile, x.shape[2])
            rows[last, :, tiling.query_tile - short :] = 0.0
        return x

    def blocks(self, x: Tensor) -> Tensor:
        """[B, Hkv, Tk, X] -> [B * Hkv * Ns, L * X] in the accumulating dtype, zeros at the end."""
        x = x.to(self.dtype)
        if self.valid is not None:
            # Padding may hold inf or NaN, which a weight of 0 would not silence.
            seen = self.valid.flatten(1)[:, None, : self.tiling.kv_len, None]
            x = x.where(seen, 0.0)
        if self._short():
            x = torch.nn.functional.pad(x, (0, 0, 0, self._short()))
        return x.reshape(-1, self.tiling.block * x.shape[3])

    def unblock(self, table: Tensor, shape: torch.Size) -> Tensor:
        """Inverse of ``blocks``; in memory [B, Tk, Hkv, X]."""
        by_key = table.view(*shape[:2], -1, shape[3]).transpose(1, 2)
        return by_key[:, : shape[2]].contiguous().transpose(1, 2)

    def share(self, work: Callable[[Iterator[tuple[slice, list[Part]]]], None]) -> None:
        """Call ``work`` on the runs of some (batch, kv head) pairs, until all are done."""
        rows = self.group * self.tiling.query_tile
        logits = self.index.numel() * self.tiling.block * rows
        share_pairs(self.batch * self.kv_heads, logits, lambda pairs: work(self._runs(pairs)))

    def _runs(self, pairs: slice) -> Iterator[tuple[slice, list[Part]]]:
        """Consecutive tiles whose logits fit the workspace, and the parts of what they read."""
        start, stop = pairs.start * self.tiling.tiles, pairs.stop * self.tiling.tiles
        step = self._tiles_of_a_run()
        flags = _Flags(self, slice(start, stop), step)
        workspace = Workspace(self.dtype)
        for run, first in enumerate(range(start, stop, step)):
            at = slice(first, min(first + step, stop))
            yield (
                at,
                [
                    Part(self, workspace, at, slots, stride, flags.masked(run, slots))
                    for slots, stride in flags.split(run)
                ],
            )

    def _tiles_of_a_run(self) -> int:
        keys = self.index.shape[1] * self.tiling.block
        # Small tiles count as 64 queries: there the gathered keys fill the cache, not the logits.
        logits = keys * max(64, self.group * self.tiling.query_tile)
        return max(1, _LOGITS * torch.get_num_threads() // logits)

    def _whole(self, index: Tensor) -> Tensor:
        """bool [B, Hkv, NT, n]: every query of the tile sees every key of the block."""
        tiling = self.tiling
        ranges = [
            tiling.fully_visible_keys(tiling.positions(t, t + 1)) for t in range(tiling.tiles)
        ]
        low, high = torch.tensor(ranges, dtype=torch.int64).view(-1, 2).T[..., None]
        start = index * tiling.block
        whole = (index >= 0) & (start >= low) & (start + tiling.block <= high)
        if self.valid is not None:
            full = self.valid.all(dim=-1)[:, None, None].expand(*index.shape[:3], -1)
            whole &= full.gather(-1, index.clamp(min=0))
        return whole

    def _short(self) -> int:
        """Keys that the last block lacks."""
        return self.tiling.blocks * self.tiling.block - self.tiling.kv_len


class _Flags:
    """What the slots of each run of some tiles need, found for all runs at once."""

    def __init__(self, plan: Plan, tiles: slice, step: int) -> None:
        index, rows = plan.index[tiles], plan.table_rows[tiles]
        self.step = step
        self._used = self._in_runs(index >= 0)
        self._partial = self._in_runs(~plan.whole[tiles])
        self._jumps = self._in_runs(rows.diff(dim=1) != 1)
        self._last = rows[:, -1].tolist()

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

    def masked(self, run: int, slots: slice) -> slice:
        """The slots among ``slots`` that the mask cuts, counted from the first of them."""
        partial = [n for n, cut in enumerate(self._partial[run][slots]) if cut]
        return slice(partial[0], partial[-1] + 1) if partial else slice(0, 0)

    def _in_runs(self, flags: Tensor) -> list[list[bool]]:
        """[tiles, slots] -> for each run, which slots have the flag in any of its tiles."""
        flags = torch.nn.functional.pad(flags, (0, 0, 0, -len(flags) % self.step))
        return flags.unflatten(0, (-1, self.step)).any(dim=1).tolist()


class Workspace:
    """Memory that every run uses again: fresh pages cost more than what is computed in them."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """Uninitialised [shape], the same memory for the same name."""
        size = math.prod(shape)
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers[name] = torch.empty(size, dtype=self.dtype)
        return self._buffers[name][:size].view(shape)


class Part:
    """Some slots of a run: gathered blocks, or (with ``step``) blocks read in place.

    ``step`` is how many blocks further each tile's stretch starts than the tile's before;
    ``masked`` the slots, counted within the part, that some tile does not see whole.
    """

    def __init__(
        self, plan: Plan, workspace: Workspace, at: slice, slots: slice, step: int | None,
        masked: slice,
    ) -> None:  # fmt: skip
        self.plan, self.workspace, self.at = plan, workspace, at
        self.slots, self.step, self.masked = slots, step, masked
        self.rows = plan.table_rows[at, slots].flatten()
        self.first = int(self.rows[0])
        self.keys = (slots.stop - slots.start) * plan.tiling.block

    def read(self, table: Tensor) -> Tensor:
        """[tiles, keys, X]: the tiles' blocks of a block table, until another part is read."""
        block, count = self.plan.tiling.block, self.at.stop - self.at.start
        if self.step is None:
            gathered = self.workspace.take("gathered", len(self.rows), table.shape[1])
            torch.index_select(table, 0, self.rows, out=gathered)
            return gathered.view(count, self.keys, -1)
        width = table.shape[1] // block
        first = self.first * table.shape[1]
        strides = (self.step * table.shape[1], width, 1)
        return table.as_strided((count, self.keys, width), strides, first)

    def scatter_add(self, table: Tensor, left: Tensor, right: Tensor) -> None:
        """Add ``left^T right`` [tiles, keys, X] to what ``read`` would have read.

        Blocks that several tiles read sum up.
        """
        values = self.workspace.take("scattered", len(left), self.keys, right.shape[2])
        torch.bmm(left.transpose(1, 2), right, out=values)
        table.index_add_(0, self.rows, values.view(len(self.rows), -1))

    def product(self, name: str, rows: Tensor, table: Tensor) -> Tensor:
        """[tiles, G * R, keys]: rows of tiles times the blocks of a table, in the workspace."""
        shape = (*rows.shape[:2], self.keys)
        out = self.workspace.take(f"{name} {self.slots.start}", *shape)
        return torch.bmm(rows, self.read(table).transpose(1, 2), out=out)

    def scores(self, queries: Tensor, keys: Tensor) -> Tensor:
        """[tiles, G * R, keys]: masked logits of tiles of queries against a table of keys."""
        scores = self.product("scores", queries, keys)
        if self.masked.stop:
            self._hide(scores)
        return scores

    def _hide(self, scores: Tensor) -> None:
        """Set the logits that the mask forbids to -inf, in the slots that need a mask at all."""
        plan, tiling = self.plan, self.plan.tiling
        index = plan.index[self.at, self.slots][:, self.masked]
        tile = torch.arange(self.at.start, self.at.stop) % tiling.tiles
        if plan.valid is None and self._alike(index, tile):
            index, tile = index[:1], tile[:1]
        rows = tile[:, None] * tiling.query_tile + torch.arange(tiling.query_tile)
        keys = (index * tiling.block)[..., None] + torch.arange(tiling.block)
        seen = sees(rows[:, :, None, None] + tiling.offset, keys[:, None], tiling)
        seen = seen & (index >= 0)[:, None, :, None]
        if plan.valid is not None:
            batch = torch.arange(self.at.start, self.at.stop) // (tiling.tiles * plan.kv_heads)
            seen = seen & plan.valid[batch[:, None], index.clamp(min=0)][:, None]
        shape = (len(scores), plan.group, tiling.query_tile, -1, tiling.block)
        scores.view(shape)[..., self.masked, :].masked_fill_(~seen[:, None], -torch.inf)

    def _alike(self, index: Tensor, tile: Tensor) -> bool:
        """Whether the blocks lie at the same distance from every tile, inside the keys."""
        tiling = self.plan.tiling
        if int(index.min()) < 0 or (int(index.max()) + 1) * tiling.block > tiling.kv_len:
            return False
        distance = tile[:, None] * tiling.query_tile - index * tiling.block
        return bool((distance == distance[:1]).all())


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
