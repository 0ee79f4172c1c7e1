"""Channel statistic and block scores in plain PyTorch, memory linear in T.

Scores are computed for a run of tiles at a time, over the keys those tiles can see, in pieces of
logits that stay in cache; of a piece only the block maxima are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from nsa_compile.kernels import geometry
from nsa_compile.kernels.attend.plan import Workspace
from nsa_compile.kernels.geometry import Tiling
from nsa_compile.kernels.modifiers import Modifiers
from nsa_compile.kernels.precision import accumulator
from nsa_compile.kernels.score.half import bits, block_maxima, narrow_pair, score_dtype
from nsa_compile.kernels.score.logits import Masks, add_alibi_, cap_, softmax_, tile_sum
from nsa_compile.kernels.visibility import Visibility, holds_valid_key, key_bounds
from nsa_compile.kernels.workers import share_pairs

# Logits held at once, in bytes: half of an L2 cache. Twice that takes a tenth longer, half of it
# too.
_PIECE = 1 << 20
# The same of scorer "mean", whose logits are float32: an L2 cache. Half of it takes a third longer.
_MASS = 1 << 21
# Rows (heads of the group x queries) of one run of tiles.
_ROWS = 512
# Elements of q or k squared at once.
_SQUARED = 1 << 17


def channels(q: Tensor, k: Tensor, valid: Tensor | None, num_channels: int) -> Tensor:
    """int32 [B, Hkv, r], ascending: the channels with the largest ``E[q_c^2] * Var[k_c]``."""
    batch, kv_heads, _, dim = k.shape
    queries = q.unflatten(1, (kv_heads, -1))
    strength = k.new_empty(batch, kv_heads, dim, dtype=accumulator(k.dtype))

    def weigh(pairs: slice) -> None:
        for pair in range(pairs.start, pairs.stop):
            entry, head = place = divmod(pair, kv_heads)
            seen = None if valid is None else valid[entry]
            # The mean of q^2 would divide all channels alike.
            energy = _squares(queries[place], None, None)
            strength[place] = energy * _variance(k[entry, head : head + 1], seen)

    share_pairs(batch * kv_heads, q.numel() + k.numel(), weigh)
    order = strength.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :num_channels].sort(dim=-1).values.to(torch.int32)


def _variance(k: Tensor, valid: Tensor | None) -> Tensor:
    """[D]: over the valid keys of k [1, Tk, D]."""
    wide = accumulator(k.dtype)
    if valid is None:
        return _squares(k, k.mean(dim=(0, 1), dtype=wide), None) / k.shape[1]
    count = valid.sum().clamp(min=1)
    mean = k.where(valid[:, None], 0.0).sum(dim=(0, 1), dtype=wide) / count
    return _squares(k, mean, valid) / count


def _squares(x: Tensor, centre: Tensor | None, valid: Tensor | None) -> Tensor:
    """[D]: the squares of ``x - centre`` [H, T, D] summed over H and the valid T.

    A piece at a time, in cache; a product and a sum are faster than a norm or var.
    """
    heads, length, dim = x.shape
    total = x.new_zeros(dim, dtype=accumulator(x.dtype))
    step = max(1, _SQUARED // (heads * dim))
    for at in range(0, length, step):
        part = x[:, at : at + step].to(total.dtype)
        if centre is not None:
            part = part - centre
        if valid is not None:
            # where, not a product: padding may hold anything, inf and NaN included.
            part = part.where(valid[at : at + step, None], 0.0)
        total += (part * part).sum(dim=(0, 1))
    return total


class _Scorer:
    """Mask, modifiers and memory for some pairs: a batch entry and a kv head each."""

    def __init__(
        self, k: Tensor, group: int, visibility: Visibility, modifiers: Modifiers, tiling: Tiling,
        pairs: range,
    ) -> None:  # fmt: skip
        self.group, self.tiling = group, tiling
        self.visibility, self.modifiers = visibility, modifiers
        self.places = [divmod(pair, k.shape[1]) for pair in pairs]
        self.wide, self.workspace = accumulator(k.dtype), Workspace()

    def add_alibi_(self, logits: Tensor, pair: int, query: int, keys: range) -> Tensor:
        """ALiBi as seen from the position ``query``, on logits [keys, G, rows]."""
        at = torch.tensor(query), torch.arange(keys.start, keys.stop, keys.step)
        return add_alibi_(logits, self.modifiers, self.places[pair], *at, self.tiling.kv_len)


class ChannelScorer(_Scorer):
    """Block scores of scorer "channels".

    Padding keys carry a bias of -inf in one more channel. The keys that complete the last block
    repeat its last key, which changes no maximum.
    """

    def __init__(
        self, q: Tensor, k: Tensor, summary: Tensor, visibility: Visibility, modifiers: Modifiers,
        scale: float, tiling: Tiling, pairs: range,
    ) -> None:  # fmt: skip
        super().__init__(k, q.shape[1] // k.shape[1], visibility, modifiers, tiling, pairs)
        kept, length = summary.shape[2], tiling.kv_len
        width = kept + (visibility.valid is not None)
        self.dtype = score_dtype(self.wide, modifiers, self.group * q.shape[2] * length)
        self.masks = Masks(tiling, visibility, self.dtype, self.workspace)
        self.half, self.signed = self.dtype != self.wide, False
        self.undo = [1.0] * len(pairs)
        self.rows = q.new_ones(len(pairs), self.group, q.shape[2], width, dtype=self.dtype)
        self.keys = k.new_zeros(len(pairs), tiling.blocks * tiling.block, width, dtype=self.dtype)
        for pair, (entry, head) in enumerate(self.places):
            picked = summary[entry, head].long()
            heads = q[entry, head * self.group : (head + 1) * self.group]
            queries, keys = _channels_of(heads, picked), _channels_of(k[entry, head], picked)
            queries, keys = queries.to(self.wide), keys.to(self.wide)
            valid = None if visibility.valid is None else visibility.valid[entry]
            if valid is not None:
                # Whatever padding holds, its logit must be -inf and not NaN.
                keys = keys.masked_fill(~valid[:, None], 0.0)
            own = self.keys[pair]
            self._fill(pair, queries, keys, valid, scale, own[:length, :kept])
            if valid is not None:
                own[:length, -1].masked_fill_(~valid, -torch.inf)
            own[length:] = own[length - 1]

    def _fill(
        self, pair: int, queries: Tensor, keys: Tensor, valid: Tensor | None, scale: float,
        own: Tensor,
    ) -> None:  # fmt: skip
        rows = self.rows[pair, ..., : keys.shape[1]]
        if self.half:
            self.undo[pair] = narrow_pair(queries, keys, valid, scale, self.modifiers, rows, own)
        else:
            torch.mul(queries, scale, out=rows)
            own.copy_(keys)

    def run_of_tiles(self) -> int:
        """Tiles to score together."""
        return max(1, _ROWS // (self.group * self.tiling.query_tile))

    def scores(self, first_tile: int, last_tile: int) -> Tensor:
        """[pairs, tiles, Ns] for the tiles ``[first_tile, last_tile)``."""
        tiling, block = self.tiling, self.tiling.block
        shape = (len(self.keys), last_tile - first_tile, tiling.blocks)
        out = self.keys.new_zeros(shape, dtype=self.wide)
        seen, clear = key_bounds(tiling, self.visibility, first_tile, last_tile)
        if seen[0] >= seen[1]:
            return out
        first, stop = seen[0] // block, geometry.num_blocks(seen[1], block)
        whole = tiling.blocks if clear[1] == tiling.kv_len else clear[1] // block
        whole = geometry.num_blocks(clear[0], block), whole
        positions = tiling.positions(first_tile, last_tile)
        queries = self.rows[:, :, positions[0] - tiling.offset : positions[1] - tiling.offset]
        queries = queries.flatten(1, 2).transpose(1, 2)
        step = max(1, _PIECE // (queries.shape[2] * block * self.dtype.itemsize))
        pieces = list(_pieces((first, stop), whole, step))
        for pair, scores in enumerate(out):
            logits, factor = self._best(pair, queries[pair], positions, pieces)
            shares = softmax_(logits, 0, factor).unflatten(1, (self.group, -1))
            scores[:, first:stop] = tile_sum(shares, tiling.query_tile)
        return out

    def _best(
        self, pair: int, columns: Tensor, positions: tuple[int, int],
        pieces: list[tuple[int, int, bool]],
    ) -> tuple[Tensor, float]:  # fmt: skip
        """[blocks, G * rows]: largest logit of each row in each block, -inf if none; their factor.

        Of a pair's ``columns`` [r, G * rows] in the blocks of the pieces.
        """
        shape = (pieces[-1][1] - pieces[0][0], columns.shape[1])
        best = self.workspace.take("best", self.dtype, *shape)
        self._maxima(pair, columns, positions, pieces, best)
        if self.half and not self.signed and self._any_negative(best, pieces):
            # Once seen, looked for: what is scored here would be scored twice each time.
            self.signed = True
            self._maxima(pair, columns, positions, pieces, best)
        factor = self.undo[pair]
        if self.half:
            best = self.workspace.take("wide", self.wide, *shape).copy_(best)
        if self.modifiers.softcap and self.modifiers.slopes is None:
            # Without slopes the cap is monotone and waits for the maxima.
            best, factor = cap_(best.mul_(factor), self.modifiers), 1.0
        return best, factor

    def _maxima(
        self, pair: int, columns: Tensor, positions: tuple[int, int],
        pieces: list[tuple[int, int, bool]], out: Tensor,
    ) -> None:  # fmt: skip
        """Largest logits of a pair's ``columns`` [r, W] in the blocks of the pieces: [.., W]."""
        block, width = self.tiling.block, columns.shape[1]
        first, keys = pieces[0][0], self.keys[pair]
        most = max(end - at for at, end, _ in pieces)
        room = self.workspace.take("logits", self.dtype, most * block, width)
        # The same views serve most pieces: the calls around a piece's two count.
        by_block = bits(room) if self.half else room
        by_block, out = by_block.view(most, block, width), bits(out) if self.half else out
        for at, end, masked in pieces:
            whole = end - at == most
            logits = room if whole else room[: (end - at) * block]
            torch.mm(keys[at * block : end * block], columns, out=logits)
            if masked or self.modifiers.slopes is not None:
                self._modify_(logits, pair, positions, range(at * block, end * block), masked)
            logits = by_block if whole else by_block[: end - at]
            maxima = out[at - first : end - first]
            if self.half:
                block_maxima(logits, maxima, masked or self.signed)
            else:
                torch.amax(logits, dim=1, out=maxima)

    @staticmethod
    def _any_negative(maxima: Tensor, pieces: list[tuple[int, int, bool]]) -> bool:
        """Is a maximum of a piece that no mask cuts negative?"""
        clear = [(at, end) for at, end, masked in pieces if not masked]
        if not clear:
            return False
        first = pieces[0][0]
        seen = maxima[clear[0][0] - first : clear[-1][1] - first]
        return int(bits(seen).amin()) < 0

    def _modify_(
        self, logits: Tensor, pair: int, positions: tuple[int, int], keys: range, masked: bool
    ) -> None:
        by_head = logits.view(len(keys), self.group, -1)
        if self.modifiers.slopes is not None:
            self.add_alibi_(cap_(by_head, self.modifiers), pair, positions[0], keys)
        if masked:
            self.masks.hide_(by_head, self.places[pair][0], positions, keys)


