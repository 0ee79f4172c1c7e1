"""Target: a model on the meta device with the inputs to try it on, and the error of a bad one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from nsa_compile.capture import CapturedGraph

DEFAULT_LENGTH = 8192
MOST_ELEMENTS = 1 << 40  # of one input


class TargetError(Exception):
    """A target that cannot be used: says what was expected, what was found and what to do."""


@dataclass(frozen=True)
class Request:
    """What the user asked to look at; None leaves a choice to the target.

    Attributes:
        inputs: text of ``--inputs``, see :mod:`nsa_compile.targets.inputs`.
        attn: attention implementation of a Hugging Face model.
        hf_config: values that replace those of a Hugging Face configuration.
        trust: whether a target may be unpickled, which can run any code.
        weights: build the model for real, with its weights, and not on the meta device.
        device: where such a model goes; None is where its weights are.
    """

    target: str
    seq_len: int | None = None
    batch: int | None = None
    train: bool = False
    inputs: str | None = None
    attn: str | None = None
    hf_config: Mapping[str, Any] = field(default_factory=dict)
    trust: bool = False
    weights: bool = False
    device: str | None = None


@dataclass
class Target:
    """A model and one call of it, all on the meta device; or graphs that were captured before.

    With ``weights`` in the request the model is real, and so are inputs that it came with.

    Attributes:
        values: real values of buffers, by the ``id`` of the meta tensor in ``model``.
        notes: what a reader of the report should know about how the model was built.
        graphs: what an exported program holds; then ``model`` is not called.
        program: that exported program.
    """

    name: str
    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    values: dict[int, torch.Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    graphs: list[CapturedGraph] = field(default_factory=list)
    program: ExportedProgram | None = None


def token_ids(batch: int, length: int) -> torch.Tensor:
    """Stand-in token ids, int64 [B, T] on the meta device."""
    if batch * length > MOST_ELEMENTS:
        raise TargetError(f"expected at most 2**40 tokens in a batch, got {batch} x {length}")
    return torch.zeros(batch, length, dtype=torch.long, device="meta")


def ids_for(model: nn.Module, where: str, request: Request) -> torch.Tensor:
    """Token ids for a model that came without inputs, if it looks like a text model."""
    if not any(isinstance(module, nn.Embedding) for module in model.modules()):
        raise TargetError(
            f"{where} is a model without inputs, and it has no nn.Embedding that would say it "
            "takes token ids; return (model, inputs), or pass --inputs"
        )
    length = request.seq_len or own_length(getattr(model, "config", None))
    return token_ids(request.batch or 1, length)


def own_length(config: Any) -> int:
    """The longest sequence that a model's ``config`` names, or :data:`DEFAULT_LENGTH`."""
    for name in ("max_position_embeddings", "n_positions", "block_size", "max_seq_len", "n_ctx"):
        value = getattr(config, name, None)
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        if 0 < value <= MOST_ELEMENTS:
            return value
    return DEFAULT_LENGTH
