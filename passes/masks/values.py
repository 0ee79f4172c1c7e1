"""What an element of a tensor can be: an integer, a condition, a constant, a choice of those."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch

from nsa_compile.passes.masks import conditions
from nsa_compile.passes.masks.affine import Affine, Load, Var, affine
from nsa_compile.passes.masks.conditions import (
    CONDITIONS,
    FALSE,
    TRUE,
    Condition,
    Eq,
    Ne,
    ne,
)
from nsa_compile.passes.masks.logic import all_of, any_of, negation

_MOST_PAIRS = 64
_ZERO = Affine()


class Stuck(Exception):
    """Lifting met something it does not understand; never leaves passes/masks."""


@dataclass(frozen=True)
class Choice:
    """``then`` where ``condition`` holds, else ``otherwise``."""

    condition: Condition
    then: Value
    otherwise: Value


@dataclass(frozen=True)
class Unknown:
    """A floating-point element that the proof does not look into."""

    load: Load


@dataclass(frozen=True)
class Weighted:
    """``load * times * factor + rest``: a bias that grows with positions, such as ALiBi's.

    ``dtype`` is the narrowest that the value was rounded to on its way.
    """

    load: Load
    times: Affine
    factor: float = 1.0
    rest: Affine | float = _ZERO
    dtype: torch.dtype = torch.float32


# A float is a constant that is no integer (or infinite); other numbers are Affine.
Value: TypeAlias = Affine | Condition | Choice | Unknown | Weighted | float


def choose(condition: Condition, then: Value, otherwise: Value) -> Value:
    """``then`` where ``condition`` holds, else ``otherwise``."""
    if condition == TRUE or then == otherwise:
        return then
    if condition == FALSE:
        return otherwise
    if isinstance(then, CONDITIONS) and isinstance(otherwise, CONDITIONS):
        return any_of([all_of([condition, then]), all_of([negation(condition), otherwise])])
    if isinstance(condition, Eq) and _on_line(condition, then) == otherwise:
        return otherwise
    return Choice(condition, then, otherwise)


def truth(value: Value) -> Condition | None:
    """``value != 0``, or None when that cannot be said."""
    if isinstance(value, CONDITIONS):
        return value
    if isinstance(value, Affine):
        return ne(value)
    if isinstance(value, float):
        return TRUE if value != 0 else FALSE
    if isinstance(value, (Unknown, Weighted)):
        return None
    then, otherwise = truth(value.then), truth(value.otherwise)
    if then is None or otherwise is None:
        return None
    decided = choose(value.condition, then, otherwise)
    assert isinstance(decided, CONDITIONS)
    return decided


def as_number(value: Value) -> Value:
    """A condition as 1 or 0; a boolean element that is read whole stays that element."""
    if not isinstance(value, CONDITIONS):
        return value
    if isinstance(value, Ne) and _is_boolean_load(value.of):
        return value.of
    return choose(value, affine(1), affine(0))


def leaves(value: Value) -> list[Value]:
    """What ``value`` can be, one entry a branch."""
    if isinstance(value, Choice):
        return leaves(value.then) + leaves(value.otherwise)
    return [value]


def map_leaves(value: Value, function: Callable[[Value], Value]) -> Value:
    """``function`` of every branch of ``value``."""
    if isinstance(value, Choice):
        return choose(
            value.condition,
            map_leaves(value.then, function),
            map_leaves(value.otherwise, function),
        )
    return function(value)


def pairs(x: Value, y: Value, function: Callable[[Value, Value], Value]) -> Value:
    """``function`` of every pair of branches.

    Raises:
        Stuck: there are too many, so this is no mask.
    """
    if len(leaves(x)) * len(leaves(y)) > _MOST_PAIRS:
        raise Stuck("a value with very many cases")
    return map_leaves(x, lambda a: map_leaves(y, lambda b: function(a, b)))


def loads(value: Value) -> list[Load]:
    """Every element that ``value`` reads."""
    if isinstance(value, CONDITIONS):
        return conditions.loads(value)
    if isinstance(value, Affine):
        return value.loads()
    if isinstance(value, Choice):
        return loads(value.condition) + loads(value.then) + loads(value.otherwise)
    return [value.load] if isinstance(value, (Unknown, Weighted)) else []


def size(value: Value) -> int:
    """How many comparisons and branches ``value`` is written with."""
    if isinstance(value, CONDITIONS):
        return conditions.size(value)
    if isinstance(value, Choice):
        return 1 + size(value.condition) + size(value.then) + size(value.otherwise)
    return 1


def _is_boolean_load(of: Affine) -> bool:
    if of.const or len(of.terms) != 1:
        return False
    ((atom, coefficient),) = of.terms.items()
    return isinstance(atom, Load) and coefficient == 1 and (atom.low, atom.high) == (0, 1)


def _on_line(condition: Eq, value: Value) -> Value | None:
    """``value`` where ``condition`` holds, when it fixes one variable and ``value`` is affine."""
    if not isinstance(value, Affine):
        return None
    for atom, coefficient in condition.of.terms.items():
        if isinstance(atom, Var) and abs(coefficient) == 1:
            fixed = affine(atom) - condition.of.times(coefficient)
            return value.substitute(atom, fixed)
    return None
