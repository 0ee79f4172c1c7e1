"""Packed sequences: several of them one after another in one row, told apart by ``cu_seqlens``."""

from __future__ import annotations

import torch
from torch import Tensor


def packed_ranges(
    cu_seqlens: Tensor | None, ranges: Tensor | None, q_len: int, kv_len: int, offset: int
) -> Tensor | None:
    """``ranges`` int32 [1, Tq, 2] that keep each query among the keys of its own sequence.

    Tokens past the last boundary belong to no sequence and see no key. Nothing is read on the
    host, so boundaries that do not ascend go unnoticed.

    Args:
        cu_seqlens: integers [S + 1], the boundaries of S sequences: ``[0, len_0, len_0 + len_1,
            ...]``; None: ``ranges`` as they are.

    Raises:
        ValueError: a wrong shape or dtype, ranges beside it, or queries that are not the keys' own.
    """
    if cu_seqlens is None:
        return ranges
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
        raise ValueError(
            f"cu_seqlens must be [S + 1], the boundaries of S sequences, got "
            f"{list(cu_seqlens.shape)}"
        )
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if ranges is not None:
        raise ValueError("cu_seqlens are ranges in another form: expected one of them, got both")
    if q_len != kv_len or offset != 0:
        raise ValueError(
            f"cu_seqlens need Tq = Tk and offset 0, got Tq={q_len}, Tk={kv_len} and offset={offset}"
        )
    token = torch.arange(q_len, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    sequence = torch.searchsorted(cu_seqlens, token, right=True)
    last = cu_seqlens.shape[0] - 1
    first, stop = cu_seqlens[(sequence - 1).clamp(0, last)], cu_seqlens[sequence.clamp(0, last)]
    inside = (token >= first) & (token < stop)
    return torch.where(inside[:, None], torch.stack((first, stop), -1), 0).to(torch.int32)[None]
