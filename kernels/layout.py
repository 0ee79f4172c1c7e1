"""The memory layout of attention's results: token-major, as models go on to read them.

A result [B, H, T, D] lies in memory as [B, T, H, D]. Models transpose and flatten it right away,
which is then free, and dense backends already answer in this layout when their inputs have it.
"""

from __future__ import annotations

from torch import Tensor


def empty_token_major(like: Tensor, batch: int, heads: int, length: int, dim: int) -> Tensor:
    """Uninitialised [B, H, T, D] in the dtype and on the device of ``like``."""
    return like.new_empty(batch, length, heads, dim).transpose(1, 2)


def token_major(x: Tensor) -> Tensor:
    """[B, H, T, D] itself when it lies token-major, else a copy that does."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)
