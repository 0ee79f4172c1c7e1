"""Attention over selected blocks, with explicit [Tq, Tk] matrices: the specification."""

from __future__ import annotations

import torch
from torch import Tensor


def visible(
    q_len: int, kv_len: int, causal: bool, offset: int, window: int | None, valid: Tensor | None,
    ranges: Tensor | None = None, query_segments: Tensor | None = None,
    key_segments: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The site's own mask, True where a key is seen: [B or 1, Tq, Tk], [Tq, Tk] without tensors."""
    tensors = (valid, ranges, query_segments)
    device = next((x.device for x in tensors if x is not None), None)
    p = torch.arange(q_len, device=device)[:, None] + offset
    j = torch.arange(kv_len, device=device)[None, :]
    mask = torch.ones(q_len, kv_len, dtype=torch.bool, device=device)
    if causal:
        mask &= j <= p
    if window is not None:
        mask &= (j > p - window) if causal else ((p - j).abs() < window)
    if valid is not None:
        mask = mask & valid[:, None, :]
    if ranges is not None:
        mask = mask & (j >= ranges[..., :1]) & (j < ranges[..., 1:])
    if query_segments is not None and key_segments is not None:
        mask = mask & (query_segments[:, :, None] == key_segments[:, None, :])
    return mask


def modified(
    scores: Tensor, offset: int, slopes: Tensor | None, positions: Tensor | None, softcap: float
) -> Tensor:
    """Scaled logits [B, Hq, Tq, Tk] after the soft cap, then ALiBi (arXiv 2108.12409)."""
    q_len, kv_len = scores.shape[2:]
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if slopes is None:
        return scores
    if positions is None:
        positions = torch.arange(kv_len, device=scores.device)[None]
    p = (torch.arange(q_len, device=scores.device) + offset).clamp(0, kv_len - 1)
    distance = positions[:, None, None, :] - positions[:, None, p, None]
    return scores + slopes.to(scores.dtype)[:, None, None] * distance


def selected(block_indices: Tensor, q_len: int, kv_len: int, query_tile: int, block: int) -> Tensor:
    """Keys in the selected blocks: bool [B, Hkv, Tq, Tk]."""
    tile_of_query = torch.arange(q_len, device=block_indices.device) // query_tile
    block_of_key = torch.arange(kv_len, device=block_indices.device) // block
    chosen = block_indices[:, :, tile_of_query]
    return (chosen[..., None] == block_of_key).any(dim=-2)


def selected_attention(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, valid: Tensor | None,
    ranges: Tensor | None, query_segments: Tensor | None, key_segments: Tensor | None,
    slopes: Tensor | None, positions: Tensor | None, scale: float, softcap: float, causal: bool,
    offset: int, window: int | None, query_tile: int, block: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out [B, Hq, Tq, Dv], lse [B, Hq, Tq]); a query that sees nothing has out 0 and lse -inf."""
    group = q.shape[1] // k.shape[1]
    q_len, kv_len = q.shape[2], k.shape[2]
    terms = (valid, ranges, query_segments, key_segments)
    mask = visible(q_len, kv_len, causal, offset, window, *terms)
    mask = mask if mask.ndim == 2 else mask[:, None]
    mask = mask & selected(block_indices, q_len, kv_len, query_tile, block)
    mask = mask.repeat_interleave(group, dim=1)
    scores = scale * (q @ k.repeat_interleave(group, dim=1).transpose(-1, -2))
    scores = modified(scores, offset, slopes, positions, softcap).masked_fill(~mask, -torch.inf)
    sees = mask.any(dim=-1, keepdim=True)
    weights = torch.softmax(scores.where(sees, 0.0), dim=-1).where(mask, 0.0)
    out = weights @ v.repeat_interleave(group, dim=1)
    lse = torch.logsumexp(scores.where(sees, 0.0), dim=-1)
    return out, lse.where(sees[..., 0], -torch.inf)
