"""From a softmax down to the product with the values: what happens to attention weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from nsa_compile.passes import dialect
from nsa_compile.passes.dialect import Op
from nsa_compile.passes.masks import views
from nsa_compile.passes.masks.affine import Affine
from nsa_compile.passes.masks.lift import Lifter
from nsa_compile.passes.masks.values import Stuck
from nsa_compile.passes.masks.views import Element, Index
from nsa_compile.passes.match.facts import PRODUCTS, Facts
from nsa_compile.passes.match.numbers import fixed, number
from nsa_compile.passes.match.products import Product, opaque_operands, product, variables

CASTS = ("to", "type", "type_as", "float", "half", "bfloat16", "double")
_PASSED = (
    *CASTS, "dropout", "masked_fill", "where", "mul", "nan_to_num",
    "expand", "view", "view_as", "flatten", "unflatten", "unsqueeze", "squeeze", "transpose", "t",
    "permute", "select", "slice", "narrow", "getitem", "contiguous", "clone", "detach", "alias",
)  # fmt: skip
_MOST_NODES = 32


class Stumble(Exception):
    """The grammar met ``node``, which it cannot parse; never leaves passes/match."""

    def __init__(self, node: fx.Node, what: str) -> None:
        super().__init__(f"{dialect.describe(node)}: {what}")
        self.node = node


@dataclass(frozen=True)
class Zeroed:
    """Weights set to 0 after the softmax, where the boolean ``node[at]`` is true (or false)."""

    node: fx.Node
    at: Index
    where: bool
    reader: fx.Node


@dataclass
class Weights:
    """The walk from the product with the values up to its softmax.

    ``out`` is the index of the product's result, ``weights`` the softmax's element that its element
    reads at key ``key``, and ``value`` that of the values.
    """

    product: Product
    softmax: fx.Node
    out: Index
    key: Affine
    weights: Index
    value: Element
    dropout: float = 0.0
    zeroed: list[Zeroed] = field(default_factory=list)
    nodes: set[fx.Node] = field(default_factory=set)


def find_product(softmax: fx.Node, facts: Facts) -> Product | fx.Node | None:
    """The first live product that reads the weights, through what the grammar passes.

    The first node that it does not pass when a product stands behind that; None where there is no
    product at all.
    """
    unknown: list[fx.Node] = []
    found = _search(softmax, facts, _is_passed, unknown)
    if found is not None or not unknown:
        return found if isinstance(found, Product) else None
    return next((node for node in unknown if leads_to_product(node, facts) is not None), None)


def leads_to_product(start: fx.Node, facts: Facts) -> fx.Node | None:
    """The first product with data that ``start`` has a part in, through whatever is no product."""
    operands = opaque_operands(start)
    if operands:
        return start if sum(map(facts.is_activation, operands)) > 1 else None
    unknown: list[fx.Node] = []
    found = _search(start, facts, _is_no_product, unknown)
    if found is not None:
        return found.node
    return next((node for node in unknown if leads_to_product(node, facts) is not None), None)


def _is_passed(node: fx.Node) -> bool:
    op = dialect.view(node)
    return op is not None and op.name in _PASSED and not dialect.written(node)


def _is_no_product(node: fx.Node) -> bool:
    op = dialect.view(node)
    return (op is None or op.name not in PRODUCTS) and not opaque_operands(node)


def _search(
    start: fx.Node, facts: Facts, passes: Callable[[fx.Node], bool], unknown: list[fx.Node]
) -> Product | None:
    """Breadth first through the live users of ``start``."""
    queue, seen = [start], {start}
    while queue and len(seen) < _MOST_NODES:
        node = queue.pop(0)
        seen.update(dialect.written(node))
        for user in _readers(node):
            if user in seen or not facts.is_live(user):
                continue
            seen.add(user)
            found = product(user)
            if found is not None and _values(found, seen, facts):
                return found
            if passes(user):
                queue.append(user)
            else:
                unknown.append(user)
    return None


def _readers(node: fx.Node) -> list[fx.Node]:
    """What reads ``node``, or a tensor that ``node`` writes into."""
    written = (user for each in dialect.written(node) for user in each.users)
    return [user for user in (*node.users, *written) if user is not node]


def _values(found: Product, seen: set[fx.Node], facts: Facts) -> bool:
    """Whether one operand of ``found`` is weights, the other values: data, not parameters."""
    others = [each for each in (found.left, found.right) if each not in seen]
    return len(others) == 1 and facts.is_activation(others[0])


def parse(found: Product, softmax: fx.Node, lifter: Lifter) -> Weights:
    """Follow the weights of ``found`` up to ``softmax``.

    Raises:
        Stumble: they pass something that is no part of attention.
    """
    added = found.addend is not None and fixed(found.beta) != 0
    if added or number(found.alpha) != 1:
        raise Stumble(found.node, "it changes the product with the values")
    sizes = [found.size(label) for label in found.out_labels]
    out = variables("o", sizes, lifter.sizes)
    (key,) = variables("j", [found.size(found.contracted)], lifter.sizes)
    left, right = found.operands(out, key)
    for weights, value in ((left, right), (right, left)):
        parsed = Weights(found, softmax, out, key, weights.at, value)
        if _reaches(weights.node, softmax):
            _climb(parsed, weights, lifter)
            return parsed
    raise Stumble(found.node, "its weights do not come from the softmax")


def _reaches(node: fx.Node, softmax: fx.Node) -> bool:
    for _ in range(_MOST_NODES):
        if node is softmax:
            return True
        above = _operand(node, dialect.view(node), softmax)
        if above is None:
            return False
        node = above
    return False


def _operand(node: fx.Node, op: Op | None, softmax: fx.Node) -> fx.Node | None:
    """The operand of ``node`` that is the weights."""
    if op is None or op.name not in _PASSED:
        return None
    if op.name in ("mul", "where"):
        sides = [each for each in (op["x"], op["y"]) if isinstance(each, fx.Node)]
        return next((each for each in sides if _reaches(each, softmax)), None)
    return op["x"] if isinstance(op["x"], fx.Node) else None


def _climb(parsed: Weights, start: Element, lifter: Lifter) -> None:
    node, at, reader = start.node, start.at, parsed.product.node
    while node is not parsed.softmax:
        parsed.nodes.add(node)
        op = dialect.view(node)
        above = _operand(node, op, parsed.softmax)
        if op is None or above is None or dialect.written(node):
            raise Stumble(node, "it is no step between a softmax and the product with the values")
        if lifter.mutations.version(node, reader) is not node:
            raise Stumble(node, "the weights are written to in place")
        try:
            element = views.source(node, op, at, lifter.sizes, no_tensor_index)
        except Stuck as stuck:
            raise Stumble(node, str(stuck)) from None
        reader = node
        if element is not None:
            node, at = element
            continue
        _step(parsed, node, op, at)
        node = above
    if lifter.mutations.version(node, reader) is not node:
        raise Stumble(node, "the weights are written to in place")
    parsed.weights = at


def _step(parsed: Weights, node: fx.Node, op: Op, at: Index) -> None:
    """Account for a step that leaves every weight in its place."""
    if op.name == "dropout":
        parsed.dropout = max(parsed.dropout, dropout(op))
    elif op.name == "nan_to_num":
        if op["nan"] not in (None, 0, 0.0):
            raise Stumble(node, "it fills rows without visible keys")
    elif op.name == "getitem":
        # native_dropout answers (weights, mask).
        source = dialect.view(op["x"]) if isinstance(op["x"], fx.Node) else None
        if source is None or source.name != "dropout" or op["index"] != 0:
            raise Stumble(node, "it picks a part of the weights")
    elif op.name not in CASTS:
        zeroed = _zeroed(parsed, node, op, at)
        if not (zeroed.where and is_empty_row(zeroed.node, parsed.softmax)):
            parsed.zeroed.append(zeroed)


def _zeroed(parsed: Weights, node: fx.Node, op: Op, at: Index) -> Zeroed:
    """``masked_fill(weights, mask, 0)``, ``where(mask, weights, 0)`` or ``weights * mask``."""
    if op.name == "masked_fill":
        mask, fill, where = op["mask"], op["value"], True
    elif op.name == "where":
        kept = _reaches(op["x"], parsed.softmax) if isinstance(op["x"], fx.Node) else False
        mask, fill, where = op["condition"], op["y"] if kept else op["x"], not kept
    else:
        first = isinstance(op["x"], fx.Node) and _reaches(op["x"], parsed.softmax)
        mask, fill, where = op["y"] if first else op["x"], 0, False
    shape = dialect.shape(mask) if isinstance(mask, fx.Node) else None
    out = dialect.shape(node)
    if shape is None or out is None or number(fill) != 0:
        raise Stumble(node, "it changes weights")
    return Zeroed(mask, views.broadcast(shape, out, at), where, node)


def is_empty_row(mask: fx.Node, softmax: fx.Node) -> bool:
    """``not any(not (scores == -inf), -1, keepdim=True)``: a row without keys, as SDPA decomposes.

    Its weights are 0 in the operators too.
    """
    rank, dim = len(dialect.shape(softmax) or ()), _ops(softmax)["dim"]
    some = _inverted(mask)
    hidden = _inverted(some["x"])
    if some.name != "any" or some["keepdim"] is not True or not isinstance(dim, int) or not rank:
        return False
    return (
        isinstance(some["dim"], int)
        and some["dim"] % rank == dim % rank
        and hidden.name == "eq"
        and hidden["x"] is _ops(softmax)["x"]
        and hidden["y"] == float("-inf")
    )


def _inverted(node: Any) -> Op:
    """What ``node`` negates."""
    op = _ops(node)
    return _ops(op["x"]) if op.name in ("logical_not", "not") else Op("", {})


def _ops(node: Any) -> Op:
    op = dialect.view(node) if isinstance(node, fx.Node) else None
    return op or Op("", {})


def dropout(op: Op) -> float:
    """The probability with which ``op`` drops: 0 outside training."""
    training = op["training"]
    if training is False:
        return 0.0
    p: Any = op["p"]
    return 0.5 if p is None else number(p)


def no_tensor_index(node: fx.Node, index: Index) -> Affine:
    raise Stuck("elements picked by an index tensor")
