"""Mean pooling of keys, one compressed block after the other: the specification."""

from __future__ import annotations

import torch
from torch import Tensor


def compress(x: Tensor, valid: Tensor | None, block: int, stride: int) -> Tensor:
    """[B, H, T, D] -> [B, H, Nc, D]: mean over the valid keys of each compressed block."""
    batch, heads, length, dim = x.shape
    if valid is None:
        valid = torch.ones(batch, length, dtype=torch.bool, device=x.device)
    pooled = []
    for start in range(0, length - block + 1, stride):
        weight = valid[:, None, start : start + block, None].to(x.dtype)
        total = (x[:, :, start : start + block] * weight).sum(dim=2)
        pooled.append(total / weight.sum(dim=2).clamp(min=1))
    return torch.stack(pooled, dim=2) if pooled else x.new_zeros(batch, heads, 0, dim)
