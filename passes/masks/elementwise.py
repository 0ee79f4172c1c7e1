"""Elements of pointwise operators: arithmetic, comparison, logic, selection."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import fx

from nsa_compile.passes import dialect
from nsa_compile.passes.dialect import Op
from nsa_compile.passes.masks.affine import Affine, Load, affine, floor_div, lower, modulo
from nsa_compile.passes.masks.cast import cast, condition, numbers
from nsa_compile.passes.masks.conditions import FALSE, TRUE, Condition, eq, ge, ne
from nsa_compile.passes.masks.lift import Lifter, Rule
from nsa_compile.passes.masks.logic import all_of, any_of, negation
from nsa_compile.passes.masks.values import (
    Stuck,
    Value,
    as_number,
    by_cases,
    choose,
    is_bit,
    map_leaves,
    pairs,
)
from nsa_compile.passes.masks.views import Index
from nsa_compile.passes.masks.weighted import UNKNOWN, minus, no_weights, over, plus, times


def _compare(of: Callable[[Affine], Condition], decide: Callable[[float], bool]) -> Rule:
    """``x - y`` compared with 0: ``of`` for integers, ``decide`` for other constants."""

    def leaf(x: Value, y: Value) -> Value:
        if isinstance(x, Affine) and isinstance(y, Affine):
            return map_leaves(by_cases(x - y), lambda d: _compared(d))
        return TRUE if decide(_difference(x, y)) else FALSE

    def _compared(difference: Value) -> Condition:
        assert isinstance(difference, Affine)
        return of(difference)

    def rule(lifter: Lifter, node: fx.Node, op: Op, index: Index) -> Value:
        found = _pairwise(lifter, node, op, index, leaf)
        if found in (TRUE, FALSE):
            lifter.refuted.update(_inputs(lifter, node, op, index))
        return found

    return rule


def _inputs(lifter: Lifter, node: fx.Node, op: Op, index: Index) -> Iterator[fx.Node]:
    """The operands that are graph inputs as they are."""
    for name in "xy":
        value = lifter.operand(node, op[name], index)
        atoms = value.terms if isinstance(value, Affine) else ()
        yield from (atom.node for atom in atoms if isinstance(atom, Load))


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
    return pairs(x, y, _cased(leaf))


def _cased(leaf: Callable[[Value, Value], Value]) -> Callable[[Value, Value], Value]:
    """``leaf``, or where it is stuck on elements that are 0 or 1, ``leaf`` of each case."""

    def tried(x: Value, y: Value) -> Value:
        try:
            return leaf(x, y)
        except Stuck:
            cases = by_cases(x), by_cases(y)
            if cases == (x, y):
                raise
            return pairs(*cases, leaf)

    return tried


def _arithmetic(
    exact: Callable[[Affine, Affine], Affine | None],
    constant: Callable[[float, float], float],
    weighted: Callable[[Value, Value], Value] = no_weights,
) -> Rule:
    """``exact`` on affine operands (None: it does not stay affine), else ``constant``.

    ``weighted`` where an operand reads a floating-point element that the proof does not look into.
    """

    def leaf(x: Value, y: Value) -> Value:
        if isinstance(x, Affine) and isinstance(y, Affine):
            found = exact(x, y)
            if found is not None:
                return found
        if isinstance(x, UNKNOWN) or isinstance(y, UNKNOWN):
            return weighted(x, y)
        result = constant(_constant(x), _constant(y))
        return Affine(int(result)) if result.is_integer() else result

    def rule(lifter: Lifter, node: fx.Node, op: Op, index: Index) -> Value:
        if op["alpha"] not in (None, 1):
            raise Stuck(f"{op.name} with alpha")
        x, y = (map_leaves(lifter.operand(node, op[n], index), as_number) for n in "xy")
        return pairs(x, y, _cased(leaf))

    return rule


def _times(x: Affine, y: Affine) -> Affine | None:
    for factor, other in ((x.constant, y), (y.constant, x)):
        if factor is not None:
            return other.times(factor)
    raise Stuck("a product of two positions")


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


def _truncated(x: Affine, y: Affine) -> Affine | None:
    low = lower(x)
    if low is None or low < 0:
        raise Stuck("a division of what may be negative, rounded towards 0")
    return _floor(x, y)


def _mod(x: Affine, y: Affine) -> Affine | None:
    return modulo(x, _positive(y))


def _positive(y: Affine) -> int:
    if y.constant is None or y.constant < 1:
        raise Stuck("a division by a run-time value")
    return y.constant


def _div(lifter: Lifter, node: fx.Node, op: Op, index: Index) -> Value:
    mode = op["rounding_mode"]
    rules = {None: _EXACT_DIVISION, "floor": _FLOOR_DIVISION, "trunc": _TRUNCATED_DIVISION}
    return rules[mode](lifter, node, op, index)


def _no_floats(x: float, y: float) -> float:
    raise Stuck("integer division of a fraction")


def _neg(lifter: Lifter, node: fx.Node, op: Op, index: Index) -> Value:
    return _negative(map_leaves(lifter.operand(node, op["x"], index), as_number))


def _negative(value: Value) -> Value:
    return map_leaves(
        value, lambda v: -v if isinstance(v, (Affine, float)) else times(v, affine(-1))
    )


def _abs(lifter: Lifter, node: fx.Node, op: Op, index: Index) -> Value:
    return map_leaves(
        numbers(lifter.operand(node, op["x"], index)), lambda x: _larger(x, _negative(x))
    )


def _larger(x: Value, y: Value) -> Value:
    if isinstance(x, Affine) and isinstance(y, Affine):
        return choose(ge(x - y), x, y)
    difference = _difference(x, y)
    if math.isnan(difference):
        return math.nan
    return x if difference >= 0 else y


def _smaller(x: Value, y: Value) -> Value:
    return _negative(_larger(_negative(x), _negative(y)))


def _extreme(leaf: Callable[[Value, Value], Value]) -> Rule:
    def rule(lifter: Lifter, node: fx.Node, op: Op, index: Index) -> Value:
        if op.name in ("max", "min"):  # torch.max(x, y); with a dim it is a reduction
            if not isinstance(op["dim"] or op["y"], fx.Node) or op["keepdim"] is not None:
                raise Stuck("the largest of many elements")
            op = Op(op.name, {"x": op["x"], "y": op["dim"] or op["y"]})
        return _pairwise(lifter, node, op, index, leaf)

    return rule


def _clamp(lifter: Lifter, node: fx.Node, op: Op, index: Index) -> Value:
    value = numbers(lifter.operand(node, op["x"], index))
    if op["min"] is not None:
        value = pairs(value, numbers(lifter.operand(node, op["min"], index)), _larger)
    if op["max"] is not None:
        value = pairs(value, numbers(lifter.operand(node, op["max"], index)), _smaller)
    return value


def _logic(join: Callable[[list[Condition]], Condition], *, logical: bool) -> Rule:
    """and / or: bitwise forms only on booleans and bits, logical forms on anything."""

    def rule(lifter: Lifter, node: fx.Node, op: Op, index: Index) -> Value:
        x, y = (lifter.operand(node, op[n], index) for n in "xy")
        bitwise = not logical and dialect.value(node).dtype != torch.bool
        if bitwise and not (is_bit(x) and is_bit(y)):
            raise Stuck("bitwise logic on integers that may be more than 0 and 1")
        joined = join([condition(x), condition(y)])
        return as_number(joined) if bitwise else joined

    return rule


def _differ(parts: list[Condition]) -> Condition:
    x, y = parts
    return any_of([all_of([x, negation(y)]), all_of([negation(x), y])])


def _not(lifter: Lifter, node: fx.Node, op: Op, index: Index) -> Value:
    value = lifter.operand(node, op["x"], index)
    dtype = dialect.value(node).dtype
    if dtype == torch.bool:
        return negation(condition(value))
    # -1 - x in two's complement, 255 - x in uint8.
    top = affine(-1 if dtype.is_signed else torch.iinfo(dtype).max)

    def flipped(x: Value) -> Value:
        if not isinstance(x, Affine):
            raise Stuck("bitwise not of an unknown value")
        return top - x

    return map_leaves(numbers(value), flipped)


def _logical_not(lifter: Lifter, node: fx.Node, op: Op, index: Index) -> Value:
    return negation(condition(lifter.operand(node, op["x"], index)))


def _where(lifter: Lifter, node: fx.Node, op: Op, index: Index) -> Value:
    dtype = dialect.value(node).dtype
    test = condition(lifter.operand(node, op["condition"], index))
    then = cast(lifter.operand(node, op["x"], index), dtype)
    otherwise = cast(lifter.operand(node, op["y"], index), dtype)
    return choose(test, then, otherwise)


def _masked_fill(lifter: Lifter, node: fx.Node, op: Op, index: Index) -> Value:
    dtype = dialect.value(node).dtype
    test = condition(lifter.operand(node, op["mask"], index))
    then = cast(lifter.operand(node, op["value"], index), dtype)
    return choose(test, then, lifter.operand(node, op["x"], index))


_EXACT_DIVISION = _arithmetic(_over, _divide, over)
_FLOOR_DIVISION = _arithmetic(_floor, _no_floats)
_TRUNCATED_DIVISION = _arithmetic(_truncated, _no_floats)

RULES: dict[str, Rule] = {
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
    "add": _arithmetic(lambda x, y: x + y, lambda x, y: x + y, plus),
    "sub": _arithmetic(lambda x, y: x - y, lambda x, y: x - y, minus),
    "rsub": _arithmetic(lambda x, y: y - x, lambda x, y: y - x, lambda x, y: minus(y, x)),
    "mul": _arithmetic(_times, lambda x, y: x * y, times),
    "div": _div,
    "floordiv": _FLOOR_DIVISION,
    "mod": _arithmetic(_mod, _no_floats),
    "neg": _neg,
    "abs": _abs,
    "minimum": _extreme(_smaller),
    "maximum": _extreme(_larger),
    "min": _extreme(_smaller),
    "max": _extreme(_larger),
    "clamp": _clamp,
    "where": _where,
    "masked_fill": _masked_fill,
}
