"""Exact logits of candidate blocks in plain PyTorch, memory linear in T."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_compile.kernels.attend.plan import Workspace
from nsa_compile.kernels.geometry import Tiling
from nsa_compile.kernels.modifiers import Modifiers
from nsa_compile.kernels.precision import accumulator
from nsa_compile.kernels.refine.ranking import best_candidates, forced_candidates
from nsa_compile.kernels.score.half import bits, block_maxima, narrow_pair, score_dtype
from nsa_compile.kernels.score.logits import add_alibi_, cap_, softmax_
from nsa_compile.kernels.visibility import Visibility, sees, whole_keys
from nsa_compile.kernels.workers import share_pairs

# Bytes of the keys that a run of tiles gathers; their logits take as much for tiles of 64. With a
# quarter of it the calls of a run cost a fifth more, though less would stay in an L2 cache.
_GATHERED = 1 << 22


def refine_blocks(
    q: Tensor, k: Tensor, candidates: Tensor, visibility: Visibility, modifiers: Modifiers,
    scale: float, causal: bool, offset: int, window: int | None, query_tile: int, block: int,
    num_selected: int, init_blocks: int, local_window: int,
) -> Tensor:  # fmt: skip
    """int32 [B, Hkv, NT, n] out of ``candidates`` [B, Hkv, NT, m]; see the reference."""
    tiling = Tiling(q.shape[2], k.shape[2], causal, offset, window, query_tile, block)
    chosen = candidates.new_empty((*candidates.shape[:3], num_selected), dtype=torch.int32)
    batch, kv_heads = k.shape[:2]
    whole = whole_keys(tiling, visibility)

    def choose(pairs: slice) -> None:
        weighing = _Weighing(q, k, scale, tiling, visibility, modifiers)
        for pair in range(pairs.start, pairs.stop):
            place = divmod(pair, kv_heads)
            mine = candidates[place][None, None]
            forced = forced_candidates(
                mine, q.shape[2], causal, offset, query_tile, block, init_blocks, local_window
            )
            free, order = _free_first(mine.masked_fill(forced, -1)[0, 0])
            cut = _cut_blocks(free, tiling, visibility, place[0], whole)
            shares = weighing.shares(place, free, cut)
            scores = shares.new_zeros(mine.shape[2:]).scatter_(1, order, shares)
            chosen[place] = best_candidates(mine[0, 0], forced[0, 0], scores, num_selected)

    share_pairs(
        batch * kv_heads, batch * q.shape[1] * q.shape[2] * candidates.shape[3] * block, choose
    )
    return chosen


class _Weighing:
    """What the queries of each tile of a pair (batch entry, kv head) give its free candidates."""

    def __init__(
        self, q: Tensor, k: Tensor, scale: float, tiling: Tiling, visibility: Visibility,
        modifiers: Modifiers,
    ) -> None:  # fmt: skip
        self.k, self.scale, self.tiling = k, scale, tiling
        self.visibility, self.modifiers = visibility, modifiers
        self.q = q.unflatten(1, (k.shape[1], -1))
        self.wide = accumulator(q.dtype)
        self.dtype = self._precision()
        rows = tiling.tiles * tiling.query_tile
        # Rows that complete the last tile, and keys that complete the last block, stay 0.
        self._rows = q.new_zeros(self.q.shape[2], rows, q.shape[3], dtype=self.dtype)
        self._keys = q.new_zeros(tiling.blocks * tiling.block, q.shape[3], dtype=self.dtype)
        self._workspace = Workspace()

    def _precision(self) -> torch.dtype:
        """The dtype of the products: what has the last word is not ranked by 8 bits."""
        logits = self.q.shape[2:4].numel() * self.tiling.kv_len
        half = score_dtype(self.wide, self.modifiers, logits)
        return half if half == torch.float16 else self.wide

    def _fill(self, place: tuple[int, int]) -> float:
        """Rows and keys of a pair; what undoes their scaling."""
        q, k = self.q[place].to(self.wide), self.k[place].to(self.wide)
        rows, keys = self._rows[:, : self.tiling.q_len], self._keys[: self.tiling.kv_len]
        if self.dtype == self.wide:
            torch.mul(q, self.scale, out=rows)
            keys.copy_(k)
            return 1.0
        valid = None if self.visibility.valid is None else self.visibility.valid[place[0]]
        if valid is not None:
            k = k.masked_fill(~valid[:, None], 0.0)
        return narrow_pair(q, k, valid, self.scale, self.modifiers, rows, keys)

    def shares(self, place: tuple[int, int], free: Tensor, cut: Tensor) -> Tensor:
        """[NT, m]: what the row that wants a candidate most gives it, of a sum of 1 a row.

        ``free`` [NT, m] ends with -1; ``cut`` says which of them some row does not see whole.
        """
        tiling, (group, _, dim) = self.tiling, self._rows.shape
        undo = self._fill(place)
        columns = self._rows.unflatten(1, (tiling.tiles, -1)).permute(1, 3, 0, 2).flatten(2)
        best = columns.new_full((*free.shape, columns.shape[2]), -torch.inf)
        listed, masked = (free >= 0).sum(dim=1).tolist(), cut.any(dim=1).tolist()
        step = max(1, _GATHERED // (free.shape[1] * tiling.block * dim * self.dtype.itemsize))
        rows = free.clamp(min=0)
        for first in range(0, tiling.tiles, step):
            tiles = slice(first, min(first + step, tiling.tiles))
            slots = max(listed[tiles])
            if slots:
                mine, own = rows[tiles, :slots], best[tiles, :slots]
                logits = self._products(place, mine, columns[tiles], first)
                self._maxima(logits, own)
                if min(listed[tiles]) < slots:
                    own.masked_fill_((free[tiles, :slots] < 0)[..., None], -torch.inf)
                if any(masked[tiles]):
                    at = cut[tiles, :slots].nonzero().unbind(1)
                    hidden = self._hidden(place[0], mine[at], at[0] + first)[:, :, None]
                    seen = logits[at].unflatten(2, (group, -1)).masked_fill_(hidden, -torch.inf)
                    maxima = logits.new_empty(len(seen), *seen.shape[2:])
                    self._maxima(seen.flatten(2), maxima.flatten(1))
                    own[at] = maxima.flatten(1)
        best = best.to(self.wide)
        if self.dtype != self.wide:
            best.mul_(undo)
        if self.modifiers.slopes is None:
            # Without slopes the cap is monotone and waits for the maxima.
            cap_(best, self.modifiers)
        last = best[-1].unflatten(1, (group, -1))
        last[..., tiling.q_len - (tiling.tiles - 1) * tiling.query_tile :] = -torch.inf
        return softmax_(best, dim=1).amax(dim=2)

    def _maxima(self, logits: Tensor, out: Tensor) -> None:
        """Over the keys of the blocks: logits [..., L, W] to out [..., W]."""
        if self.dtype == self.wide:
            torch.amax(logits, dim=-2, out=out)
        else:
            block_maxima(bits(logits), bits(out))

    def _products(
        self, place: tuple[int, int], listed: Tensor, columns: Tensor, first: int
    ) -> Tensor:
        """Logits [tiles, slots, L, G * rows] of listed blocks [tiles, slots], without the mask."""
        tiling, (tiles, slots) = self.tiling, listed.shape
        table, take = self._keys.view(tiling.blocks, -1), self._workspace.take
        keys = take("keys", table.dtype, listed.numel(), table.shape[1])
        torch.index_select(table, 0, listed.flatten(), out=keys)
        keys = keys.view(tiles, -1, columns.shape[1])
        logits = take("logits", table.dtype, tiles, keys.shape[1], columns.shape[2])
        torch.bmm(keys, columns, out=logits)
        if self.modifiers.slopes is not None:
            tile = torch.arange(first, first + tiles)[:, None] * tiling.query_tile + tiling.offset
            number = (listed[..., None] * tiling.block + torch.arange(tiling.block)).flatten(1)
            by_head = cap_(logits, self.modifiers).unflatten(2, (self.q.shape[2], -1))
            add_alibi_(by_head, self.modifiers, place, tile, number, tiling.kv_len)
        return logits.unflatten(1, (slots, -1))

    def _hidden(self, entry: int, blocks: Tensor, tiles: Tensor) -> Tensor:
        """bool [m, L, rows]: keys of the blocks [m] that the rows of the tiles [m] do not see."""
        tiling = self.tiling
        keys = blocks[:, None, None] * tiling.block + torch.arange(tiling.block)[:, None]
        rows = tiles[:, None, None] * tiling.query_tile + torch.arange(tiling.query_tile)
        seen = sees(rows + tiling.offset, keys, tiling)
        return ~(seen & self.visibility.sees(entry, rows.clamp(max=tiling.q_len - 1), keys))


def _cut_blocks(
    free: Tensor, tiling: Tiling, visibility: Visibility, entry: int, whole: Tensor
) -> Tensor:
    """bool [NT, m]: listed blocks that some row of the tile does not see whole."""
    low, high = whole[entry % len(whole), :, :, None].unbind(1)
    start = free * tiling.block
    uncut = (start >= low) & (start + tiling.block <= high)
    if visibility.valid is not None:
        short = tiling.blocks * tiling.block - tiling.kv_len
        valid = torch.nn.functional.pad(visibility.valid[entry], (0, short))
        uncut &= valid.unflatten(0, (tiling.blocks, -1)).all(dim=1)[free.clamp(min=0).long()]
    return (free >= 0) & ~uncut


def _free_first(free: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks [NT, m] ahead of the -1 between them, still ascending, and where each stood.

    As many columns as the tile with the most of them needs.
    """
    order = (free < 0).to(torch.int8).sort(dim=1, stable=True).indices
    width = int((free >= 0).sum(dim=1).amax()) if free.numel() else 0
    order = order[:, : max(1, width)]
    return free.gather(1, order), order
