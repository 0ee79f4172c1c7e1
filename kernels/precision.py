"""The dtypes of attention: what operands must have, what logits and sums are computed in."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_dtypes(**tensors: Tensor) -> None:
    """Refuse attention operands, by name, that are not of one floating dtype.

    Raises:
        ValueError: with the dtype of each.
    """
    first, *others = tensors.values()
    if first.is_floating_point() and all(x.dtype == first.dtype for x in others):
        return
    *names, last = tensors
    found = ", ".join(f"{name} in {x.dtype}" for name, x in tensors.items())
    raise ValueError(f"{', '.join(names)} and {last} must have one floating dtype, got {found}")
