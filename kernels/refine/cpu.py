"""Exact logits of candidate blocks in plain PyTorch, memory linear in T."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_compile.kernels.geometry import Tiling
from nsa_compile.kernels.precision import accumulator
from nsa_compile.kernels.refine.ranking import best_candidates, forced_candidates
from nsa_compile.kernels.visibility import sees

# Elements of logits alive at once: 16 MB of float32.
_PIECE = 1 << 22


def refine_blocks(
    q: Tensor, k: Tensor, candidates: Tensor, valid: Tensor | None, scale: float, causal: bool,
    offset: int, window: int | None, query_tile: int, block: int, num_selected: int,
    init_blocks: int, local_window: int,
) -> Tensor:  # fmt: skip
    """int32 [B, Hkv, NT, n] out of ``candidates`` [B, Hkv, NT, m]; see the reference."""
    tiling = Tiling(q.shape[2], k.shape[2], causal, offset, window, query_tile, block)
    forced = forced_candidates(
        candidates, q.shape[2], causal, offset, query_tile, block, init_blocks, local_window
    )
    free = candidates.masked_fill(forced, -1)
    scores = torch.zeros(candidates.shape, dtype=accumulator(q.dtype))
    size = q.shape[1] // k.shape[1] * query_tile * block * candidates.shape[3]
    step = max(1, _PIECE // size)
    for batch in range(k.shape[0]):
        for head in range(k.shape[1]):
            pair = _Pair(q, k, valid, batch, head, scale, tiling)
            for first in range(0, tiling.tiles, step):
                tiles = slice(first, min(first + step, tiling.tiles))
                scores[batch, head, tiles] = pair.scores(free[batch, head, tiles], first)
    return best_candidates(candidates, forced, scores, num_selected)


class _Pair:
    """One batch entry and kv head: blocks of keys, tiles of the group's queries."""

    def __init__(
        self, q: Tensor, k: Tensor, valid: Tensor | None, batch: int, head: int, scale: float,
        tiling: Tiling,
    ) -> None:  # fmt: skip
        wide, group = accumulator(q.dtype), q.shape[1] // k.shape[1]
        self.tiling, self.group = tiling, group
        short = tiling.blocks * tiling.block - tiling.kv_len
        keys = torch.nn.functional.pad(k[batch, head].to(wide), (0, 0, 0, short))
        self.keys = keys.unflatten(0, (tiling.blocks, tiling.block))
        rows = q[batch, head * group : (head + 1) * group].to(wide) * scale
        rows = torch.nn.functional.pad(rows, (0, 0, 0, -tiling.q_len % tiling.query_tile))
        self.queries = rows.unflatten(1, (tiling.tiles, tiling.query_tile)).transpose(0, 1)
        self.valid = valid
        if valid is not None:
            self.valid = torch.nn.functional.pad(valid[batch], (0, short))
            self.valid = self.valid.unflatten(0, (tiling.blocks, tiling.block))

    def scores(self, free: Tensor, first_tile: int) -> Tensor:
        """[tiles, m] for the candidates ``free`` [tiles, m] of consecutive tiles; -1 scores 0."""
        tiling = self.tiling
        # Most slots of most tiles are forced: only as many columns as some tile has free ones.
        order = (free < 0).to(torch.int8).sort(dim=1, stable=True).indices
        order = order[:, : max(1, int((free >= 0).sum(dim=1).max()))]
        listed = free.gather(1, order).long()
        index = listed.clamp(min=0)
        queries = self.queries[first_tile : first_tile + len(free)].flatten(1, 2)
        logits = torch.bmm(queries, self.keys[index].flatten(1, 2).transpose(1, 2))
        logits = logits.view(len(free), self.group, tiling.query_tile, -1)
        self._hide(logits, listed, index, first_tile)
        best = logits.unflatten(3, (listed.shape[1], tiling.block)).amax(dim=4)
        weight = torch.softmax(best, dim=3).nan_to_num_(0.0)
        weight = weight.masked_fill_(~self._exist(first_tile, len(free)), 0.0).sum(dim=(1, 2))
        return torch.zeros(free.shape, dtype=weight.dtype).scatter_(1, order, weight)

    def _hide(self, logits: Tensor, listed: Tensor, index: Tensor, first_tile: int) -> None:
        """-inf where a query does not see a key, only in the tiles where that can happen."""
        tiling = self.tiling
        tiles = torch.arange(first_tile, first_tile + len(listed))
        first = tiles[:, None] * tiling.query_tile + tiling.offset
        clear = (listed >= 0) & ((listed + 1) * tiling.block <= tiling.kv_len)
        if tiling.causal:
            clear &= (listed + 1) * tiling.block - 1 <= first
        partial = (~clear).any(dim=1)
        if self.valid is not None or tiling.window is not None:
            partial = torch.ones_like(partial)
        (at,) = partial.nonzero(as_tuple=True)
        if not len(at):
            return
        position = first[at] + torch.arange(tiling.query_tile)
        key = index[at][..., None] * tiling.block + torch.arange(tiling.block)
        seen = sees(position[:, :, None], key.flatten(1)[:, None], tiling)
        keep = (listed[at] >= 0).repeat_interleave(tiling.block, dim=1)
        if self.valid is not None:
            keep = keep & self.valid[index[at]].flatten(1)
        seen = seen & keep[:, None]
        logits[at] = logits[at].masked_fill_(~seen[:, None], -torch.inf)

    def _exist(self, first_tile: int, tiles: int) -> Tensor:
        """bool [tiles, 1, R, 1]: queries that are not the padding of the last tile."""
        tiling = self.tiling
        query = torch.arange(
            first_tile * tiling.query_tile, (first_tile + tiles) * tiling.query_tile
        )
        return (query < tiling.q_len).view(tiles, 1, tiling.query_tile, 1)
