"""From a softmax up to the product of queries and keys: the score grammar.

    scores := scores * c | scores / c | -scores | cast(scores) | view(scores) | scores + term
            | masked(scores, m) | cap * tanh(scores / cap) | cat(scores, sinks) | product(q, k)

Every step is bound at one element, so layouts, orders and in-place forms need no rules of their
own: what a step does is recorded with the index at which it meets the logit.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from nsa_compile.passes import dialect
from nsa_compile.passes.masks import views
from nsa_compile.passes.masks.affine import Affine
from nsa_compile.passes.masks.lift import Lifter
from nsa_compile.passes.masks.values import Stuck
from nsa_compile.passes.masks.views import Index
from nsa_compile.passes.match.facts import Facts
from nsa_compile.passes.match.logits import Logits, fold
from nsa_compile.passes.match.normalisers import Normaliser
from nsa_compile.passes.match.products import Product, product
from nsa_compile.passes.match.rules import RULES
from nsa_compile.passes.match.walk import Walk
from nsa_compile.passes.match.weights import Stumble, no_tensor_index

_DEEPEST = 48
_VIEWS = (
    "expand", "view", "view_as", "flatten", "unflatten", "unsqueeze", "squeeze", "transpose", "t",
    "permute", "select", "slice", "narrow", "getitem", "contiguous", "clone", "detach", "alias",
)  # fmt: skip


class Grammar:
    """Parses the scores of one graph's softmaxes."""

    def __init__(self, lifter: Lifter, facts: Facts) -> None:
        self.lifter = lifter
        self.facts = facts
        self._leads: dict[fx.Node, bool] = {}

    def parse(self, softmax: Normaliser, at: Index, key: Affine) -> Logits:
        """The logits of ``softmax`` at ``at``, where ``key`` runs over the keys.

        Raises:
            Stumble: a step that the grammar does not have.
        """
        walk = Walk(self, Logits(scale=softmax.sign), key)
        walk.enter(softmax.scores, softmax.reader, at)
        while walk.logits.product is None:
            _step(walk, self)
        found = walk.logits
        found.terms.reverse()
        if found.softcap:
            fold(found)
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
        if op is None or (op.name not in RULES and op.name not in _VIEWS):
            return False
        if op.name == "max" and not isinstance(op["y"] or op["dim"], fx.Node):
            return False  # a reduction
        if op.name == "cat":
            return any(self.leads(each, node, depth + 1) for each in op["tensors"])
        # In-place forms read their first operand as it was before them.
        return any(self.leads(each, node, depth + 1) for each in (op["x"], op["y"]))


def _step(walk: Walk, grammar: Grammar) -> None:
    node = walk.node
    found = grammar.is_scores(node)
    if found is not None:
        walk.end(found)
        return
    walk.logits.nodes.add(node)
    op = dialect.view(node)
    if op is None:
        raise Stumble(node, "an operator that the score grammar does not have")
    try:
        element = views.source(node, op, walk.at, grammar.lifter.sizes, no_tensor_index)
    except Stuck as stuck:
        raise Stumble(node, str(stuck)) from None
    if element is not None:
        walk.enter(element.node, node, element.at)
        return
    rule = RULES.get(op.name)
    if rule is None:
        raise Stumble(node, "an operator that the score grammar does not have")
    rule(walk, node, op)
