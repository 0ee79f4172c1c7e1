"""Evaluate a proven mask back to a boolean tensor: what tests and verification compare with."""

from __future__ import annotations

from typing import Any

import torch

from nsa_compile.passes.site import Mask


def evaluate(
    mask: Mask,
    q_len: int,
    kv_len: int,
    *,
    valid: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None,
    offset: int | None = None,
    prefix: int | torch.Tensor | None = None,
    segments: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Which keys each query sees: bool ``[B, 1, Tq, Tk]``; B is 1 where no tensor has a batch.

    ``valid and same chunk and same segment and ((causal and window) or j < prefix)``.

    Args:
        valid: run-time value of ``mask.valid``, nonzero is a real key.
        hidden: run-time value of ``mask.hidden``, nonzero is padding.
        offset: run-time value of ``mask.offset`` where that is a node.
        prefix: run-time value of ``mask.prefix`` where that is a node.
        segments: run-time values of ``mask.segments``.

    Raises:
        ValueError: the mask needs a run-time value that was not given.
    """
    shift = _given(mask.offset, offset, "offset")
    position = torch.arange(q_len)[:, None] + shift
    key = torch.arange(kv_len)[None, :]
    keep = torch.ones(1, 1, q_len, kv_len, dtype=torch.bool)
    if mask.causal:
        keep &= key <= position
    if mask.window is not None:
        keep &= key > position - mask.window
        if not mask.causal:
            keep &= key < position + mask.window
    if mask.prefix is not None:
        length = torch.as_tensor(_given(mask.prefix, prefix, "prefix")).cpu()
        keep = keep | (key < length.reshape(-1, 1, 1, 1))
    if mask.chunk is not None:
        keep = keep & (position // mask.chunk == key // mask.chunk)
    if mask.segments is not None:
        queries, keys = _given(mask.segments, segments, "segments")
        queries, keys = _rows(queries, q_len), _rows(keys, kv_len)
        keep = keep & (queries[:, None, :, None] == keys[:, None, None, :])
    if mask.valid is not None:
        real = _rows(_given(mask.valid, valid, "padding"), kv_len) != 0
        keep = keep & real[:, None, None, :]
    if mask.hidden is not None:
        padding = _rows(_given(mask.hidden, hidden, "padding"), kv_len) != 0
        keep = keep & ~padding[:, None, None, :]
    return keep


def _given(term: Any, value: Any, what: str) -> Any:
    """``term`` where it is a number, else the run-time ``value`` of the node that it is."""
    if isinstance(term, int):
        return term
    if value is None:
        raise ValueError(f"the {what} of the mask is known at run time only: give its value")
    return value


def _rows(row: torch.Tensor, length: int) -> torch.Tensor:
    """``[B, T]``, whatever dimensions of size 1 ``row`` has besides."""
    return row.reshape(-1, length).cpu()
