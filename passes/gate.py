"""The node that a gated site becomes: its learned part, and the branches that the gates weigh.

The compiler behind ours traces through it, down to the operators and plain tensor functions: what
is learned is fused like the rest of the model.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nsa_compile.passes import merges
from nsa_compile.passes.templates import template


def attend(
    name: str, training: bool, hidden: Tensor, parameters: Sequence[Tensor], q: Tensor, k: Tensor,
    v: Tensor, valid: Tensor | None, ranges: Tensor | None, scale: float, causal: bool, offset: int,
) -> Tensor:  # fmt: skip
    """Native Sparse Attention [B, Hq, Tq, Dv] of a prepared layer, by the template ``name``."""
    made = template(name)
    learned = made.apply_to(parameters, training, hidden, k, v, valid)
    return merges.gated(q, k, v, learned, made.config, valid, ranges, scale, causal, offset)
