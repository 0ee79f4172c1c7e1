"""Rotary position embedding (arXiv 2104.09864): channels i and i + D/2 turn together."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """``x`` [B, H, T, D] turned by ``positions`` [T], in x.dtype."""
    half = x.shape[3] // 2
    # Angles need float32: at position 100,000 bfloat16 steps by 512.
    exponents = torch.arange(half, device=x.device, dtype=torch.float32) / half
    angles = positions[:, None].float() * base**-exponents
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.split(half, 3)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), 3)
