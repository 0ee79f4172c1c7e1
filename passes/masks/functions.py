"""Elements of functions of one number: log, sign, relu, nan_to_num, a shift of bits."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import fx

from nsa_compile.passes import dialect
from nsa_compile.passes.dialect import Op
from nsa_compile.passes.masks.affine import Affine, affine, floor_div
from nsa_compile.passes.masks.cast import numbers
from nsa_compile.passes.masks.conditions import eq, ge
from nsa_compile.passes.masks.lift import Lifter, Rule
from nsa_compile.passes.masks.values import Stuck, Value, by_cases, choose, map_leaves
from nsa_compile.passes.masks.views import Index


def _of(leaf: Callable[[Affine | float], Value]) -> Rule:
    """``leaf`` of every branch of the operand, as a number."""

    def known(value: Value) -> Value:
        assert isinstance(value, (Affine, float))  # numbers leaves nothing else
        return leaf(value)

    def rule(lifter: Lifter, node: fx.Node, op: Op, index: Index) -> Value:
        return map_leaves(numbers(lifter.operand(node, op["x"], index)), known)

    return rule


def _constant(function: Callable[[float], float]) -> Callable[[Affine | float], Value]:
    """``function`` of constants only."""

    def leaf(value: Affine | float) -> Value:
        return map_leaves(by_cases(value), constant)

    def constant(value: Value) -> Value:
        number = value.constant if isinstance(value, Affine) else value
        if not isinstance(number, (int, float)):
            raise Stuck("a function of a position")
        result = function(float(number))
        return affine(int(result)) if result.is_integer() else result

    return leaf


def _log(value: float) -> float:
    if value == 0:
        return -math.inf
    return math.log(value) if value > 0 else math.nan


def _sign(value: Affine | float) -> Value:
    if isinstance(value, Affine):
        return choose(ge(value - 1), affine(1), choose(eq(value), affine(0), affine(-1)))
    return _constant(lambda x: math.copysign(1.0, x) if x == x else 0.0)(value)


def _relu(value: Affine | float) -> Value:
    if isinstance(value, Affine):
        return choose(ge(value), value, affine(0))
    return affine(0) if value <= 0 else value  # NaN stays


def _nan_to_num(lifter: Lifter, node: fx.Node, op: Op, index: Index) -> Value:
    dtype = dialect.value(node).dtype
    if not dtype.is_floating_point:
        return lifter.lift(op["x"], index)
    top = torch.finfo(dtype).max
    nan, high, low = (
        default if op[name] is None else op[name]
        for name, default in (("nan", 0.0), ("posinf", top), ("neginf", -top))
    )

    def replaced(value: Affine | float) -> Value:
        if isinstance(value, Affine) or math.isfinite(value):
            return value
        return lifter.scalar(nan if math.isnan(value) else high if value > 0 else low)

    return _of(replaced)(lifter, node, op, index)


def _rshift(lifter: Lifter, node: fx.Node, op: Op, index: Index) -> Value:
    by = op["y"]
    if not isinstance(by, int) or not 0 <= by < 31:
        raise Stuck("a shift by a run-time count")

    def shifted(value: Affine | float) -> Value:
        if not isinstance(value, Affine):
            raise Stuck("a shift of a fraction")
        return floor_div(value, 2**by)

    return _of(shifted)(lifter, node, op, index)


RULES: dict[str, Rule] = {
    "log": _of(_constant(_log)),
    "sign": _of(_sign),
    "relu": _of(_relu),
    "nan_to_num": _nan_to_num,
    "rshift": _rshift,
}
