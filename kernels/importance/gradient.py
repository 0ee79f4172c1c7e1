"""What a gradient of chosen blocks' importance is to queries and compressed keys.

Importance is the mean over the rows i of a tile t of sum_c w_cb p_ic, where c runs over compressed
blocks. For da_tb of the chosen blocks alone, and the c that those blocks touch::

    p_ic = exp(scale q_i.k_c - lse_i)
    ds_ic = p_ic sum_b w_cb da_tb / rows
    dq_i = scale sum_c ds_ic k_c,  dk_c = scale sum_i ds_ic q_i,  dlse_i = -sum_c ds_ic

What a softmax takes from the compressed blocks that are not touched goes the way of lse. Tiles go
in runs, so memory is linear; nothing is atomic, nothing waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_compile.kernels import geometry
from nsa_compile.kernels.compressed.site import Site
from nsa_compile.kernels.precision import accumulator

# Elements of the gathered keys of one run of tiles, by device: a cache, or enough for a GPU.
_GATHERED = {"cpu": 1 << 20, "cuda": 1 << 26}


@dataclass(frozen=True)
class Choice:
    """How blocks were chosen; the fields are the operator's last arguments."""

    query_tile: int
    block: int
    init_blocks: int
    local_window: int
    importance: str


def backward(
    grad: Tensor, q: Tensor, k_cmp: Tensor, lse: Tensor, block_indices: Tensor, site: Site,
    choice: Choice,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk_cmp, dlse) for ``grad`` and ``block_indices`` [B, Hkv, NT, n]."""
    wide, count = accumulator(q.dtype), site.count(k_cmp.shape[2])
    dq, dlse = torch.zeros_like(q), torch.zeros_like(lse)
    # On the CPU index_put_ adds float32 atomically, in any order, and float64 one by one.
    sums = wide if q.is_cuda else torch.float64
    dk = torch.zeros(k_cmp.shape, dtype=sums, device=q.device)
    if count == 0 or block_indices.numel() == 0:
        return dq, dk.to(k_cmp.dtype), dlse
    keys = k_cmp[:, :, :count].to(wide)
    holds = site.holds(count)
    if holds is not None:  # what stands there may be NaN
        keys = keys.masked_fill(~holds[:, None, :, None], 0.0)
    work = _Work(q, keys, holds, site, choice)
    tiles, tile = block_indices.shape[2], choice.query_tile
    touched = block_indices.shape[0] * k_cmp.shape[1] * block_indices.shape[3] * work.deltas.numel()
    wanted = _GATHERED.get(q.device.type, 1 << 20)
    step = max(1, wanted // max(1, touched * max(q.shape[3], work.group * tile)))
    for first in range(0, tiles, step):
        run = slice(first, min(first + step, tiles))
        rows = slice(run.start * tile, min(run.stop * tile, q.shape[2]))
        index, share = work.touched(block_indices[:, :, run].long(), grad[:, :, run].to(wide), run)
        mine = work.folded(q[:, :, rows].to(wide), 0.0)
        log_sums = work.folded(lse[:, :, rows, None], -torch.inf)
        gathered = work.gather(keys, index)
        ds = work.probabilities(mine, log_sums, gathered, index, run).mul_(share[..., None, :])
        dlse[:, :, rows] = -work.unfolded(ds.sum(-1, keepdim=True), rows)[..., 0]
        ds.mul_(site.scale)
        dq[:, :, rows] = work.unfolded(ds @ gathered, rows).to(q.dtype)
        work.scatter_add(dk, index, ds.transpose(-1, -2) @ mine)
    return dq, dk.to(k_cmp.dtype), dlse


class _Work:
    """Sizes and mask; rows of a tile are its queries head by head, [B, Hkv, tiles, G * R, X]."""

    def __init__(
        self, q: Tensor, keys: Tensor, holds: Tensor | None, site: Site, choice: Choice
    ) -> None:
        self.device, self.site, self.choice = q.device, site, choice
        self.q_len, self.group = q.shape[2], q.shape[1] // keys.shape[1]
        self.kv_heads, self.count, self.holds = *keys.shape[1:3], holds
        sizes = (site.block, site.stride, choice.block, choice.importance)
        deltas = geometry.fold_range(*sizes)
        self.deltas = torch.arange(deltas.start, deltas.stop, device=q.device)
        self.weights = self._weights(keys.dtype)
        self.spans = site.spans(self.count)

    def _weights(self, dtype: torch.dtype) -> Tensor:
        """[phases, deltas]: ``geometry.fold_weights``, as parts of a compressed block's tokens.

        Computed on the device: a copy from the host would wait for it.
        """
        site, block = self.site, self.choice.block
        phases = torch.arange(geometry.fold_phases(site.stride, block), device=self.device)
        first = phases[:, None, None] * block % site.stride
        tokens = torch.arange(block, device=self.device) + first
        starts = self.deltas[:, None] * site.stride
        if self.choice.importance == "overlap":
            inside = (tokens >= starts) & (tokens < starts + site.block)
            return inside.sum(-1).to(dtype) / site.block
        away = (tokens - starts - (site.block - 1) / 2).abs().to(dtype)
        return (1 - away / site.stride).clamp(min=0).sum(-1) / site.stride

    def touched(self, blocks: Tensor, grad: Tensor, run: slice) -> tuple[Tensor, Tensor]:
        """Compressed blocks [B, Hkv, tiles, n * deltas], and each one's part of ``grad``."""
        site, choice = self.site, self.choice
        first = torch.arange(run.start, run.stop, device=self.device) * choice.query_tile
        last = (first + choice.query_tile).clamp(max=self.q_len) - 1
        rows = (last + 1 - first) * self.group
        free = (blocks >= 0) & ~self._forced(blocks, first + site.offset, last + site.offset)
        grad = grad.where(free, 0.0) / rows[:, None]
        named = blocks.clamp(min=0)
        start = torch.div(named * choice.block, site.stride, rounding_mode="floor")
        index = start[..., None] + self.deltas
        share = grad[..., None] * self.weights[named % len(self.weights)]
        if choice.importance == "interpolate":
            index = index.clamp(min=0) if site.causal else index.clamp(0, self.count - 1)
        there = (index >= 0) & (index < self.count)
        return index.clamp(0, self.count - 1).flatten(3), share.where(there, 0.0).flatten(3)

    def _forced(self, blocks: Tensor, first: Tensor, last: Tensor) -> Tensor:
        """Which blocks the tiles at positions ``[first, last]`` read whatever their score."""
        choice, kv_len = self.choice, self.site.kv_len
        assert kv_len is not None
        window = choice.local_window
        if self.site.causal:
            near, far = first - window + 1, last
        else:
            near, far = first - (window - 1) // 2, last + window // 2
        start = blocks * choice.block
        stop = (start + choice.block).clamp(max=kv_len)
        local = (start <= far[:, None]) & (stop > near[:, None])
        return local | (blocks < choice.init_blocks)

    def probabilities(
        self, rows: Tensor, lse: Tensor, keys: Tensor, index: Tensor, run: slice
    ) -> Tensor:
        """[B, Hkv, tiles, G * R, touched]; 0 where the compressed branch sees nothing."""
        tile = self.choice.query_tile
        at = torch.arange(run.start * tile, run.stop * tile, device=self.device)
        at = at.clamp(max=self.q_len - 1)
        if self.spans is not None:
            low, high = self.spans[:, at].unbind(-1)
        else:
            low, high = torch.zeros_like(at)[None], torch.full_like(at, self.count)[None]
            if self.site.causal:
                ends = at + (self.site.offset + 1 - self.site.block)
                complete = torch.div(ends, self.site.stride, rounding_mode="floor") + 1
                high = complete.clamp(0, self.count)[None]
        low, high = (x.unflatten(1, (-1, 1, tile))[:, None, ..., None] for x in (low, high))
        touched = index[:, :, :, None, None]
        seen = (touched >= low) & (touched < high)
        if self.holds is not None:
            holding = self.holds[:, None].expand(-1, self.kv_heads, -1)
            seen = seen & holding.gather(2, index.flatten(2)).view(index.shape)[:, :, :, None, None]
        seen = seen.expand(-1, -1, -1, self.group, -1, -1).flatten(3, 4) & (lse > -torch.inf)
        logits = (rows @ keys.transpose(-1, -2)).mul_(self.site.scale).sub_(lse)
        return logits.masked_fill_(~seen, -torch.inf).exp_()

    def folded(self, x: Tensor, filler: float) -> Tensor:
        """[B, Hq, rows, X] of whole tiles but the last -> [B, Hkv, tiles, G * R, X]."""
        tile = self.choice.query_tile
        short = -x.shape[2] % tile
        if short:
            x = torch.nn.functional.pad(x, (0, 0, 0, short), value=filler)
        x = x.unflatten(2, (-1, tile)).unflatten(1, (self.kv_heads, self.group))
        return x.transpose(2, 3).flatten(3, 4)

    def unfolded(self, x: Tensor, rows: slice) -> Tensor:
        """The reverse, [B, Hq, rows, X]."""
        x = x.unflatten(3, (self.group, self.choice.query_tile)).transpose(2, 3)
        return x.flatten(1, 2).flatten(2, 3)[:, :, : rows.stop - rows.start]

    def gather(self, keys: Tensor, index: Tensor) -> Tensor:
        """[B, Hkv, tiles, touched, D]."""
        flat = index.flatten(2)[..., None].expand(-1, -1, -1, keys.shape[3])
        return keys.gather(2, flat).view(*index.shape, keys.shape[3])

    def scatter_add(self, dk: Tensor, index: Tensor, values: Tensor) -> None:
        """Add ``values`` to the rows that ``gather`` read, in a fixed order on every device."""
        pairs = torch.arange(dk.shape[0] * dk.shape[1], device=self.device)
        rows = index.flatten(0, 1).flatten(1) + pairs[:, None] * dk.shape[2]
        flat = values.reshape(-1, dk.shape[3]).to(dk.dtype)
        dk.view(-1, dk.shape[3]).index_put_((rows.flatten(),), flat, accumulate=True)
