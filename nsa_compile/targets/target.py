"""Target: a model on the meta device with the inputs to try it on, and the error of a bad one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

DEFAULT_LENGTH = 8192


class TargetError(Exception):
    """A target that cannot be used: says what was expected, what was found and what to do."""


@dataclass(frozen=True)
class Request:
    """What the user asked to look at; None leaves a size to the target."""

    target: str
    seq_len: int | None = None
    batch: int | None = None
    train: bool = False


@dataclass
class Target:
    """A model and one call of it, all on the meta device.

    Attributes:
        values: real values of buffers, by the ``id`` of the meta tensor in ``model``.
        notes: what a reader of the report should know about how the model was built.
    """

    name: str
    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    values: dict[int, torch.Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def token_ids(batch: int, length: int) -> torch.Tensor:
    """Stand-in token ids, int64 [B, T] on the meta device."""
    return torch.zeros(batch, length, dtype=torch.long, device="meta")


def own_length(config: Any) -> int:
    """The longest sequence that a model's ``config`` names, or :data:`DEFAULT_LENGTH`."""
    for name in ("max_position_embeddings", "n_positions", "block_size", "max_seq_len", "n_ctx"):
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return DEFAULT_LENGTH
