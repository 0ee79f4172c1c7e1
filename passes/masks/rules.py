"""What an element of each mask-building operator is, in terms of elements of its inputs."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import fx

from nsa_compile.passes import dialect
from nsa_compile.passes.dialect import Op
from nsa_compile.passes.masks.affine import Affine, Var, affine, floor_div, modulo
from nsa_compile.passes.masks.conditions import (
    CONDITIONS,
    FALSE,
    TRUE,
    Condition,
    Value,
    all_of,
    any_of,
    as_number,
    choose,
    eq,
    ge,
    map_leaves,
    ne,
    negation,
    variables,
)
from nsa_compile.passes.masks.lift import Lifter, Rule, condition, numbers
from nsa_compile.passes.masks.views import Index, Stuck


def _arange(lifter: Lifter, node: fx.Node, op: Op, index: Index) -> Value:
    bounds = list(op["range"] or ())
    start = op["start"] if len(bounds) < 2 else bounds[0]
    step = op["step"] if len(bounds) < 3 else bounds[2]
    first = lifter.sizes.integer(0 if start is None else start)
    by = 1 if step is None else step
    if first is None or not isinstance(by, int):
        raise Stuck("an arange with a run-time start or step")
    return first + index[0].times(by)


def _filled(value: int) -> Rule:
    def rule(lifter: Lifter, node: fx.Node, op: Op, index: Index) -> Value:
        return _cast(affine(value), dialect.value(node).dtype)

    return rule


def _full(lifter: Lifter, node: fx.Node, op: Op, index: Index) -> Value:
    value = op["fill_value"]
    if isinstance(value, fx.Node) and dialect.shape(value) is not None:
        return _cast(lifter.lift(value, ()), dialect.value(node).dtype)
    return _cast(lifter.scalar(value), dialect.value(node).dtype)


def _fill(lifter: Lifter, node: fx.Node, op: Op, index: Index) -> Value:
    return _cast(lifter.operand(node, op["value"], index), dialect.value(node).dtype)


def _tensor(lifter: Lifter, node: fx.Node, op: Op, index: Index) -> Value:
    if isinstance(op["data"], (list, tuple)):
        raise Stuck("a tensor of given values")
    return _cast(lifter.scalar(op["data"]), dialect.value(node).dtype)


def _to(lifter: Lifter, node: fx.Node, op: Op, index: Index) -> Value:
    return _cast(lifter.lift(op["x"], index), dialect.value(node).dtype)


def _cast(value: Value, dtype: torch.dtype) -> Value:
    if dtype == torch.bool:
        return condition(value)
    if isinstance(value, CONDITIONS):
        return as_number(value)
    if not dtype.is_floating_point:
        return map_leaves(value, _truncated)
    return value


def _truncated(value: Value) -> Value:
    if isinstance(value, float) and math.isfinite(value):
        return Affine(int(value))
    if isinstance(value, Affine):
        return value
    raise Stuck("a cast of an unknown value to an integer")


def _compare(of: Callable[[Affine], Condition], decide: Callable[[float], bool]) -> Rule:
    """``x - y`` compared with 0: ``of`` for integers, ``decide`` for other constants."""

    def leaf(x: Value, y: Value) -> Value:
        if isinstance(x, Affine) and isinstance(y, Affine):
            return of(x - y)
        return TRUE if decide(_difference(x, y)) else FALSE

    def rule(lifter: Lifter, node: fx.Node, op: Op, index: Index) -> Value:
        return _pairwise(lifter, node, op, index, leaf)

    return rule


def _difference(x: Value, y: Value) -> float:
    first, second = _constant(x), _constant(y)
    return 0.0 if first == second else first - second


def _constant(value: Value) -> float:
    if isinstance(value, float):
        return value
    if isinstance(value, Affine) and value.constant is not None:
        return float(value.constant)
    raise Stuck("a comparison of a position with a fraction")


def _pairwise(
    lifter: Lifter, node: fx.Node, op: Op, index: Index, leaf: Callable[[Value, Value], Value]
) -> Value:
    """``leaf`` of every pair of branches of the operands, as numbers."""
    x = numbers(lifter.operand(node, op["x"], index))
    y = numbers(lifter.operand(node, op["y"], index))
    return map_leaves(x, lambda a: map_leaves(y, lambda b: leaf(a, b)))


def _arithmetic(
    exact: Callable[[Affine, Affine], Affine | None], constant: Callable[[float, float], float]
) -> Rule:
    """``exact`` on affine operands (None: it does not stay affine), else ``constant``."""

    def leaf(x: Value, y: Value) -> Value:
        if isinstance(x, Affine) and isinstance(y, Affine):
            found = exact(x, y)
            if found is not None:
                return found
        result = constant(_constant(x), _constant(y))
        return Affine(int(result)) if result.is_integer() else result

    def rule(lifter: Lifter, node: fx.Node, op: Op, index: Index) -> Value:
        if op["alpha"] not in (None, 1) or op["rounding_mode"] is not None:
            raise Stuck(f"{op.name} with alpha or rounding_mode")
        return _pairwise(lifter, node, op, index, leaf)

    return rule


def _times(x: Affine, y: Affine) -> Affine | None:
    for factor, other in ((x.constant, y), (y.constant, x)):
        if factor is not None:
            return other.times(factor)
    raise Stuck("a product of two positions")


def _multiply(x: float, y: float) -> float:
    return x * y  # 0 * inf is nan, which is neither kept nor masked


def _over(x: Affine, y: Affine) -> Affine | None:
    if y.constant in (1, -1):
        return x.times(y.const)
    return None


def _divide(x: float, y: float) -> float:
    if y == 0:
        raise Stuck("a division by zero")
    return x / y


def _floor(x: Affine, y: Affine) -> Affine | None:
    return floor_div(x, _positive(y))


def _mod(x: Affine, y: Affine) -> Affine | None:
    return modulo(x, _positive(y))


def _positive(y: Affine) -> int:
    if y.constant is None or y.constant < 1:
        raise Stuck("a division by a run-time value")
    return y.constant


def _no_floats(x: float, y: float) -> float:
    raise Stuck("integer division of a fraction")


def _neg(lifter: Lifter, node: fx.Node, op: Op, index: Index) -> Value:
    return map_leaves(numbers(lifter.operand(node, op["x"], index)), _negative)


def _negative(value: Value) -> Value:
    return -value if isinstance(value, (Affine, float)) else value


def _abs(lifter: Lifter, node: fx.Node, op: Op, index: Index) -> Value:
    return map_leaves(
        numbers(lifter.operand(node, op["x"], index)), lambda x: _larger(x, _negative(x))
    )


def _larger(x: Value, y: Value) -> Value:
    if isinstance(x, Affine) and isinstance(y, Affine):
        return choose(ge(x - y), x, y)
    return x if _difference(x, y) >= 0 else y


def _smaller(x: Value, y: Value) -> Value:
    return _negative(_larger(_negative(x), _negative(y)))


def _extreme(leaf: Callable[[Value, Value], Value]) -> Rule:
    def rule(lifter: Lifter, node: fx.Node, op: Op, index: Index) -> Value:
        return _pairwise(lifter, node, op, index, leaf)

    return rule


def _clamp(lifter: Lifter, node: fx.Node, op: Op, index: Index) -> Value:
    value = numbers(lifter.operand(node, op["x"], index))
    for name, leaf in (("min", _larger), ("max", _smaller)):
        if op[name] is not None:
            limit = numbers(lifter.operand(node, op[name], index))
            value = map_leaves(value, lambda a, f=leaf, b=limit: map_leaves(b, lambda c: f(a, c)))
    return value


def _logic(join: Callable[[list[Condition]], Condition], *, logical: bool) -> Rule:
    """and / or: bitwise forms only on booleans, logical forms on anything."""

    def rule(lifter: Lifter, node: fx.Node, op: Op, index: Index) -> Value:
        if not logical and dialect.value(node).dtype != torch.bool:
            raise Stuck("bitwise logic on integers")
        x = condition(lifter.operand(node, op["x"], index))
        y = condition(lifter.operand(node, op["y"], index))
        return join([x, y])

    return rule


def _differ(parts: list[Condition]) -> Condition:
    x, y = parts
    return any_of([all_of([x, negation(y)]), all_of([negation(x), y])])


def _not(lifter: Lifter, node: fx.Node, op: Op, index: Index) -> Value:
    if dialect.value(node).dtype != torch.bool:
        raise Stuck("bitwise not on integers")
    return negation(condition(lifter.operand(node, op["x"], index)))


def _logical_not(lifter: Lifter, node: fx.Node, op: Op, index: Index) -> Value:
    return negation(condition(lifter.operand(node, op["x"], index)))


def _where(lifter: Lifter, node: fx.Node, op: Op, index: Index) -> Value:
    dtype = dialect.value(node).dtype
    test = condition(lifter.operand(node, op["condition"], index))
    then = _cast(lifter.operand(node, op["x"], index), dtype)
    otherwise = _cast(lifter.operand(node, op["y"], index), dtype)
    return choose(test, then, otherwise)


def _masked_fill(lifter: Lifter, node: fx.Node, op: Op, index: Index) -> Value:
    dtype = dialect.value(node).dtype
    test = condition(lifter.operand(node, op["mask"], index))
    then = _cast(lifter.operand(node, op["value"], index), dtype)
    return choose(test, then, lifter.operand(node, op["x"], index))


def _triangle(sign: int) -> Rule:
    """tril (``sign`` 1) keeps ``column <= row + diagonal``, triu (-1) ``column >= row + diagonal``."""

    def rule(lifter: Lifter, node: fx.Node, op: Op, index: Index) -> Value:
        diagonal = lifter.sizes.integer(op["diagonal"] or 0)
        if diagonal is None:
            raise Stuck(f"{op.name} with a run-time diagonal")
        row, column = index[-2:]
        kept = ge((row + diagonal - column).times(sign))
        zero = _cast(affine(0), dialect.value(node).dtype)
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

    x, y = numbers(x), numbers(y)
    return map_leaves(x, lambda a: map_leaves(y, lambda b: leaf(a, b)))


def _cumsum(lifter: Lifter, node: fx.Node, op: Op, index: Index) -> Value:
    """``(t + 1) * c`` when every element is the same constant c."""
    shape = lifter.sizes.shape(node) or []
    dim = op["dim"] % len(shape)
    term = Var(f"t_{node.name}", shape[dim])
    inner = (*index[:dim], affine(term), *index[dim + 1 :])
    element = numbers(lifter.lift(op["x"], inner))
    if not isinstance(element, Affine) or element.constant is None or variables(element):
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
        parts.append((ge(-at + shape[dim] - 1), _cast(element, dtype)))
        at = at - shape[dim]
    value = parts[-1][1]
    for inside, element in reversed(parts[:-1]):
        value = choose(inside, element, value)
    return value


_FLOATS: dict[str, Callable[[float, float], float]] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "rsub": lambda x, y: y - x,
}

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
    **dict.fromkeys(
        ("to", "type", "type_as", "bool", "int", "long", "float", "half", "bfloat16", "double"), _to
    ),
    "eq": _compare(eq, lambda d: d == 0),
    "ne": _compare(ne, lambda d: d != 0),
    "ge": _compare(ge, lambda d: d >= 0),
    "gt": _compare(lambda d: ge(d - 1), lambda d: d > 0),
    "le": _compare(lambda d: ge(-d), lambda d: d <= 0),
    "lt": _compare(lambda d: ge(-d - 1), lambda d: d < 0),
    "and": _logic(all_of, logical=False),
    "or": _logic(any_of, logical=False),
    "xor": _logic(_differ, logical=False),
    "not": _not,
    "logical_not": _logical_not,
    "logical_and": _logic(all_of, logical=True),
    "logical_or": _logic(any_of, logical=True),
    "logical_xor": _logic(_differ, logical=True),
    "add": _arithmetic(lambda x, y: x + y, _FLOATS["add"]),
    "sub": _arithmetic(lambda x, y: x - y, _FLOATS["sub"]),
    "rsub": _arithmetic(lambda x, y: y - x, _FLOATS["rsub"]),
    "mul": _arithmetic(_times, _multiply),
    "div": _arithmetic(_over, _divide),
    "floordiv": _arithmetic(_floor, _no_floats),
    "mod": _arithmetic(_mod, _no_floats),
    "neg": _neg,
    "abs": _abs,
    "minimum": _extreme(_smaller),
    "maximum": _extreme(_larger),
    "clamp": _clamp,
    "where": _where,
    "masked_fill": _masked_fill,
    "tril": _triangle(1),
    "triu": _triangle(-1),
    "diff": _diff,
    "cumsum": _cumsum,
    "cat": _cat,
}
