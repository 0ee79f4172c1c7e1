"""One walk from a softmax up to its product: where it stands and what it has found."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import fx

from nsa_compile.passes import dialect
from nsa_compile.passes.dialect import Op
from nsa_compile.passes.masks.affine import Affine
from nsa_compile.passes.masks.term import Term
from nsa_compile.passes.masks.views import Element, Index
from nsa_compile.passes.match.logits import Factor, Logits, fold
from nsa_compile.passes.match.numbers import fixed, number
from nsa_compile.passes.match.products import Product
from nsa_compile.passes.match.weights import Stumble

if TYPE_CHECKING:
    from nsa_compile.passes.match.grammar import Grammar


@dataclass
class Walk:
    """One walk: the node that is read, by whom, at which element, and what came after it."""

    grammar: Grammar
    logits: Logits
    key: Affine
    node: fx.Node = field(init=False)
    at: Index = ()
    # What the program clamps the logit to after the present step.
    floor: float = -math.inf

    def enter(self, node: fx.Node, reader: fx.Node, at: Index) -> None:
        """Go on with ``node[at]`` as ``reader`` sees it."""
        self.node, self.at = self.grammar.current(node, reader), at

    def pass_to(self, node: fx.Node, operand: fx.Node) -> None:
        """Go on with an operand of the elementwise ``node``."""
        self.enter(operand, node, self.aligned(node, operand))

    def aligned(self, node: fx.Node, operand: fx.Node) -> Index:
        """The element of ``operand`` that meets the present element of ``node``."""
        shape, out = dialect.shape(operand), dialect.shape(node)
        if shape is None or out is None:
            raise Stumble(operand, "it has no recorded shape")
        lead = len(out) - len(shape)
        # Sizes that differ as expressions are equal all the same: the program broadcasts them.
        return tuple(
            Affine() if s == 1 else at for s, at in zip(shape, self.at[lead:], strict=True)
        )

    def sides(self, node: fx.Node, op: Op) -> tuple[fx.Node, Any, bool]:
        """The operand that holds the scores, the other one, and whether the scores come first."""
        x, y = op["x"], op["y"]
        for scores, other, first in ((x, y, True), (y, x, False)):
            if self.grammar.leads(scores, node):
                if self.grammar.leads(other, node):
                    raise Stumble(node, "it joins the scores of two products")
                return scores, other, first
        raise Stumble(node, "no product of activations stands behind it")

    @property
    def after(self) -> float | None:
        """What the program multiplies by after the present step; None: known at run time only."""
        fold(self.logits)
        return None if self.logits.factors else self.logits.scale

    def add_term(self, term: Term) -> None:
        if self.logits.softcap:
            raise Stumble(term.reader, "it changes scores before their softcap")
        self.logits.terms.append(replace(term, floor=self.floor))

    def end(self, found: Product) -> None:
        logits = self.logits
        logits.nodes.add(found.node)
        logits.product, logits.at = found, self.at
        if found.addend is not None and fixed(found.beta) != 0:
            beta = fixed(found.beta)
            if math.isnan(beta):
                raise Stumble(found.node, "its beta is only known at run time")
            at = self.aligned(found.node, found.addend)
            after = self.after
            factor = None if after is None else after * beta
            self.add_term(Term(found.addend, "add", found.node, at, factor=factor))
        alpha = number(found.alpha)
        if math.isnan(alpha):
            logits.factors.append(Factor(Element(found.alpha, ()), False))
        else:
            logits.scale *= alpha
