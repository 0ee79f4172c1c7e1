"""Attention over selected blocks in plain PyTorch, forward and backward, memory linear in T.

Queries become tiles [B * Hkv * NT, G * R, D] and keys blocks [B * Hkv * Ns, L, D]. A run of tiles
gathers its blocks into a buffer and is one batched matmul for the logits and one for the output::

    S = scale * Q K_sel^T,  P = exp(S - max),  lse = max + log(sum P),  O = P V_sel / sum P
    dV_sel = P^T dO,  dS = P * (dO V_sel^T - (sum(dO * O) - dlse)),  dQ = dS K_sel,  dK_sel = dS^T Q
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from nsa_compile.kernels.geometry import Tiling
from nsa_compile.kernels.precision import accumulator
from nsa_compile.kernels.visibility import sees
from torch import Tensor

# Elements of one workspace buffer (8 MB of float32): enough tiles to feed two matmuls.
_WORKSPACE = 1 << 21


def forward(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, valid: Tensor | None, scale: float,
    causal: bool, offset: int, window: int | None, query_tile: int, block: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out [B, Hq, Tq, Dv] in q.dtype, lse float32 [B, Hq, Tq])."""
    tiling = Tiling(q.shape[2], k.shape[2], causal, offset, window, query_tile, block)
    plan = _Plan(q, k, block_indices, valid, tiling)
    queries = plan.tiles(q).mul_(scale)
    keys, values = plan.blocks(k), plan.blocks(v)
    out = queries.new_empty(*queries.shape[:2], v.shape[3])
    lse = queries.new_empty(queries.shape[:2])
    for run in plan.runs():
        chosen = run.gather(keys)
        scores = torch.bmm(queries[run.at], chosen.transpose(1, 2))
        run.hide(scores)
        top = scores.amax(dim=-1, keepdim=True)
        shift = top.masked_fill(top == -torch.inf, 0.0)
        total = scores.sub_(shift).exp_().sum(dim=-1, keepdim=True)
        torch.bmm(scores, run.gather(values), out=out[run.at])
        out[run.at].div_(total.masked_fill(total == 0, 1.0))
        lse[run.at] = (shift + total.log()).squeeze(-1)
    return plan.untile(out).to(q.dtype), plan.untile(lse[..., None]).squeeze(-1)


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
    lse: Tensor, block_indices: Tensor, valid: Tensor | None, scale: float, causal: bool,
    offset: int, window: int | None, query_tile: int, block: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv), contiguous, in the dtypes of q, k and v."""
    tiling = Tiling(q.shape[2], k.shape[2], causal, offset, window, query_tile, block)
    plan = _Plan(q, k, block_indices, valid, tiling)
    queries = plan.tiles(q).mul_(scale)
    keys, values = plan.blocks(k), plan.blocks(v)
    grads = plan.tiles(grad_out)
    delta = (grad_out.to(keys.dtype) * out.to(keys.dtype)).sum(dim=-1, keepdim=True)
    if grad_lse is not None:
        delta = delta - grad_lse[..., None]
    delta = plan.tiles(delta)
    shift = plan.tiles(lse[..., None])
    # A query without keys has lse -inf; its logits are -inf too and must give exp(-inf - 0) = 0.
    shift.masked_fill_(shift == -torch.inf, 0.0)
    dq, dk, dv = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
    for run in plan.runs():
        chosen_keys, chosen_values = run.gather(keys), run.gather(values)
        weights = torch.bmm(queries[run.at], chosen_keys.transpose(1, 2))
        run.hide(weights)
        weights.sub_(shift[run.at]).exp_()
        run.scatter_add(dv, torch.bmm(weights.transpose(1, 2), grads[run.at]))
        dscores = torch.bmm(grads[run.at], chosen_values.transpose(1, 2))
        dscores.sub_(delta[run.at]).mul_(weights)
        torch.bmm(dscores, chosen_keys, out=dq[run.at])
        run.scatter_add(dk, torch.bmm(dscores.transpose(1, 2), queries[run.at]))
    return (
        plan.untile(dq.mul_(scale)).to(q.dtype),
        plan.unblock(dk, k.shape).to(k.dtype),
        plan.unblock(dv, v.shape).to(v.dtype),
    )


class _Plan:
    """Which tile reads which rows of the block table, and which of them need a mask."""

    def __init__(
        self, q: Tensor, k: Tensor, block_indices: Tensor, valid: Tensor | None, tiling: Tiling
    ) -> None:
        self.tiling, self.batch, self.kv_heads = tiling, k.shape[0], k.shape[1]
        self.group = q.shape[1] // k.shape[1]
        self.dtype = accumulator(q.dtype)
        self.valid = None
        if valid is not None and not bool(valid.all()):
            short = tiling.blocks * tiling.block - tiling.kv_len
            padded = torch.nn.functional.pad(valid, (0, short))
            self.valid = padded.unflatten(1, (tiling.blocks, tiling.block))
        index = _without_duplicates(block_indices.long(), tiling.blocks)
        self.whole = self._whole(index).flatten(0, 2)
        self.index = index.flatten(0, 2)
        pairs = torch.arange(self.batch * self.kv_heads).repeat_interleave(tiling.tiles)
        self.table_rows = self.index.clamp(min=0) + (pairs * tiling.blocks)[:, None]

    def tiles(self, x: Tensor) -> Tensor:
        """[B, Hq, Tq, X] -> a fresh [B * Hkv * NT, G * R, X] in the accumulating dtype."""
        tiling, width = self.tiling, x.shape[3]
        shape = (self.batch, self.kv_heads, tiling.tiles, self.group, tiling.query_tile, width)
        out = torch.empty(shape, dtype=self.dtype)
        grouped = x.unflatten(1, (self.kv_heads, self.group)).movedim(2, 3)
        whole = tiling.q_len // tiling.query_tile
        split = whole * tiling.query_tile
        body = grouped[:, :, :split].unflatten(2, (whole, tiling.query_tile)) if whole else None
        if body is not None:
            out[:, :, :whole].copy_(body.movedim(3, 4))
        if split < tiling.q_len:
            out[:, :, whole].zero_()
            out[:, :, whole, :, : tiling.q_len - split] = grouped[:, :, split:].movedim(2, 3)
        return out.view(-1, self.group * tiling.query_tile, width)

    def untile(self, x: Tensor) -> Tensor:
        """Inverse of ``tiles``, contiguous."""
        tiling = self.tiling
        shape = (self.batch, self.kv_heads, tiling.tiles, self.group, tiling.query_tile, -1)
        rows = x.view(shape).movedim(3, 2).flatten(3, 4)[:, :, :, : tiling.q_len]
        return rows.flatten(1, 2).contiguous()

    def blocks(self, x: Tensor) -> Tensor:
        """[B, Hkv, Tk, X] -> [B * Hkv * Ns, L * X] in the accumulating dtype, zeros at the end."""
        tiling = self.tiling
        short = tiling.blocks * tiling.block - tiling.kv_len
        x = x.to(self.dtype)
        if self.valid is not None:
            # Padding may hold inf or NaN, which a weight of 0 would not silence.
            seen = self.valid.flatten(1)[:, None, : tiling.kv_len, None]
            x = x.where(seen, 0.0)
        if short:
            x = torch.nn.functional.pad(x, (0, 0, 0, short))
        return x.reshape(-1, tiling.block * x.shape[3])

    def unblock(self, table: Tensor, shape: torch.Size) -> Tensor:
        """Inverse of ``blocks``, contiguous."""
        return table.view(*shape[:2], -1, shape[3])[:, :, : shape[2]].contiguous()

    def runs(self) -> Iterator[_Run]:
        """Runs of tiles whose workspace stays within bounds."""
        per_tile = self.index.shape[1] * self.tiling.block * max(
            self.group * self.tiling.query_tile, 2 * 64
        )  # fmt: skip
        step = max(1, _WORKSPACE // per_tile)
        for first in range(0, len(self.index), step):
            yield _Run(self, slice(first, min(first + step, len(self.index))))

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


class _Run:
    """Consecutive tiles computed together; slots after the last block that any of them reads go."""

    def __init__(self, plan: _Plan, at: slice) -> None:
        self.plan, self.at = plan, at
        used = (plan.index[at] >= 0).any(dim=0).nonzero()
        self.slots = int(used[-1]) + 1 if len(used) else 1
        self.rows = plan.table_rows[at, : self.slots].flatten()

    def gather(self, table: Tensor) -> Tensor:
        """[tiles, slots * L, X]: the tiles' blocks of a block table."""
        count = self.at.stop - self.at.start
        chosen = table.index_select(0, self.rows)
        return chosen.view(count, self.slots * self.plan.tiling.block, -1)

    def scatter_add(self, table: Tensor, chosen: Tensor) -> None:
        """Add what ``gather`` would have read; blocks that several tiles read sum up."""
        table.index_add_(0, self.rows, chosen.view(len(self.rows), -1))

    def hide(self, scores: Tensor) -> None:
        """Set the logits that the mask forbids to -inf, in the slots that need a mask at all."""
        plan, tiling = self.plan, self.plan.tiling
        partial = (~plan.whole[self.at, : self.slots]).any(dim=0).nonzero().flatten().tolist()
        if not partial:
            return
        slots = slice(partial[0], partial[-1] + 1)
        index = plan.index[self.at, slots]
        tile = torch.arange(self.at.start, self.at.stop) % tiling.tiles
        rows = tile[:, None] * tiling.query_tile + torch.arange(tiling.query_tile)
        keys = (index * tiling.block)[..., None] + torch.arange(tiling.block)
        seen = sees(rows[:, :, None, None] + tiling.offset, keys[:, None], tiling)
        seen = seen & (index >= 0)[:, None, :, None]
        if plan.valid is not None:
            batch = torch.arange(self.at.start, self.at.stop) // (tiling.tiles * plan.kv_heads)
            seen = seen & plan.valid[batch[:, None], index.clamp(min=0)][:, None]
        shape = (len(index), plan.group, tiling.query_tile, self.slots, tiling.block)
        scores.view(shape)[..., slots, :].masked_fill_(~seen[:, None], -torch.inf)


def _without_duplicates(index: Tensor, blocks: int) -> Tensor:
    """Ascending, each block once, -1 at the end: what select_blocks gives already."""
    pairs = index[..., 1:], index[..., :-1]
    if bool(((pairs[0] > pairs[1]) & (pairs[1] >= 0) | (pairs[0] == -1)).all()):
        return index
    index = index.masked_fill((index < 0) | (index >= blocks), blocks).sort(dim=-1).values
    again = torch.zeros_like(index, dtype=torch.bool)
    again[..., 1:] = index[..., 1:] == index[..., :-1]
    index = index.masked_fill(again, blocks).sort(dim=-1).values
    return index.masked_fill(index == blocks, -1)
