"""Templates: what the learned part of a prepared attention computes, by a name that a graph holds.

A graph holds tensors and constants, not modules. nsa::site therefore names a template, and the
rewritten graph calls it with the tensors that the mark lifted into the graph. Layers that are built
alike have one name, so Dynamo compiles their code once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from nsa_compile.passes.config import NSAConfig


class Learned(NamedTuple):
    """What the gated branches need beside queries, keys and values.

    Attributes:
        gates: [B, Hq, Tq, 3] in (0, 1): compressed, selected, window.
        k_cmp, v_cmp: [B, Hkv, Nc + spare, D] and [.., Dv]; spare rows are no blocks.
        k_mem, v_mem: [Hkv, M, D] and [Hkv, M, Dv], seen by every query; None is none.
    """

    gates: Tensor
    k_cmp: Tensor
    v_cmp: Tensor
    k_mem: Tensor | None
    v_mem: Tensor | None


class Template(Protocol):
    """An ``nsa_compile.NSAParameters`` without values."""

    config: NSAConfig
    q_heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    names: tuple[str, ...]
    site: str

    def apply_to(self, tensors: Sequence[Tensor], training: bool, *inputs: Any) -> Learned:
        """The learned part, computed with ``tensors`` in place of the parameters."""


_known: dict[str, Template] = {}


def register(name: str, make: Callable[[], Template]) -> None:
    """Make ``name`` known; equal names are equal templates, so the first one stays."""
    if name not in _known:
        _known[name] = make()


def template(name: str) -> Template:
    """The template called ``name``.

    Raises:
        LookupError: it was not made in this process.
    """
    if name not in _known:
        raise LookupError(
            f"no NSAParameters of the kind {name!r} was made in this process; call "
            "nsa_compile.prepare on the model, or load the module itself"
        )
    return _known[name]
