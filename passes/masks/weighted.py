"""Arithmetic on a floating-point element times a position: the biases that masks may carry."""

from __future__ import annotations

from dataclasses import replace

from nsa_compile.passes import dialect
from nsa_compile.passes.masks.affine import Affine
from nsa_compile.passes.masks.values import Stuck, Unknown, Value, Weighted

UNKNOWN = (Unknown, Weighted)


def no_weights(x: Value, y: Value) -> Value:
    """For operators that such elements do not go through."""
    found = x if isinstance(x, UNKNOWN) else y
    assert isinstance(found, UNKNOWN)
    raise Stuck(f"arithmetic on {dialect.describe(found.load.node)}")


def plus(x: Value, y: Value) -> Value:
    if not isinstance(x, UNKNOWN):
        x, y = y, x
    first = _weighted(x)
    if isinstance(y, UNKNOWN):
        second = _weighted(y)
        if (first.load, first.factor) != (second.load, second.factor):
            no_weights(x, y)
        return replace(
            first,
            times=first.times + second.times,
            rest=_sum(first.rest, second.rest),
            dtype=min(first.dtype, second.dtype, key=lambda d: d.itemsize),
        )
    return replace(first, rest=_sum(first.rest, y))


def minus(x: Value, y: Value) -> Value:
    if isinstance(y, UNKNOWN):
        return plus(x, times(y, Affine(-1)))
    if isinstance(y, (Affine, float)):
        return plus(x, -y)
    return no_weights(x, y)


def times(x: Value, y: Value) -> Value:
    if not isinstance(x, UNKNOWN):
        x, y = y, x
    first = _weighted(x)
    constant = _constant(y)
    if constant is not None and constant.is_integer():
        rest = first.rest * constant if isinstance(first.rest, float) else None
        whole = first.rest.times(int(constant)) if isinstance(first.rest, Affine) else rest
        assert whole is not None
        return replace(first, times=first.times.times(int(constant)), rest=whole)
    if constant is not None and _constant(first.rest) is not None:
        rest = (_constant(first.rest) or 0.0) * constant
        return replace(first, factor=first.factor * constant, rest=_exact(rest))
    if isinstance(y, Affine) and first.times.constant is not None and first.rest == Affine():
        return replace(first, times=y.times(first.times.constant))
    return no_weights(x, y)


def over(x: Value, y: Value) -> Value:
    constant = _constant(y)
    if constant is None or constant == 0:
        return no_weights(x, y)
    return times(x, 1 / constant)


def _weighted(value: Value) -> Weighted:
    if isinstance(value, Unknown):
        return Weighted(value.load, Affine(1))
    assert isinstance(value, Weighted)
    return value


def _constant(value: Value) -> float | None:
    if isinstance(value, Affine):
        return None if value.constant is None else float(value.constant)
    return value if isinstance(value, float) else None


def _sum(x: Value, y: Value) -> Affine | float:
    if isinstance(x, Affine) and isinstance(y, Affine):
        return x + y
    first, second = _constant(x), _constant(y)
    if first is None or second is None:
        raise Stuck("a position plus a fraction")
    return _exact(first + second)


def _exact(value: float) -> Affine | float:
    return Affine(int(value)) if value.is_integer() else value
