"""From a softmax up to the product of queries and keys: the score grammar.

    scores := scores * c | scores / c | -scores | cast(scores) | view(scores) | scores + term
            | masked(scores, m) | cap * tanh(scores / cap) | cat(scores, sinks) | product(q, k)

Every step is bound at one element, so layouts, orders and in-place forms need no rules of their
own: what a step does is recorded with the index at which it meets the logit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import fx

from nsa_compile.passes import dialect
from nsa_compile.passes.dialect import Op
from nsa_compile.passes.masks import views
from nsa_compile.passes.masks.affine import Affine
from nsa_compile.passes.masks.lift import Lifter
from nsa_compile.passes.masks.term import Term
from nsa_compile.passes.masks.values import Stuck
from nsa_compile.passes.masks.views import Element, Index
from nsa_compile.passes.match.facts import Facts
from nsa_compile.passes.match.numbers import fixed, is_number, number
from nsa_compile.passes.match.products import Product, product
from nsa_compile.passes.match.weights import CASTS, Stumble, dropout, no_tensor_index

# A lower clamp at a number that hides a key hides it still.
HIDDEN = -1e4
_DEEPEST = 48


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


class Grammar:
    """Parses the scores of one graph's softmaxes."""

    def __init__(self, lifter: Lifter, facts: Facts) -> None:
        self.lifter = lifter
        self.facts = facts
        self._leads: dict[fx.Node, bool] = {}

    def parse(self, softmax: fx.Node, at: Index, key: Affine) -> Logits:
        """The logits of ``softmax`` at ``at``, where ``key`` runs over the keys.

        Raises:
            Stumble: a step that the grammar does not have.
        """
        walk = _Walk(self, Logits(), key)
        op = dialect.view(softmax)
        assert op is not None
        walk.enter(op["x"], softmax, at)
        while walk.logits.product is None:
            walk.step()
        found = walk.logits
        found.terms.reverse()
        if found.softcap:
            _fold(found)
            found.scale *= found.softcap
        return found

    def is_scores(self, node: fx.Node) -> Product | None:
        """``node`` as a product of two activations."""
        found = product(node)
        if found is None:
            return None
        sides = (found.left, found.right)
        if any(self.facts.is_parameter(side) for side in sides):
            return None
        return found if any(self.facts.is_activation(side) for side in sides) else None

    def current(self, node: fx.Node, reader: fx.Node) -> fx.Node:
        """The node whose value ``reader`` sees in ``node``."""
        version = self.lifter.mutations.version(node, reader)
        if isinstance(version, str):
            raise Stumble(node, f"it is {version}")
        return version

    def leads(self, node: Any, reader: fx.Node, depth: int = 0) -> bool:
        """Whether a product of activations stands behind ``node``, through the grammar's steps."""
        if not isinstance(node, fx.Node) or depth > _DEEPEST:
            return False
        node = self.current(node, reader)
        if node not in self._leads:
            self._leads[node] = self._search(node, depth)
        return self._leads[node]

    def _search(self, node: fx.Node, depth: int) -> bool:
        if self.is_scores(node):
            return True
        op = dialect.view(node)
        if op is None or (op.name not in _STEPS and op.name not in _VIEW_STEPS):
            return False
        if op.name == "max" and not isinstance(op["y"] or op["dim"], fx.Node):
            return False  # a reduction
        if op.name == "cat":
            return any(self.leads(each, node, depth + 1) for each in op["tensors"])
        # In-place forms read their first operand as it was before them.
        return any(self.leads(each, node, depth + 1) for each in (op["x"], op["y"]))


@dataclass
class _Walk:
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

    def step(self) -> None:
        node = self.node
        found = self.grammar.is_scores(node)
        if found is not None:
            self._end(found)
            return
        self.logits.nodes.add(node)
        op = dialect.view(node)
        if op is None:
            raise Stumble(node, "an operator that the score grammar does not have")
        if op.name == "cat":
            _cat(self, node, op)
            return
        try:
            element = views.source(node, op, self.at, self.grammar.lifter.sizes, no_tensor_index)
        except Stuck as stuck:
            raise Stumble(node, str(stuck)) from None
        if element is not None:
            self.enter(element.node, node, element.at)
            return
        rule = _STEPS.get(op.name)
        if rule is None:
            raise Stumble(node, "an operator that the score grammar does not have")
        rule(self, node, op)

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
        _fold(self.logits)
        return None if self.logits.factors else self.logits.scale

    def add_term(self, term: Term) -> None:
        if self.logits.softcap:
            raise Stumble(term.reader, "it changes scores before their softcap")
        self.logits.terms.append(replace(term, floor=self.floor))

    def _end(self, found: Product) -> None:
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


