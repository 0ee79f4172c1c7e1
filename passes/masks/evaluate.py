"""Evaluate a proven mask back to a boolean tensor: what tests and verification compare with."""

from __future__ import annotations

import torch

from nsa_compile.passes.site import Mask


def evaluate(
    mask: Mask,
    q_len: int,
    kv_len: int,
    *,
    valid: torch.Tensor | None = None,
    offset: int | None = None,
) -> torch.Tensor:
    """Which keys each query sees: bool ``[B, 1, Tq, Tk]``, or ``[1, 1, Tq, Tk]`` without padding.

    Args:
        valid: run-time value of ``mask.valid``, ``[B, Tk]`` or ``[1, Tk]``, nonzero is a real key.
        offset: run-time value of ``mask.offset`` where that is a node.

    Raises:
        ValueError: the mask needs a run-time value that was not given.
    """
    if mask.valid is not None and valid is None:
        raise ValueError(f"the mask has padding: give the value of %{mask.valid.name}")
    shift = mask.offset if offset is None else offset
    if not isinstance(shift, int):
        raise ValueError(f"the offset is known at run time only: give the value of %{shift.name}")
    position = torch.arange(q_len)[:, None] + shift
    key = torch.arange(kv_len)[None, :]
    keep = torch.ones(q_len, kv_len, dtype=torch.bool)
    if mask.causal:
        keep &= key <= position
    if mask.window is not None:
        keep &= key > position - mask.window
        if not mask.causal:
            keep &= key < position + mask.window
    keep = keep[None, None]
    if valid is not None:
        keep = keep & (valid != 0)[:, None, None, :].cpu()
    return keep
