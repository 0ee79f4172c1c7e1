"""Attention over chosen blocks with scaled logits, with explicit matrices: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_compile.kernels.attend.reference import selected, visible


def scaled_attention(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, sel_scale: Tensor,
    valid: Tensor | None, ranges: Tensor | None, query_segments: Tensor | None,
    key_segments: Tensor | None, scale: float, causal: bool, offset: int, window: int | None,
    query_tile: int, block: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse) as nsa::selected_attention, logits times the scale of their tile and block.

    Of a block that is listed twice the first slot's scale counts.
    """
    group, (q_len, kv_len) = q.shape[1] // k.shape[1], (q.shape[2], k.shape[2])
    mask = visible(
        q_len, kv_len, causal, offset, window, valid, ranges, query_segments, key_segments
    )
    mask = mask if mask.ndim == 2 else mask[:, None]
    mask = mask & selected(block_indices, q_len, kv_len, query_tile, block)
    block_of_key = torch.arange(kv_len) // block
    factor = torch.ones(*block_indices.shape[:3], kv_len, dtype=q.dtype)
    for slot in reversed(range(block_indices.shape[3])):
        listed = block_indices[..., slot, None] == block_of_key
        factor = torch.where(listed, sel_scale[..., slot, None], factor)
    factor = factor[:, :, torch.arange(q_len) // query_tile].repeat_interleave(group, 1)
    mask = mask.repeat_interleave(group, 1)
    scores = scale * (q @ k.repeat_interleave(group, 1).transpose(-1, -2)) * factor
    sees = mask.any(-1, keepdim=True)
    scores = scores.masked_fill(~mask, -torch.inf).where(sees, 0.0)
    weights = torch.softmax(scores, -1).where(mask, 0.0)
    out = weights @ v.repeat_interleave(group, 1)
    return out, torch.logsumexp(scores, -1).where(sees[..., 0], -torch.inf)