def _fold(logits: Logits) -> None:
    """Take factors that are numbers, known at run time only, into the scale."""
    rest = []
    for factor in logits.factors:
        value = fixed(factor.element.node)
        if math.isnan(value) or (factor.divides and value == 0):
            rest.append(factor)
        else:
            logits.scale *= 1 / value if factor.divides else value
    logits.factors = rest


def _mul(walk: _Walk, node: fx.Node, op: Op) -> None:
    scores, other, _ = walk.sides(node, op)
    _factor(walk, node, other, divides=False)
    walk.pass_to(node, scores)


def _div(walk: _Walk, node: fx.Node, op: Op) -> None:
    scores, other, first = walk.sides(node, op)
    if not first or op["rounding_mode"] is not None:
        raise Stumble(node, "it divides by scores or rounds")
    _factor(walk, node, other, divides=True)
    walk.pass_to(node, scores)


def _factor(walk: _Walk, node: fx.Node, other: Any, *, divides: bool) -> None:
    value = number(other)
    if not math.isnan(value):
        if divides and value == 0:
            raise Stumble(node, "it divides by 0")
        walk.logits.scale *= 1 / value if divides else value
        return
    if not isinstance(other, fx.Node):
        raise Stumble(node, "a factor of unknown kind")
    at = () if is_number(other) else walk.aligned(node, other)
    if _depends(at, walk.key):
        if divides:
            raise Stumble(node, "it divides keys by a tensor")
        walk.add_term(Term(other, "times", node, at))
        return
    walk.logits.factors.append(Factor(Element(other, at), divides))


def _neg(walk: _Walk, node: fx.Node, op: Op) -> None:
    walk.logits.scale *= -1.0
    walk.pass_to(node, op["x"])


def _add(walk: _Walk, node: fx.Node, op: Op) -> None:
    """``scores + other``, ``scores - other``, ``other - scores``."""
    if op["alpha"] not in (None, 1):
        raise Stumble(node, "an addition with alpha")
    scores, other, first = walk.sides(node, op)
    sign_scores, sign_other = {
        "add": (1.0, 1.0),
        "sub": (1.0, -1.0) if first else (-1.0, 1.0),
        "rsub": (-1.0, 1.0) if first else (1.0, -1.0),
    }[op.name]
    _addend(walk, node, other, sign_other)
    walk.logits.scale *= sign_scores
    walk.pass_to(node, scores)


def _addend(walk: _Walk, node: fx.Node, other: Any, sign: float) -> None:
    if is_number(other):
        # The same number on every key of a row changes no softmax, but a sink's share.
        _same_for_all(walk, node)
        return
    if not isinstance(other, fx.Node):
        raise Stumble(node, "an addend of unknown kind")
    at = walk.aligned(node, other)
    if not _depends(at, walk.key):
        _same_for_all(walk, node)
        return
    after = walk.after
    factor = None if after is None else after * sign
    walk.add_term(Term(other, "add", node, at, factor=factor))


def _same_for_all(walk: _Walk, node: fx.Node) -> None:
    if walk.logits.sinks is not None or walk.logits.softcap:
        raise Stumble(node, "it moves whole rows against their sink or under their softcap")
    walk.logits.shifted = node


def _depends(at: Index, key: Affine) -> bool:
    """Whether an element differs between keys (with one key, nothing does)."""
    return any(each.variables() & key.variables() for each in at)


def _masked_fill(walk: _Walk, node: fx.Node, op: Op) -> None:
    _fill(walk, node, op["mask"], op["value"], "hide")
    walk.pass_to(node, op["x"])


def _where(walk: _Walk, node: fx.Node, op: Op) -> None:
    scores, fill, first = walk.sides(node, op)
    _fill(walk, node, op["condition"], fill, "keep" if first else "hide")
    walk.pass_to(node, scores)


