"""Straight-through scales of chosen blocks, with explicit matrices: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_compile.kernels.compressed.reference import visible
from nsa_compile.kernels.score.reference import interpolation, overlap


def importance(
    q: Tensor, k_cmp: Tensor, lse: Tensor, valid: Tensor | None, ranges: Tensor | None,
    scale: float, causal: bool, offset: int, compress_block: int, compress_stride: int, kv_len: int,
    query_tile: int, block: int, importance: str,
) -> Tensor:  # fmt: skip
    """[B, Hkv, NT, Ns]: the share of a tile's attention to compressed keys that a block has.

    The mean over the group's heads and the tile's queries of ``sum_c exp(s_ic - lse_i) w_cb``,
    where a compressed block hands out its probability evenly among its tokens, ``w_cb = |c and b| /
    l``, or by the hats that interpolate between centres. The shares of all blocks add up to 1, but
    for what interpolation cuts or repeats at the ends.
    """
    count, blocks, group = k_cmp.shape[2], -(-kv_len // block), q.shape[1] // k_cmp.shape[1]
    sizes = (compress_block, compress_stride)
    seen = visible(q.shape[2], count, valid, ranges, causal, offset, *sizes)[:, None]
    scores = scale * (q @ k_cmp.repeat_interleave(group, 1).transpose(-1, -2))
    alive = seen & (lse > -torch.inf)[..., None]
    p = torch.exp((scores - lse[..., None]).masked_fill(~alive, -torch.inf))
    if importance == "interpolate":
        spread = interpolation(count, blocks, block, *sizes, causal)
    else:
        spread = overlap(count, blocks, block, *sizes) * compress_stride / compress_block
    shares = (p @ spread.to(p.dtype)).unflatten(1, (-1, group)).mean(2)
    return torch.stack([tile.mean(2) for tile in shares.split(query_tile, 2)], 2)


def forced(
    q_len: int, kv_len: int, causal: bool, offset: int, query_tile: int, block: int,
    init_blocks: int, local_window: int,
) -> Tensor:  # fmt: skip
    """bool [NT, Ns]: the blocks that a tile reads whatever their score."""
    distance = torch.arange(q_len)[:, None] + offset - torch.arange(kv_len)
    if causal:
        local = (distance >= 0) & (distance < local_window)
    else:
        local = (distance <= (local_window - 1) // 2) & (distance >= -(local_window // 2))
    near = torch.stack([part.any(1) for part in local.split(block, 1)], 1)
    near = torch.stack([part.any(0) for part in near.split(query_tile, 0)], 0)
    return near | (torch.arange(near.shape[1]) < init_blocks)


def selection_scale(
    q: Tensor, k_cmp: Tensor, lse: Tensor, block_indices: Tensor, valid: Tensor | None,
    ranges: Tensor | None, scale: float, causal: bool, offset: int, compress_block: int,
    compress_stride: int, kv_len: int, query_tile: int, block: int, init_blocks: int,
    local_window: int, kind: str,
) -> Tensor:  # fmt: skip
    """[B, Hkv, NT, n]: 1 with the gradient of the importance; forced blocks and no block have none.

    Straight-through: ``a + stop_gradient(1 - a)``.
    """
    sizes = (compress_block, compress_stride, kv_len, query_tile, block)
    every = importance(q, k_cmp, lse, valid, ranges, scale, causal, offset, *sizes, kind)
    fixed = forced(q.shape[2], kv_len, causal, offset, query_tile, block, init_blocks, local_window)
    listed = block_indices.long().clamp(min=0)
    mine = every.gather(3, listed)
    free = (block_indices >= 0) & ~fixed.expand(*every.shape).gather(3, listed)
    return (mine + (1 - mine).detach()).where(free, 1.0)
