"""Attention spelled with a softmax between two products: softmax(scores(q, k)) @ v."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from nsa_compile.passes import dialect
from nsa_compile.passes.masks.affine import Affine
from nsa_compile.passes.masks.lift import Lifter
from nsa_compile.passes.masks.term import Term
from nsa_compile.passes.masks.views import Element
from nsa_compile.passes.match import lse, normalisers
from nsa_compile.passes.match import weights as downwards
from nsa_compile.passes.match.equal import same_value
from nsa_compile.passes.match.escapes import escaping
from nsa_compile.passes.match.facts import Facts
from nsa_compile.passes.match.features import are_rows
from nsa_compile.passes.match.grammar import Grammar
from nsa_compile.passes.match.logits import Logits
from nsa_compile.passes.match.normalisers import Normaliser
from nsa_compile.passes.match.products import Product, variables
from nsa_compile.passes.match.roots import Root, Unparsed
from nsa_compile.passes.match.surroundings import product_behind, suspects
from nsa_compile.passes.match.weights import Stumble, Weights, Zeroed
from nsa_compile.passes.reasons import Reason, Refusal


def find(graph: fx.Graph, lifter: Lifter) -> Iterator[Root | Unparsed]:
    """Every softmax of ``graph`` that turns scores of queries and keys into weights of values."""
    facts = Facts(graph)
    grammar = Grammar(lifter, facts)
    known: set[fx.Node] = set()
    for softmax in normalisers.find(graph, facts):
        known.update(softmax.nodes)
        root = _read(softmax, grammar)
        if root is not None:
            yield root
    for node in suspects(graph, known, grammar):
        unparsed = _suspected(node, grammar)
        if unparsed is not None:
            yield unparsed


def _suspected(node: fx.Node, grammar: Grammar) -> Unparsed | None:
    """The attention around ``node``, which is a softmax or the exponential of one."""
    below = downwards.leads_to_product(node, grammar.facts)
    behind = product_behind(node, grammar) if below is not None else None
    if below is None or behind is None:
        return None
    stumble = Stumble(node, "a softmax that is spelled in an unknown way")
    return Unparsed(below, Refusal(Reason.UNRECOGNISED_ATTENTION, str(stumble)), "eager", *behind)


def _read(softmax: Normaliser, grammar: Grammar) -> Root | Unparsed | None:
    """The attention around ``softmax``, None where there is none."""
    behind = product_behind(softmax.scores, grammar)
    if behind is None:
        return None
    below = downwards.find_product(softmax.weights, grammar.facts)
    if below is None:
        return None
    try:
        if isinstance(below, fx.Node):
            raise Stumble(below, "no step between a softmax and the product with the values")
        return _parse(softmax, below, grammar)
    except Stumble as stumble:
        refusal = Refusal(Reason.UNRECOGNISED_ATTENTION, str(stumble))
        value = None
        output = None
        if isinstance(below, Product):
            output = below.node
            sides = (below.right, below.left)
            value = next((x for x in sides if _is_value(x, softmax.weights)), None)
        output = output or downwards.leads_to_product(below, grammar.facts) or softmax.weights
        return Unparsed(output, refusal, "eager", *behind, value)


def _is_value(node: fx.Node, softmax: fx.Node) -> bool:
    return dialect.shape(node) is not None and node is not softmax


def _parse(softmax: Normaliser, below: Product, grammar: Grammar) -> Root | None:
    lifter = grammar.lifter
    weights = downwards.parse(below, softmax.weights, lifter)
    _check_dim(softmax, weights)
    logits = grammar.parse(softmax, weights.weights, weights.key)
    product = logits.product
    assert product is not None
    _check_keys(softmax, weights, logits, grammar)
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


def _check_dim(softmax: Normaliser, weights: Weights) -> None:
    """The softmax must run over the keys that the product with the values sums over."""
    shape, dim = dialect.shape(softmax.weights), softmax.dim
    if shape is None or not isinstance(dim, int):
        raise Stumble(softmax.weights, f"a softmax over dim {dim}")
    others = [at for p, at in enumerate(weights.weights) if p != dim % len(shape)]
    if not _reads_only(weights.weights[dim % len(shape)], weights.key) or any(
        at.variables() & weights.key.variables() for at in others
    ):
        raise Stumble(
            softmax.weights, "it does not run over the keys that the values are summed over"
        )


def _reads_only(at: Affine, key: Affine) -> bool:
    """``key`` itself, or the key after one sink."""
    return (at - key).constant in (0, 1)


def _check_keys(softmax: Normaliser, weights: Weights, logits: Logits, grammar: Grammar) -> None:
    """Every column of the softmax must be a key or the sink."""
    shape = dialect.shape(softmax.weights)
    assert shape is not None
    keys = grammar.lifter.sizes.affine(shape[softmax.dim % len(shape)])
    read = weights.product.size(weights.product.contracted)
    count = grammar.lifter.sizes.affine(read) + (0 if logits.sinks is None else 1)
    if keys != count:
        raise Stumble(softmax.weights, "it runs over more columns than there are keys")
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
    softmax: Normaliser, weights: Weights, logits: Logits, used: Element | None, facts: Facts
) -> Refusal | None:
    inside = {*softmax.nodes, *weights.nodes, *logits.nodes}
    answered = {weights.product.node} | ({used.node} if used is not None else set())
    user = escaping(inside, inside | answered, facts)
    if user is None:
        return None
    return Refusal(Reason.WEIGHTS_ESCAPE, f"{dialect.describe(user)} uses them too")


def _dtype(node: fx.Node) -> torch.dtype:
    fake = dialect.value(node)
    return fake.dtype if isinstance(fake, torch.Tensor) else torch.float32