def _fill(walk: _Walk, node: fx.Node, mask: Any, fill: Any, kind: str) -> None:
    if not isinstance(mask, fx.Node) or dialect.shape(mask) is None:
        raise Stumble(node, "a mask of unknown kind")
    value = number(fill)
    held: float | fx.Node = value
    if math.isnan(value):
        if not isinstance(fill, fx.Node):
            raise Stumble(node, f"it fills scores with {fill}")
        held = fill
    term = Term(mask, kind, node, walk.aligned(node, mask), fill=held, factor=walk.after)
    walk.add_term(term)


def _tanh(walk: _Walk, node: fx.Node, op: Op) -> None:
    logits = walk.logits
    _fold(logits)
    if logits.softcap or logits.factors or not logits.scale > 0:
        raise Stumble(node, "a softcap that is no positive constant")
    logits.softcap, logits.scale = logits.scale, 1.0
    walk.pass_to(node, op["x"])


def _cast(walk: _Walk, node: fx.Node, op: Op) -> None:
    fake = dialect.value(node)
    if not fake.dtype.is_floating_point:
        raise Stumble(node, "it rounds scores")
    walk.pass_to(node, op["x"])


def _dropout(walk: _Walk, node: fx.Node, op: Op) -> None:
    if dropout(op) != 0:
        raise Stumble(node, "dropout of scores")
    walk.pass_to(node, op["x"])


def _floor(walk: _Walk, node: fx.Node, op: Op) -> None:
    """``max(scores, finfo.min)`` and ``clamp(min=finfo.min)`` make -inf finite, nothing else."""
    if op.name == "clamp":
        scores, low = op["x"], op["min"]
        if op["max"] is not None:
            raise Stumble(node, "it clamps scores from above")
    else:
        scores, low, _ = walk.sides(node, op)
    if not number(low) <= HIDDEN or walk.logits.softcap:
        raise Stumble(node, f"it clamps scores to {low}")
    walk.floor = max(walk.floor, number(low) * (walk.after or 1.0))
    walk.pass_to(node, scores)


def _max(walk: _Walk, node: fx.Node, op: Op) -> None:
    """``torch.max(scores, low)``."""
    other = op["dim"] if op["y"] is None else op["y"]
    _floor(walk, node, Op("maximum", {"x": op["x"], "y": other}))


def _cat(walk: _Walk, node: fx.Node, op: Op) -> None:
    """``cat([scores, sinks], -1)``: the part that holds the element goes on."""
    rank = len(walk.at)
    dim = 0 if op["dim"] is None else op["dim"] % rank
    parts = list(op["tensors"])
    shapes = [dialect.shape(part) for part in parts]
    if len(parts) != 2 or any(shape is None for shape in shapes) or walk.logits.sinks is not None:
        raise Stumble(node, "a concatenation that adds no sinks")
    sizes = [walk.grammar.lifter.sizes.affine(shape[dim]) for shape in shapes if shape is not None]
    lead = walk.grammar.leads(parts[0], node)
    scores, sinks = (parts[0], parts[1]) if lead else (parts[1], parts[0])
    size = sizes[1] if lead else sizes[0]
    start = Affine() if lead else sizes[0]
    at = walk.at[dim] - start
    if at != walk.key or size.constant != 1 or walk.logits.terms or walk.logits.softcap:
        raise Stumble(node, "a concatenation that adds no sinks")
    column = (*walk.at[:dim], Affine(), *walk.at[dim + 1 :])
    walk.logits.sinks = Element(walk.grammar.current(sinks, node), column)
    walk.enter(scores, node, (*walk.at[:dim], at, *walk.at[dim + 1 :]))


_STEPS: dict[str, Callable[[_Walk, fx.Node, Op], None]] = {
    "mul": _mul,
    "div": _div,
    "neg": _neg,
    "add": _add,
    "sub": _add,
    "rsub": _add,
    "masked_fill": _masked_fill,
    "where": _where,
    "tanh": _tanh,
    "dropout": _dropout,
    "clamp": _floor,
    "maximum": _floor,
    "max": _max,
    "cat": _cat,
    **dict.fromkeys(CASTS, _cast),
}
_VIEW_STEPS = (
    "expand", "view", "view_as", "flatten", "unflatten", "unsqueeze", "squeeze", "transpose", "t",
    "permute", "select", "slice", "narrow", "getitem", "contiguous", "clone", "detach", "alias",
)  # fmt: skip