def _channels_of(x: Tensor, picked: Tensor) -> Tensor:
    """The channels ``picked``, ascending, of x [..., T, D]; x itself if that is all of them."""
    if len(picked) == x.shape[-1]:
        return x
    if x.dim() == 2:
        return x.index_select(1, picked)
    # Row by row of one matrix at a time index_select is three times as fast.
    return torch.stack([_channels_of(part, picked) for part in x])


class MeanScorer(_Scorer):
    """Block scores of scorer "mean"; a compressed block stands where its last key stands."""

    def __init__(
        self, q: Tensor, k: Tensor, summary: Tensor, visibility: Visibility, modifiers: Modifiers,
        scale: float, tiling: Tiling, pairs: range, compress_block: int, compress_stride: int,
        importance: str = "overlap",
    ) -> None:  # fmt: skip
        visibility = replace(visibility, query_segments=None, key_segments=None)
        super().__init__(k, q.shape[1] // k.shape[1], visibility, modifiers, tiling, pairs)
        self.length, self.stride, self.importance = compress_block, compress_stride, importance
        self.masks = Masks(tiling, visibility, self.wide, self.workspace)
        self.q = q.unflatten(1, (k.shape[1], self.group))
        self.keys = summary.flatten(0, 1)[pairs.start : pairs.stop].to(self.wide) * scale
        self.holds = None
        if visibility.valid is not None:
            self.holds = holds_valid_key(visibility.valid, self.length, self.stride)

    def run_of_tiles(self) -> int:
        """Tiles to score together."""
        rows = min(_ROWS, _MASS // max(1, self.keys.shape[1] * self.wide.itemsize))
        return max(1, rows // (self.group * self.tiling.query_tile))

    def scores(self, first_tile: int, last_tile: int) -> Tensor:
        """[pairs, tiles, Ns] for the tiles ``[first_tile, last_tile)``."""
        tiling, modifiers = self.tiling, self.modifiers
        out = self.keys.new_zeros(len(self.keys), last_tile - first_tile, tiling.blocks)
        seen, clear = key_bounds(tiling, self.visibility, first_tile, last_tile)
        (first, stop), whole = self._complete(seen), self._complete(clear)
        if first >= stop:
            return out
        positions = tiling.positions(first_tile, last_tile)
        rows = slice(positions[0] - tiling.offset, positions[1] - tiling.offset)
        for pair, (entry, head) in enumerate(self.places):
            columns = self.q[entry, head, :, rows].flatten(0, 1).to(self.wide).T
            shape = (self.keys.shape[1], columns.shape[1])
            logits = self.workspace.take("logits", self.wide, *shape)[: stop - first]
            torch.mm(self.keys[pair, first:stop], columns, out=logits)
            logits = cap_(logits.unflatten(1, (self.group, -1)), modifiers)
            if self.holds is not None:
                hidden = ~self.holds[entry, first:stop]
                logits.masked_fill_(hidden[:, None, None], -torch.inf)
            if modifiers.slopes is not None:
                self.add_alibi_(logits, pair, positions[0], self._last_keys(first, stop))
            for at, end, masked in _pieces((first, stop), whole, stop - first):
                if masked:
                    cut = logits[at - first : end - first]
                    self.masks.hide_(cut, entry, positions, self._last_keys(at, end))
            weight = tile_sum(softmax_(logits, dim=0), tiling.query_tile)
            self._spread(weight, first, out[pair])
        return out

    def _last_keys(self, first: int, stop: int) -> range:
        """The last key of each of the compressed blocks ``[first, stop)``."""
        last = self.length - 1
        return range(last + first * self.stride, last + stop * self.stride, self.stride)

    def _complete(self, keys: tuple[int, int]) -> tuple[int, int]:
        """Compressed blocks whose last key is in the range."""
        first = max(0, -((self.length - 1 - keys[0]) // self.stride))
        count = self.keys.shape[1]
        return first, geometry.complete_compressed(keys[1] - 1, self.length, self.stride, count)

    def _spread(self, weight: Tensor, first: int, out: Tensor) -> None:
        """Add [tiles, columns] compressed-block weights to the blocks that take part of them."""
        sizes = (self.length, self.stride, self.tiling.block, self.importance)
        deltas, phases = geometry.fold_range(*sizes), geometry.fold_weights(*sizes)
        step, before = len(phases) * self.tiling.block // self.stride, -deltas[0]
        last = before + first + weight.shape[1]
        room = -(-out.shape[1] // len(phases)) * step + deltas[-1] + before
        padded = weight.new_zeros(len(weight), max(room, last))
        padded[:, before + first : last] = weight
        if self.importance == "interpolate":
            # The first block's value holds before it, the last one's behind it.
            padded[:, :before] = padded[:, before, None]
            if not self.tiling.causal:
                end = before + self.keys.shape[1]
                padded[:, end:] = padded[:, end - 1, None]
        for phase, pairs in enumerate(phases):
            mine = out[:, phase :: len(phases)]
            for delta, share in pairs:
                start = before + phase * self.tiling.block // self.stride + delta
                columns = padded[:, start : start + (mine.shape[1] - 1) * step + 1 : step]
                mine.add_(columns, alpha=share)


def _pieces(
    units: tuple[int, int], whole: tuple[int, int], step: int
) -> Iterator[tuple[int, int, bool]]:
    """``units`` in runs (first, stop, masked) of at most ``step``; ``whole`` ones need no mask."""
    first = min(max(units[0], whole[0]), units[1])
    stop = min(max(first, whole[1]), units[1])
    for low, high, masked in (
        (units[0], first, True),
        (first, stop, False),
        (stop, units[1], True),
    ):
        for at in range(low, high, step):
            yield at, min(high, at + step), masked
