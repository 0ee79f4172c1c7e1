"""Elements of operators that create or rearrange: arange, fills, tril, diff, cumsum, cat."""

from __future__ import annotations

from torch import fx

from nsa_compile.passes import dialect
from nsa_compile.passes.dialect import Op
from nsa_compile.passes.masks.affine import Affine, Var, affine
from nsa_compile.passes.masks.cast import cast, numbers
from nsa_compile.passes.masks.conditions import Condition, eq, ge
from nsa_compile.passes.masks.lift import Lifter, Rule
from nsa_compile.passes.masks.values import Stuck, Value, choose, pairs
from nsa_compile.passes.masks.views import Index


def _arange(lifter: Lifter, node: fx.Node, op: Op, index: Index) -> Value:
    bounds = list(op["range"] or ())  # (end), (start, end) or (start, end, step), or by name
    starts = len(bounds) > 1 or (len(bounds) == 1 and op["end"] is not None)
    start = bounds[0] if starts else op["start"]
    step = op["step"] if len(bounds) < 3 else bounds[2]
    first = lifter.sizes.integer(0 if start is None else start)
    by = 1 if step is None else step
    if first is None or not isinstance(by, int):
        raise Stuck("an arange with a run-time start or step")
    return first + index[0].times(by)


def _filled(value: int) -> Rule:
    def rule(lifter: Lifter, node: fx.Node, op: Op, index: Index) -> Value:
        return cast(affine(value), dialect.value(node).dtype)

    return rule


def _full(lifter: Lifter, node: fx.Node, op: Op, index: Index) -> Value:
    value = op["fill_value"]
    if isinstance(value, fx.Node) and dialect.shape(value) is not None:
        return cast(lifter.lift(value, ()), dialect.value(node).dtype)
    return cast(lifter.scalar(value), dialect.value(node).dtype)


def _fill(lifter: Lifter, node: fx.Node, op: Op, index: Index) -> Value:
    return cast(lifter.operand(node, op["value"], index), dialect.value(node).dtype)


def _tensor(lifter: Lifter, node: fx.Node, op: Op, index: Index) -> Value:
    if isinstance(op["data"], (list, tuple)):
        raise Stuck("a tensor of given values")
    return cast(lifter.scalar(op["data"]), dialect.value(node).dtype)


def _eye(lifter: Lifter, node: fx.Node, op: Op, index: Index) -> Value:
    return cast(eq(index[0] - index[1]), dialect.value(node).dtype)


def _triangle(sign: int) -> Rule:
    """tril (``sign`` 1) keeps ``column <= row + diagonal``, triu (-1) ``>=``."""

    def rule(lifter: Lifter, node: fx.Node, op: Op, index: Index) -> Value:
        diagonal = lifter.sizes.integer(op["diagonal"] or 0)
        if diagonal is None:
            raise Stuck(f"{op.name} with a run-time diagonal")
        row, column = index[-2:]
        kept = ge((row + diagonal - column).times(sign))
        zero = cast(affine(0), dialect.value(node).dtype)
        return choose(kept, lifter.lift(op["x"], index), zero)

    return rule


def _diff(lifter: Lifter, node: fx.Node, op: Op, index: Index) -> Value:
    """``x[t] - x[t - 1]``, with ``prepend`` in front of x."""
    if op["n"] not in (None, 1) or op["append"] is not None:
        raise Stuck("diff of higher order or with append")
    shape = lifter.sizes.shape(node) or []
    dim = (-1 if op["dim"] is None else op["dim"]) % len(shape)
    at = index[dim]

    def part(tensor: fx.Node, position: Affine) -> Value:
        return lifter.lift(tensor, (*index[:dim], position, *index[dim + 1 :]))

    if op["prepend"] is None:
        return _minus(part(op["x"], at + 1), part(op["x"], at))
    front = (lifter.sizes.shape(op["prepend"]) or [])[dim]
    if front.constant != 1:
        raise Stuck("diff with more than one element in front")
    before = choose(eq(at), part(op["prepend"], Affine()), part(op["x"], at - 1))
    return _minus(part(op["x"], at), before)


def _minus(x: Value, y: Value) -> Value:
    def leaf(a: Value, b: Value) -> Value:
        if isinstance(a, Affine) and isinstance(b, Affine):
            return a - b
        raise Stuck("a difference of unknown values")

    return pairs(numbers(x), numbers(y), leaf)


def _cumsum(lifter: Lifter, node: fx.Node, op: Op, index: Index) -> Value:
    """``(t + 1) * c`` when every element is the same constant c."""
    shape = lifter.sizes.shape(node) or []
    dim: int = op["dim"] % len(shape)
    term = Var(f"t_{node.name}", shape[dim])
    inner = (*index[:dim], affine(term), *index[dim + 1 :])
    element = numbers(lifter.lift(op["x"], inner))
    if not isinstance(element, Affine) or element.constant is None:
        raise Stuck("a cumsum of elements that are not one constant")
    return (index[dim] + 1).times(element.constant)


def _cat(lifter: Lifter, node: fx.Node, op: Op, index: Index) -> Value:
    tensors = list(op["tensors"])
    rank = len(index)
    dim = (op["dim"] or 0) % rank
    dtype = dialect.value(node).dtype
    at = index[dim]
    parts: list[tuple[Condition, Value]] = []
    for tensor in tensors:
        shape = lifter.sizes.shape(tensor)
        if shape is None or len(shape) != rank:
            raise Stuck("cat of tensors of different rank")
        element = lifter.lift(tensor, (*index[:dim], at, *index[dim + 1 :]))
        parts.append((ge(-at + shape[dim] - 1), cast(element, dtype)))
        at = at - shape[dim]
    value = parts[-1][1]
    for inside, element in reversed(parts[:-1]):
        value = choose(inside, element, value)
    return value


RULES: dict[str, Rule] = {
    "arange": _arange,
    "full": _full,
    "new_full": _full,
    "full_like": _full,
    "ones": _filled(1),
    "new_ones": _filled(1),
    "ones_like": _filled(1),
    "zeros": _filled(0),
    "new_zeros": _filled(0),
    "zeros_like": _filled(0),
    "tensor": _tensor,
    "fill": _fill,
    "eye": _eye,
    "tril": _triangle(1),
    "triu": _triangle(-1),
    "diff": _diff,
    "cumsum": _cumsum,
    "cat": _cat,
}
