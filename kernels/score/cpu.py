"""Channel statistic and block scores in plain PyTorch, memory linear in T.

Scores are computed for a run of tiles at a time, over the prefix of keys those tiles can see, in
pieces of logits that stay in cache; of a piece only the block maxima are kept.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from nsa_compile.kernels import geometry
from nsa_compile.kernels.geometry import Tiling
from nsa_compile.kernels.precision import accumulator
from nsa_compile.kernels.visibility import holds_valid_key, sees

# Logits held at once for each thread, in elements: 1 MB of float32, half of an L2 cache. Pieces of
# four times that take a third longer.
_PIECE = 1 << 19
# Rows (heads of the group x queries) of one run of tiles.
_ROWS = 512
_KEPT_MASKS = 16


def channels(q: Tensor, k: Tensor, valid: Tensor | None, num_channels: int) -> Tensor:
    """int32 [B, Hkv, r], ascending: the channels with the largest ``E[q_c^2] * Var[k_c]``."""
    batch, _, _, dim = q.shape
    wide = accumulator(q.dtype)
    energy = _squares(q.to(wide)).view(batch, k.shape[1], -1, dim).mean(dim=2)
    strength = energy * _variance(k.to(wide), valid)
    order = strength.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :num_channels].sort(dim=-1).values.to(torch.int32)


def _variance(k: Tensor, valid: Tensor | None) -> Tensor:
    """[B, Hkv, D]: over the valid keys."""
    if valid is None:
        return _squares(k - k.mean(dim=2, keepdim=True)) / k.shape[2]
    seen = valid[:, None, :, None]
    count = valid.sum(dim=1).clamp(min=1)[:, None, None]
    mean = k.where(seen, 0.0).sum(dim=2) / count
    return (k - mean[:, :, None]).where(seen, 0.0).square_().sum(dim=2) / count


def _squares(x: Tensor) -> Tensor:
    """Sum of squares over dimension 2; a product and a sum are faster than a norm or var here."""
    return (x * x).sum(dim=2)


class ChannelScorer:
    """Block scores of scorer "channels"; ``scores`` gives [pairs, tiles, Ns] for a run of tiles.

    A pair is one batch entry and one kv head. Padding keys carry a bias of -inf in one more
    channel; the keys that complete the last block repeat its last key, which changes no maximum.
    """

    def __init__(
        self, q: Tensor, k: Tensor, summary: Tensor, valid: Tensor | None, scale: float,
        tiling: Tiling,
    ) -> None:  # fmt: skip
        self.tiling = tiling
        wide = accumulator(q.dtype)
        index = summary.long()[:, :, None, :]
        group = q.shape[1] // k.shape[1]
        rows = q.unflatten(1, (k.shape[1], group))
        rows = rows.gather(4, index[:, :, None].expand(*rows.shape[:4], -1)).to(wide) * scale
        keys = k.gather(3, index.expand(*k.shape[:3], -1)).to(wide)
        if valid is not None:
            rows = torch.nn.functional.pad(rows, (0, 1), value=1.0)
            keys = _with_bias(keys, valid)
        short = tiling.blocks * tiling.block - tiling.kv_len
        if short:
            keys = torch.cat((keys, keys[:, :, -1:].expand(-1, -1, short, -1)), dim=2)
        self.rows = rows.flatten(0, 1)
        self.keys = keys.flatten(0, 1)
        self.group = group
        self._logits = torch.empty(0, dtype=wide)
        self._hidden: dict[tuple[int, ...], Tensor] = {}

    def of(self, pairs: slice) -> ChannelScorer:
        """The same for some pairs, with buffers of its own."""
        part = copy.copy(self)
        part.rows, part.keys = self.rows[pairs], self.keys[pairs]
        part._logits, part._hidden = self._logits.new_empty(0), {}
        return part

    def run_of_tiles(self) -> int:
        """Tiles to score together."""
        return max(1, _ROWS // (self.group * self.tiling.query_tile))

    def scores(self, first_tile: int, last_tile: int) -> Tensor:
        tiling, count = self.tiling, last_tile - first_tile
        out = self.keys.new_zeros(self.keys.shape[0], count, tiling.blocks)
        positions = tiling.positions(first_tile, last_tile)
        low, high = tiling.visible_keys(positions)
        first, stop = low // tiling.block, geometry.num_blocks(high, tiling.block)
        if low >= high:
            return out
        start = positions[0] - tiling.offset
        rows = self.rows[:, :, start : start + positions[1] - positions[0]]
        size = self.group * rows.shape[2] * (stop - first) * tiling.block
        for part in _parts(self.keys.shape[0], max(1, _piece() // size)):
            best = self._best(rows[part], self.keys[part], positions, (first, stop))
            weight = torch.softmax(best, dim=1).nan_to_num_(0.0)
            weight = weight.unflatten(2, (self.group, -1)).sum(dim=2)
            out[part, :, first:stop] = _tile_sum(weight, tiling.query_tile).transpose(1, 2)
        return out

    def _best(
        self, rows: Tensor, keys: Tensor, positions: tuple[int, int], blocks: tuple[int, int]
    ) -> Tensor:
        """[pairs, blocks, G * rows]: largest logit of each row in each block, -inf if none."""
        tiling, block = self.tiling, self.tiling.block
        queries = rows.flatten(1, 2).transpose(1, 2)
        best = queries.new_empty(rows.shape[0], blocks[1] - blocks[0], queries.shape[2])
        step = max(1, _piece() // (queries.shape[0] * queries.shape[2] * block))
        for first, stop, masked in _regions(tiling, positions, blocks):
            for at in range(first, stop, step):
                end = min(stop, at + step)
                logits = self._matmul(keys[:, at * block : end * block], queries)
                if masked:
                    logits.unflatten(2, (self.group, -1)).add_(self._bias(positions, (at, end)))
                torch.amax(
                    logits.unflatten(1, (end - at, block)), dim=2,
                    out=best[:, at - blocks[0] : end - blocks[0]],
                )  # fmt: skip
        return best

    def _matmul(self, keys: Tensor, queries: Tensor) -> Tensor:
        shape = (keys.shape[0], keys.shape[1], queries.shape[2])
        size = shape[0] * shape[1] * shape[2]
        if self._logits.numel() < size:
            self._logits = keys.new_empty(size)
        return torch.bmm(keys, queries, out=self._logits[:size].view(shape))

    def _bias(self, positions: tuple[int, int], blocks: tuple[int, int]) -> Tensor:
        """[keys, 1, rows]: 0 where a position sees a key, -inf elsewhere.

        Along the diagonal runs of tiles have the same few masks, so they are kept.
        """
        first, stop = blocks[0] * self.tiling.block, blocks[1] * self.tiling.block
        real = min(stop, self.tiling.kv_len) - first
        place = (positions[0] - first, positions[1] - first, stop - first, real)
        if place not in self._hidden:
            seen = sees(torch.arange(*positions), torch.arange(first, stop)[:, None], self.tiling)
            bias = torch.zeros(seen.shape, dtype=self.rows.dtype).masked_fill_(~seen, -torch.inf)
            if len(self._hidden) >= _KEPT_MASKS:
                self._hidden.clear()
            self._hidden[place] = bias[:, None]
        return self._hidden[place]


class MeanScorer:
    """Block scores of scorer "mean"; ``scores`` gives [pairs, tiles, Ns] for a run of tiles."""

    def __init__(
        self, q: Tensor, k: Tensor, summary: Tensor, valid: Tensor | None, scale: float,
        tiling: Tiling, compress_block: int, compress_stride: int,
    ) -> None:  # fmt: skip
        wide = accumulator(q.dtype)
        self.tiling, self.group = tiling, q.shape[1] // k.shape[1]
        self.length, self.stride = compress_block, compress_stride
        rows = q.unflatten(1, (k.shape[1], self.group)).to(wide) * scale
        keys = summary.to(wide)
        if valid is not None:
            rows = torch.nn.functional.pad(rows, (0, 1), value=1.0)
            keys = _with_bias(keys, holds_valid_key(valid, compress_block, compress_stride))
        self.rows, self.keys = rows.flatten(0, 1), keys.flatten(0, 1)
        self.last = torch.arange(summary.shape[2]) * compress_stride + compress_block - 1

    def of(self, pairs: slice) -> MeanScorer:
        """The same for some pairs."""
        part = copy.copy(self)
        part.rows, part.keys = self.rows[pairs], self.keys[pairs]
        return part

    def run_of_tiles(self) -> int:
        """Tiles to score together."""
        rows = min(_ROWS, 4 * _piece() // max(1, self.keys.shape[1]))
        return max(1, rows // (self.group * self.tiling.query_tile))

    def scores(self, first_tile: int, last_tile: int) -> Tensor:
        tiling, count = self.tiling, last_tile - first_tile
        out = self.keys.new_zeros(self.keys.shape[0], count, tiling.blocks)
        positions = tiling.positions(first_tile, last_tile)
        first, stop = self._complete(tiling.visible_keys(positions))
        if first >= stop:
            return out
        start = positions[0] - tiling.offset
        rows = self.rows[:, :, start : start + positions[1] - positions[0]]
        size = self.group * rows.shape[2] * (stop - first)
        for part in _parts(self.keys.shape[0], max(1, _piece() // size)):
            logits = rows[part].flatten(1, 2) @ self.keys[part, first:stop].transpose(1, 2)
            logits = logits.unflatten(1, (self.group, -1))
            self._hide(logits, positions, (first, stop))
            weight = torch.softmax(logits, dim=-1).nan_to_num_(0.0).sum(dim=1)
            weight = _tile_sum(weight.transpose(1, 2), tiling.query_tile).transpose(1, 2)
            self._spread(weight, first, out[part])
        return out

    def _complete(self, keys: tuple[int, int]) -> tuple[int, int]:
        """Compressed blocks whose last key is in the range."""
        first = max(0, -((self.length - 1 - keys[0]) // self.stride))
        stop = geometry.complete_compressed(keys[1] - 1, self.length, self.stride, len(self.last))
        return first, stop

    def _hide(self, logits: Tensor, positions: tuple[int, int], columns: tuple[int, int]) -> None:
        clear = self._complete(self.tiling.fully_visible_keys(positions))
        clear = max(clear[0], columns[0]), min(clear[1], columns[1])
        edges = (
            [columns] if clear[0] >= clear[1] else [(columns[0], clear[0]), (clear[1], columns[1])]
        )
        rows = torch.arange(*positions)[:, None]
        for low, high in edges:
            if low < high:
                hidden = ~sees(rows, self.last[low:high], self.tiling)
                logits[..., low - columns[0] : high - columns[0]].masked_fill_(hidden, -torch.inf)

    def _spread(self, weight: Tensor, first: int, out: Tensor) -> None:
        """Add [pairs, tiles, columns] compressed-block weights to the blocks they overlap."""
        step = self.tiling.block // self.stride
        pairs = geometry.overlap_weights(self.length, self.stride, self.tiling.block)
        before = -pairs[0][0]
        room = (out.shape[2] - 1) * step + pairs[-1][0] + before + 1
        padded = weight.new_zeros(*weight.shape[:2], max(room, before + first + weight.shape[2]))
        padded[..., before + first : before + first + weight.shape[2]] = weight
        for delta, share in pairs:
            start = before + delta
            columns = padded[..., start : start + (out.shape[2] - 1) * step + 1 : step]
            out.add_(columns, alpha=share)


def _with_bias(keys: Tensor, valid: Tensor) -> Tensor:
    """One more channel: 0 for a valid key, -inf for one that must lose every maximum."""
    bias = torch.zeros_like(valid, dtype=keys.dtype).masked_fill_(~valid, -torch.inf)
    bias = bias[:, None, :, None].expand(*keys.shape[:3], 1)
    # where: whatever padding holds, its logit must be -inf and not NaN.
    return torch.cat((keys.where(valid[:, None, :, None], 0.0), bias), dim=3)


def _piece() -> int:
    return _PIECE * torch.get_num_threads()


def _parts(total: int, size: int) -> list[slice]:
    return [slice(at, min(total, at + size)) for at in range(0, total, size)]


def _regions(
    tiling: Tiling, positions: tuple[int, int], blocks: tuple[int, int]
) -> list[tuple[int, int, bool]]:
    """Split ``blocks`` into runs (first, stop, masked): those every row sees whole need no mask."""
    low, high = tiling.fully_visible_keys(positions)
    first = geometry.num_blocks(low, tiling.block)
    stop = tiling.blocks if high == tiling.kv_len else high // tiling.block
    first, stop = max(first, blocks[0]), min(stop, blocks[1])
    if first >= stop:
        return [(*blocks, True)]
    return [(blocks[0], first, True), (first, stop, False), (stop, blocks[1], True)]


def _tile_sum(weight: Tensor, query_tile: int) -> Tensor:
    """[pairs, X, rows] -> [pairs, X, tiles]: sum over each tile's rows; the last may be short."""
    short = -weight.shape[2] % query_tile
    if short:
        weight = torch.nn.functional.pad(weight, (0, short))
    return weight.unflatten(2, (-1, query_tile)).sum(dim=3)
