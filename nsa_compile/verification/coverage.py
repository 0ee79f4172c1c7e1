"""How much of a query's attention the chosen blocks hold, in memory linear in the length."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Logits' worth of mask in one go, where a mask has to be built at all.
_AT_ONCE = 1 << 24
_EVERYTHING = 1 << 62  # as dense_len: every key is read


def coverage(lse: Tensor, arguments: tuple[Any, ...]) -> Tensor:
    """Share of each query's softmax that lies in the keys that were read, [B, Hq, Tq] in [0, 1].

    The softmax over all keys and that over the chosen ones differ by their denominators alone, so
    the share is ``exp(lse of the chosen keys - lse of all keys)``. Attention sinks are no keys.

    Args:
        lse: of the chosen keys, as nsa::selected_attention returned it.
        arguments: what it was called with.

    Returns:
        NaN for a query that sees no key at all.
    """
    return (lse - _over_all_keys(arguments)).exp().clamp(max=1.0)


def _over_all_keys(arguments: tuple[Any, ...]) -> Tensor:
    """The log-sum-exp over every key, computed for some queries at a time."""
    q, k, v, _, valid, ranges, segments, *rest, _ = arguments
    key_segments, slopes, positions, scale, softcap, causal, offset, *sizes = rest
    length = q.shape[2]
    plain = valid is None and ranges is None and segments is None and offset == 0
    step = length if plain and sizes[0] is None else _AT_ONCE // max(1, k.shape[2])
    blocks = torch.zeros(k.shape[0], k.shape[1], 0, dtype=torch.int32, device=q.device)
    parts = []
    for first in range(0, max(1, length), max(1, step)):
        rows = slice(first, first + max(1, step))
        terms = (
            valid,
            None if ranges is None else ranges[:, rows],
            None if segments is None else segments[:, rows],
            key_segments, slopes, positions,
        )  # fmt: skip
        logits = (scale, softcap, causal, offset + first, *sizes)
        _, lse = torch.ops.nsa.selected_attention(
            q[:, :, rows], k, v, blocks, *terms, *logits, _EVERYTHING
        )
        parts.append(lse)
    return torch.cat(parts, 2)
