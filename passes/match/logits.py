"""What is done to the scores of an attention between their product and the softmax."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import fx

from nsa_compile.passes.masks.term import Term
from nsa_compile.passes.masks.views import Element, Index
from nsa_compile.passes.match.numbers import fixed
from nsa_compile.passes.match.products import Product


class Factor(NamedTuple):
    """A tensor or run-time number that multiplies (or divides) the logits."""

    element: Element
    divides: bool


@dataclass
class Logits:
    """What the walk up has found; ``terms`` stand in the order in which the program applies them.

    ``scale`` is the product of the constant factors (of those before a tanh and the cap that
    follows it), ``softcap`` 0.0 where there is no tanh. ``sinks`` is the element of the tensor
    whose logits join the keys', ``shifted`` a node that moves whole rows.
    """

    product: Product | None = None
    at: Index = ()
    scale: float = 1.0
    softcap: float = 0.0
    factors: list[Factor] = field(default_factory=list)
    terms: list[Term] = field(default_factory=list)
    sinks: Element | None = None
    shifted: fx.Node | None = None
    nodes: set[fx.Node] = field(default_factory=set)


def fold(logits: Logits) -> None:
    """Take factors that are numbers, known at run time only, into the scale."""
    rest = []
    for factor in logits.factors:
        value = fixed(factor.element.node)
        if math.isnan(value) or (factor.divides and value == 0):
            rest.append(factor)
        else:
            logits.scale *= 1 / value if factor.divides else value
    logits.factors = rest
