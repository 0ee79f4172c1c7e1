"""What stands around a softmax, read loosely: enough to say that there is an attention."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from nsa_compile.passes import dialect
from nsa_compile.passes.match.facts import PRODUCTS, Facts
from nsa_compile.passes.match.grammar import Grammar
from nsa_compile.passes.match.products import opaque_operands
from nsa_compile.passes.match.weights import Stumble

_MOST_NODES = 24
_SUMS = ("sum", "normalize")


def product_behind(scores: fx.Node, grammar: Grammar) -> tuple[fx.Node, fx.Node] | None:
    """The activations whose product the scores come from, through whatever is no product.

    One linear layer may stand between (heads that talk to each other), if it reads the product
    itself; the logits of a router come from a normalised stream and are none.
    """
    queue, seen, layers = [(scores, 0)], {scores}, 0
    while queue and len(seen) < _MOST_NODES:
        node, layers = queue.pop(0)
        found = grammar.is_scores(node)
        if found is not None:
            return found.left, found.right
        inputs = [each for each in _inputs(node) if grammar.facts.is_activation(each)]
        operands = [each for each in opaque_operands(node) if grammar.facts.is_activation(each)]
        if len(operands) > 1:
            return operands[0], operands[1]
        op = dialect.view(node)
        if op is not None and op.name in PRODUCTS:
            layers += 1
            if layers > 1 or op.name == "scaled_dot_product_attention":
                continue
        for each in inputs:
            if each not in seen:
                seen.add(each)
                queue.append((each, layers))
    return None


def _inputs(node: fx.Node) -> list[fx.Node]:
    """What ``node`` is computed from, and what is written into it afterwards."""
    found = list(node.all_input_nodes)
    for user in node.users:
        if node in dialect.written(user):
            found += [user, *(each for each in user.all_input_nodes if each is not node)]
    return found


def suspects(graph: fx.Graph, known: set[fx.Node], grammar: Grammar) -> Iterator[fx.Node]:
    """Nodes outside of ``known`` that make weights of scores in a way that no rule reads.

    Whatever is called a softmax, and exponentials of scores that something sums.
    """
    for node in graph.nodes:
        if not node.op.startswith("call") or node in known or not grammar.facts.is_live(node):
            continue
        name = dialect.name(node)
        if "softmax" in name or "softmin" in name:
            yield node
        elif "exp" in name.split(".")[0] and _is_summed(node, grammar.facts):
            if any(_leads(each, node, grammar) for each in node.all_input_nodes):
                yield node


def _leads(node: fx.Node, reader: fx.Node, grammar: Grammar) -> bool:
    try:
        return grammar.leads(node, reader)
    except Stumble:
        return True  # scores that are written to in place


def _is_summed(node: fx.Node, facts: Facts) -> bool:
    """Whether a sum over the exponentials is taken, of themselves or of what a mask leaves."""
    near = [user for user in node.users if facts.is_live(user)]
    near += [each for user in near for each in user.users]
    return any(dialect.name(each).split(".")[0] in _SUMS for each in near)
