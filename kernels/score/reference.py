"""What a block of keys is worth to a tile of queries, with explicit matrices: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_compile.kernels.attend.reference import modified, visible


def channels(q: Tensor, k: Tensor, valid: Tensor | None, num_channels: int) -> Tensor:
    """int32 [B, Hkv, r], ascending: the channels with the largest ``E[q_c^2] * Var[k_c]``."""
    strength = channel_strength(q, k, valid)
    order = strength.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :num_channels].sort(dim=-1).values.to(torch.int32)


def channel_strength(q: Tensor, k: Tensor, valid: Tensor | None) -> Tensor:
    """[B, Hkv, D]: E over the group's heads and queries, Var over the valid keys."""
    energy = (q**2).reshape(*k.shape[:2], -1, k.shape[3]).mean(dim=2)
    if valid is None:
        return energy * k.var(dim=2, correction=0)
    weight = valid[:, None, :, None].to(k.dtype)
    count = weight.sum(dim=2, keepdim=True).clamp(min=1)
    centred = k - (k * weight).sum(dim=2, keepdim=True) / count
    return energy * ((centred**2) * weight).sum(dim=2) / count[:, :, 0]


def tile_sum(p: Tensor, kv_heads: int, query_tile: int) -> Tensor:
    """[B, Hq, Tq, X] -> [B, Hkv, NT, X]: sum over the group's heads and the tile's queries."""
    batch, q_heads, q_len, width = p.shape
    grouped = p.reshape(batch, kv_heads, q_heads // kv_heads, q_len, width).sum(dim=2)
    return torch.stack([tile.sum(dim=2) for tile in grouped.split(query_tile, dim=2)], dim=2)


def safe_softmax(scores: Tensor) -> Tensor:
    """Softmax over the last dimension; a row of -inf gives zeros."""
    dead = (scores == -torch.inf).all(dim=-1, keepdim=True)
    return torch.softmax(scores.where(~dead, 0.0), dim=-1).where(~dead, 0.0)


def channel_scores(
    q: Tensor, k: Tensor, summary: Tensor, valid: Tensor | None, ranges: Tensor | None,
    query_segments: Tensor | None, key_segments: Tensor | None, slopes: Tensor | None,
    positions: Tensor | None, scale: float, softcap: float, causal: bool, offset: int,
    window: int | None, query_tile: int, block: int,
) -> Tensor:  # fmt: skip
    """[B, Hkv, NT, Ns]: softmax over blocks of the largest logit in the block, on few channels."""
    q_len, kv_len, kv_heads = q.shape[2], k.shape[2], k.shape[1]
    group = q.shape[1] // kv_heads
    keep = torch.zeros(*k.shape[:2], k.shape[3], dtype=k.dtype, device=k.device)
    keep.scatter_(2, summary.long(), 1.0)
    narrow = (k * keep[:, :, None]).repeat_interleave(group, dim=1)
    terms = (valid, ranges, query_segments, key_segments)
    mask = visible(q_len, kv_len, causal, offset, window, *terms).view(-1, 1, q_len, kv_len)
    logits = scale * (q @ narrow.transpose(-1, -2))
    logits = modified(logits, offset, slopes, positions, softcap).masked_fill(~mask, -torch.inf)
    best = torch.stack([part.amax(dim=-1) for part in logits.split(block, dim=-1)], dim=-1)
    return tile_sum(safe_softmax(best), kv_heads, query_tile)


def mean_scores(
    q: Tensor, k: Tensor, summary: Tensor, valid: Tensor | None, ranges: Tensor | None,
    slopes: Tensor | None, positions: Tensor | None, scale: float, softcap: float, causal: bool,
    offset: int, window: int | None, query_tile: int, block: int, compress_block: int,
    compress_stride: int, importance: str = "overlap",
) -> Tensor:  # fmt: skip
    """[B, Hkv, NT, Ns]: softmax over compressed blocks, spread over selection blocks.

    A compressed block is seen, and stands, where its last key is.
    """
    batch, kv_heads, kv_len, _ = k.shape
    q_len, group, count = q.shape[2], q.shape[1] // kv_heads, summary.shape[2]
    blocks = -(-kv_len // block)
    if count == 0:
        return q.new_zeros(batch, kv_heads, -(-q_len // query_tile), blocks)
    last = torch.arange(count) * compress_stride + compress_block - 1
    mask = visible(q_len, kv_len, causal, offset, window, None, ranges)[..., last]
    mask = mask.view(-1, 1, q_len, count)
    if valid is not None:
        starts = range(0, kv_len - compress_block + 1, compress_stride)
        holds = torch.stack([valid[:, s : s + compress_block].any(dim=1) for s in starts], dim=1)
        mask = mask & holds[:, None, None, :]
    every = q.new_zeros(batch, q.shape[1], q_len, kv_len)
    logits = scale * (q @ summary.repeat_interleave(group, dim=1).transpose(-1, -2))
    every[..., last] = logits
    logits = modified(every, offset, slopes, positions, softcap)[..., last]
    weights = tile_sum(safe_softmax(logits.masked_fill(~mask, -torch.inf)), kv_heads, query_tile)
    sizes = (compress_block, compress_stride)
    if importance == "interpolate":
        return weights @ interpolation(count, blocks, block, *sizes, causal).to(q.dtype)
    return weights @ overlap(count, blocks, block, *sizes).to(q.dtype)


def overlap(count: int, blocks: int, block: int, length: int, stride: int) -> Tensor:
    """float64 [Nc, Ns]: tokens that a compressed and a selection block share, in strides."""
    shared = torch.zeros(count, blocks, dtype=torch.float64)
    for c in range(count):
        for j in range(c * stride, c * stride + length):
            shared[c, j // block] += 1 / stride
    return shared


def interpolation(
    count: int, blocks: int, block: int, length: int, stride: int, causal: bool
) -> Tensor:
    """float64 [Nc, Ns]: what the values at the centres of compressed blocks give each token.

    Linear in between; the first value before the first centre. Behind the last centre the last
    value, or under causality as if a value of 0 came next.
    """
    given = torch.zeros(count, blocks, dtype=torch.float64)
    for j in range(blocks * block if count else 0):
        place = max((j - (length - 1) / 2) / stride, 0.0)
        if not causal:
            place = min(place, count - 1.0)
        left, part = int(place), place - int(place)
        for c, share in ((left, 1 - part), (left + 1, part)):
            if c < count:
                given[c, j // block] += share / stride
    return given
