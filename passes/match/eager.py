"""Attention spelled with a softmax between two products: softmax(scores(q, k)) @ v."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from nsa_compile.passes import dialect
from nsa_compile.passes.dialect import Op
from nsa_compile.passes.masks.affine import Affine
from nsa_compile.passes.masks.lift import Lifter
from nsa_compile.passes.masks.term import Term
from nsa_compile.passes.masks.views import Element
from nsa_compile.passes.match import lse
from nsa_compile.passes.match import weights as downwards
from nsa_compile.passes.match.equal import same_value
from nsa_compile.passes.match.escapes import escaping
from nsa_compile.passes.match.facts import PRODUCTS, Facts
from nsa_compile.passes.match.features import are_rows
from nsa_compile.passes.match.grammar import Grammar
from nsa_compile.passes.match.logits import Logits
from nsa_compile.passes.match.products import Product, variables
from nsa_compile.passes.match.roots import Root, Unparsed
from nsa_compile.passes.match.weights import Stumble, Weights, Zeroed
from nsa_compile.passes.reasons import Reason, Refusal

_MOST_NODES = 24


def find(graph: fx.Graph, lifter: Lifter) -> Iterator[Root | Unparsed]:
    """Every softmax of ``graph`` that turns scores of queries and keys into weights of values."""
    facts = Facts(graph)
    grammar = Grammar(lifter, facts)
    for node in graph.nodes:
        if "softmax" in dialect.name(node):
            op = dialect.view(node)
            if op is not None and op.name == "softmax" and facts.is_live(node):
                root = _read(node, op, grammar)
                if root is not None:
                    yield root


def _read(softmax: fx.Node, op: Op, grammar: Grammar) -> Root | Unparsed | None:
    """The attention around ``softmax``, None where there is none."""
    if not isinstance(op["x"], fx.Node):
        return None
    behind = _product_behind(softmax, op["x"], grammar)
    if behind is None:
        return None
    below = downwards.find_product(softmax, grammar.facts)
    if below is None:
        return None
    output = below if isinstance(below, fx.Node) else below.node
    try:
        if isinstance(below, fx.Node):
            raise Stumble(below, "no step between a softmax and the product with the values")
        return _parse(softmax, op, below, grammar)
    except Stumble as stumble:
        refusal = Refusal(Reason.UNRECOGNISED_ATTENTION, str(stumble))
        value = None
        if isinstance(below, Product):
            value = next((x for x in (below.right, below.left) if _is_value(x, softmax)), None)
        return Unparsed(output, refusal, "eager", behind.left, behind.right, value)


def _is_value(node: fx.Node, softmax: fx.Node) -> bool:
    return dialect.shape(node) is not None and node is not softmax


def _product_behind(softmax: fx.Node, scores: fx.Node, grammar: Grammar) -> Product | None:
    """The product of activations that the scores come from, through whatever is no product.

    One linear layer may stand between (heads that talk to each other), if it reads the product
    itself; the logits of a router come from a normalised stream and are none.
    """
    queue, seen, layers = [(scores, 0)], {scores}, 0
    while queue and len(seen) < _MOST_NODES:
        node, layers = queue.pop(0)
        found = grammar.is_scores(node)
        if found is not None:
            return found
        op = dialect.view(node)
        if op is not None and op.name in PRODUCTS:
            layers += 1
            if layers > 1 or op.name == "scaled_dot_product_attention":
                continue
        for each in node.all_input_nodes:
            if each not in seen and grammar.facts.is_activation(each):
                seen.add(each)
                queue.append((each, layers))
    return None


def _parse(softmax: fx.Node, op: Op, below: Product, grammar: Grammar) -> Root | None:
    lifter = grammar.lifter
    weights = downwards.parse(below, softmax, lifter)
    _check_dim(softmax, op, weights)
    logits = grammar.parse(softmax, weights.weights, weights.key)
    product = logits.product
    assert product is not None
    _check_keys(softmax, op, weights, logits, grammar)
    (channel,) = variables("c", [product.size(product.contracted)], lifter.sizes)
    query, key = product.operands(logits.at, channel)
    if _reads(query, weights.key) and not _reads(key, weights.key):
        query, key = key, query
    if weights.key.variables() and (_reads(query, weights.key) or not _reads(key, weights.key)):
        raise Stumble(product.node, "its rows are no queries, or its columns no keys")
    if not product.has_rows(query.node) or not grammar.facts.is_activation(key.node):
        return None
    rows = {v for at in query.at for v in at.variables()} - {
        v for at in key.at for v in at.variables()
    }
    if rows and rows <= {v for at in weights.value.at for v in at.variables()}:
        return None  # every query has values of its own: a mixture, not attention
    if are_rows(query, channel, lifter):
        return None
    value_label = _value_channel(below, weights)
    used = None
    if logits.sinks is None and logits.shifted is None:
        used = lse.find(softmax, weights.weights, below.node, grammar)
    return Root(
        output=below.node,
        out=weights.out,
        query=query,
        key=key,
        value=weights.value,
        key_at=weights.key,
        channel=channel,
        value_channel=value_label,
        reader=product.node,
        scale=logits.scale,
        dtype=_dtype(product.node),
        spelling="eager",
        terms=tuple(logits.terms),
        dropout=weights.dropout,
        softcap=logits.softcap,
        factors=tuple(logits.factors),
        sinks=logits.sinks,
        mask=logits.terms[0].node if logits.terms else None,
        lse=used,
        refusal=_escape(softmax, weights, logits, used, grammar.facts),
    )


def _check_dim(softmax: fx.Node, op: Op, weights: Weights) -> None:
    """The softmax must run over the keys that the product with the values sums over."""
    shape, dim = dialect.shape(softmax), op["dim"]
    if shape is None or not isinstance(dim, int):
        raise Stumble(softmax, f"a softmax over dim {dim}")
    others = [at for p, at in enumerate(weights.weights) if p != dim % len(shape)]
    if not _reads_only(weights.weights[dim % len(shape)], weights.key) or any(
        at.variables() & weights.key.variables() for at in others
    ):
        raise Stumble(softmax, "it does not run over the keys that the values are summed over")


def _reads_only(at: Affine, key: Affine) -> bool:
    """``key`` itself, or the key after one sink."""
    return (at - key).constant in (0, 1)


def _check_keys(
    softmax: fx.Node, op: Op, weights: Weights, logits: Logits, grammar: Grammar
) -> None:
    """Every column of the softmax must be a key or the sink."""
    shape = dialect.shape(softmax)
    assert shape is not None
    keys = grammar.lifter.sizes.affine(shape[op["dim"] % len(shape)])
    read = weights.product.size(weights.product.contracted)
    count = grammar.lifter.sizes.affine(read) + (0 if logits.sinks is None else 1)
    if keys != count:
        raise Stumble(softmax, "it runs over more columns than there are keys")
    for each in weights.zeroed:
        if not any(_same(each, term) for term in logits.terms):
            raise Stumble(each.reader, "it changes weights that no mask of the scores hides")


def _same(zeroed: Zeroed, term: Term) -> bool:
    kind = "hide" if zeroed.where else "keep"
    return (term.kind, term.at) == (kind, zeroed.at) and same_value(term.node, zeroed.node)


def _reads(element: Element, key: Affine) -> bool:
    return any(at.variables() & key.variables() for at in element.at)


def _value_channel(product: Product, weights: Weights) -> Affine:
    """The variable of the result that only the values have."""
    mine = set(product.left_labels if weights.value.node is product.left else product.right_labels)
    other = set(product.left_labels) ^ set(product.right_labels)
    labels = [label for label in product.out_labels if label in mine & other]
    if len(labels) != 1:
        raise Stumble(product.node, "values with other than one dimension of channels")
    return weights.out[product.out_labels.index(labels[0])]


def _escape(
    softmax: fx.Node, weights: Weights, logits: Logits, used: Element | None, facts: Facts
) -> Refusal | None:
    inside = {softmax, *weights.nodes, *logits.nodes}
    answered = {weights.product.node} | ({used.node} if used is not None else set())
    user = escaping(inside, inside | answered, facts)
    if user is None:
        return None
    return Refusal(Reason.WEIGHTS_ESCAPE, f"{dialect.describe(user)} uses them too")


def _dtype(node: fx.Node) -> torch.dtype:
    fake = dialect.value(node)
    return fake.dtype if isinstance(fake, torch.Tensor) else torch.float32
