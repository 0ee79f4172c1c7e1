"""Query heads one by one: attention in which each head of a group has a choice of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def each_head(function: Callable[..., Any], kv_heads: int, *tensors: Tensor | None) -> Any:
    """``function`` of the first query heads of all groups, of the second ones and so on, as one.

    Each of the calls is attention without groups over the same keys and values. It is given views,
    so nothing is copied but the results.

    Args:
        function: takes the tensors with Hkv in the place of Hq, and returns a tensor [B, Hkv, ...]
            or a tuple of such.
        tensors: [B, Hq, ...], or [Hq] where there is one dimension; None stays None.

    Returns:
        [B, Hq, ...], or a tuple of such.
    """
    group = next(x.shape[min(1, x.ndim - 1)] for x in tensors if x is not None) // kv_heads
    parts = zip(*(_apart(x, kv_heads, group) for x in tensors), strict=True)
    results = [function(*mine) for mine in parts]
    if isinstance(results[0], Tensor):
        return _together(results)
    return tuple(_together(each) for each in zip(*results, strict=True))


def _apart(x: Tensor | None, kv_heads: int, group: int) -> Sequence[Tensor | None]:
    if x is None:
        return [None] * group
    dim = min(1, x.ndim - 1)
    return list(x.unflatten(dim, (kv_heads, group)).unbind(dim + 1))


def _together(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack(tuple(parts), 2).flatten(1, 2)
