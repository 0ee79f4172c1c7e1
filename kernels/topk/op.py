"""nsa::topk_blocks: the blocks that hold most of a tile's attention, by the exact softmax.

As much work as dense attention: it says what a better choice could be worth, or supervises one.
The result is flat, int32 [B, Hkv, NT * n], as that of nsa::select_blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nsa_compile.kernels import geometry
from nsa_compile.kernels.autocast import register_autocast
from nsa_compile.kernels.autograd import not_differentiable
from nsa_compile.kernels.precision import accumulator

_lib = torch.library.Library("nsa", "FRAGMENT")
_lib.define(
    "topk_blocks(Tensor q, Tensor k, Tensor? valid, float scale, bool causal, SymInt offset, "
    "int query_tile, int block, int num_selected) -> Tensor"
)
# Logits looked at in one go: memory stays linear in the length.
_AT_ONCE = 1 << 24


def _topk_blocks(
    q: Tensor, k: Tensor, valid: Tensor | None, scale: float, causal: bool, offset: int,
    query_tile: int, block: int, num_selected: int,
) -> Tensor:  # fmt: skip
    batch, q_heads, q_len, _ = q.shape
    kv_len = k.shape[2]
    rows = max(1, _AT_ONCE // max(1, batch * q_heads * kv_len * query_tile)) * query_tile
    found = [
        _best(
            q[:, :, at : at + rows], k, valid, scale, causal, offset + at, query_tile, block,
            num_selected,
        )
        for at in range(0, q_len, rows)
    ]  # fmt: skip
    empty = q.new_empty((batch, k.shape[1], 0), dtype=torch.int32)
    return torch.cat([empty, *found], 2)


def _best(
    q: Tensor, k: Tensor, valid: Tensor | None, scale: float, causal: bool, offset: int,
    query_tile: int, block: int, num_selected: int,
) -> Tensor:  # fmt: skip
    """The same for a few tiles, with all their logits at once."""
    wide, (q_len, kv_len) = accumulator(q.dtype), (q.shape[2], k.shape[2])
    grouped = q.unflatten(1, (k.shape[1], -1)).to(wide)
    logits = scale * grouped @ k[:, :, None].to(wide).transpose(-1, -2)
    keys = torch.arange(kv_len, device=q.device)
    seen = torch.ones(1, q_len, kv_len, dtype=torch.bool, device=q.device)
    if causal:
        seen = seen & (keys <= torch.arange(q_len, device=q.device)[:, None] + offset)
    if valid is not None:
        seen = seen & valid[:, None]
    seen = seen[:, None, None]
    weights = logits.masked_fill(~seen, -torch.inf).softmax(-1).masked_fill(~seen, 0.0)
    shares, visible = (
        _by_block(x, query_tile, block) for x in (weights.sum(2), seen[:, 0].to(wide))
    )
    shares = shares.masked_fill(visible == 0, -1.0)
    count = min(num_selected, shares.shape[-1])
    best = shares.topk(count, dim=-1)
    blocks = best.indices.masked_fill(best.values < 0, -1)
    return F.pad(blocks, (0, num_selected - count), value=-1).flatten(2).to(torch.int32)


def _by_block(x: Tensor, query_tile: int, block: int) -> Tensor:
    """[.., Tq, Tk] -> sums [.., NT, Ns]."""
    padded = F.pad(x, (0, -x.shape[-1] % block, 0, -x.shape[-2] % query_tile))
    return padded.unflatten(-1, (-1, block)).sum(-1).unflatten(-2, (-1, query_tile)).sum(-2)


_lib.impl("topk_blocks", _topk_blocks, "CompositeExplicitAutograd")


@torch.library.register_fake("nsa::topk_blocks", lib=_lib)
def _fake(
    q: Tensor, k: Tensor, valid: Tensor | None, scale: float, causal: bool, offset: int,
    query_tile: int, block: int, num_selected: int,
) -> Tensor:  # fmt: skip
    slots = geometry.num_tiles(q.shape[2], query_tile) * num_selected
    return q.new_empty((k.shape[0], k.shape[1], slots), dtype=torch.int32)


not_differentiable(_lib, "topk_blocks")
register_autocast(_lib, "topk_blocks", "q", "k")
