"""Attention over compressed keys, with explicit [Tq, Nc] matrices: the specification."""

from __future__ import annotations

import torch
from torch import Tensor


def visible(
    q_len: int, count: int, valid: Tensor | None, ranges: Tensor | None, causal: bool, offset: int,
    block: int, stride: int,
) -> Tensor:  # fmt: skip
    """bool [B or 1, Tq, Nc]: block c is complete, in the query's range, and holds a valid key."""
    start = torch.arange(count) * stride
    position = torch.arange(q_len)[:, None] + offset
    seen = torch.ones(1, q_len, count, dtype=torch.bool)
    if causal:
        seen = seen & (start + block - 1 <= position)
    if ranges is not None:
        low, high = ranges[:, :, None].unbind(-1)
        seen = seen & (start >= low) & (start + block <= high)
    if valid is not None:
        covered = [valid[:, at : at + block].any(dim=1) for at in start.tolist()]
        seen = seen & torch.stack(covered, dim=1)[:, None] if covered else seen
    return seen


def compressed_attention(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, valid: Tensor | None, ranges: Tensor | None,
    scale: float, causal: bool, offset: int, block: int, stride: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out [B, Hq, Tq, Dv], lse [B, Hq, Tq]); a query that sees nothing has out 0 and lse -inf."""
    group = q.shape[1] // k_cmp.shape[1]
    site = (valid, ranges, causal, offset, block, stride)
    seen = visible(q.shape[2], k_cmp.shape[2], *site)[:, None]
    scores = scale * (q @ k_cmp.repeat_interleave(group, dim=1).transpose(-1, -2))
    alive = seen.any(dim=-1, keepdim=True)
    scores = scores.masked_fill(~seen, -torch.inf).where(alive, 0.0)
    weights = torch.softmax(scores, dim=-1).where(alive, 0.0)
    out = weights @ v_cmp.repeat_interleave(group, dim=1)
    return out, torch.logsumexp(scores, dim=-1).where(alive[..., 0], -torch.inf)
