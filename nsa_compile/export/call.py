"""A call of a program in words: what it takes, and what it was given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def call_text(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """``int64[1, 96], use_cache=False``: tensors by dtype and shape, plain values as they are."""
    named = [*(("", each) for each in args), *((f"{name}=", each) for name, each in kwargs.items())]
    return ", ".join(name + _shown(value) for name, value in named)


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return repr(value) if isinstance(value, (bool, int, float, str, type(None))) else "..."
