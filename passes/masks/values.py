"""What an element of a tensor can be: an integer, a condition, a constant, a choice of those."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch

from nsa_compile.passes.masks import conditions
from nsa_compile.passes.masks.affine import Affine, Load, Var, affine, lower, upper
from nsa_compile.passes.masks.conditions import (
    CONDITIONS,
    FALSE,
    TRUE,
    Condition,
    Eq,
    Ne,
    conjuncts,
    is_flag,
    ne,
)
from nsa_compile.passes.masks.logic import all_of, any_of, negation

_MOST_PAIRS = 64
_MOST_FLAGS = 4
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
    then, otherwise = _under(condition, then), _under(negation(condition), otherwise)
    if then == otherwise or (isinstance(condition, Eq) and _on_line(condition, then) == otherwise):
        return otherwise
    return Choice(condition, then, otherwise)


def _under(path: Condition, value: Value) -> Value:
    """``value`` where ``path`` holds: without the branches that ``path`` decides."""
    if isinstance(value, Choice):
        both = all_of([path, value.condition])
        if both == FALSE:
            return _under(path, value.otherwise)
        return _under(path, value.then) if both == path else value
    if not isinstance(value, Affine) or value.constant is not None:
        return value
    for part in conjuncts(path):
        if isinstance(part, (Eq, Ne)):
            value = _fixed(part, value)
    return value


def _fixed(part: Eq | Ne, value: Affine) -> Affine:
    """``value`` as a constant, where ``part`` makes it one: an equality, or a flag that is 1."""
    (atom, *more) = part.of.terms
    line = part.of if isinstance(part, Eq) else part.of - 1
    if isinstance(part, Ne) and (more or not is_flag(atom)):
        return value
    coefficient = value.terms.get(atom, 0)
    if coefficient % line.terms[atom]:
        return value
    rest = value - line.times(coefficient // line.terms[atom])
    return value if rest.constant is None else rest


def by_cases(value: Value) -> Value:
    """A sum of elements that are 0 or 1, case by case; anything else stays as it is."""
    if not isinstance(value, Affine) or not value.terms or len(value.terms) > _MOST_FLAGS:
        return value
    if not all(is_flag(atom) for atom in value.terms):
        return value
    atom, coefficient = next(iter(value.terms.items()))
    zero = value - affine(atom).times(coefficient)
    return choose(ne(affine(atom)), by_cases(zero + coefficient), by_cases(zero))


def truth(value: Value) -> Condition | None:
    """``value != 0``, or None when that cannot be said."""
    if isinstance(value, CONDITIONS):
        return value
    if isinstance(value, Affine):
        cases = by_cases(value)
        return ne(value) if isinstance(cases, Affine) else truth(cases)
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


def is_bit(value: Value) -> bool:
    """Whether ``value`` is proven to be 0 or 1."""
    if isinstance(value, CONDITIONS):
        return True
    return all(
        isinstance(leaf, Affine) and (lower(leaf), upper(leaf)) in ((0, 0), (0, 1), (1, 1))
        for leaf in leaves(value)
    )


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
    return coefficient == 1 and is_flag(atom)


def _on_line(condition: Eq, value: Value) -> Value | None:
    """``value`` where ``condition`` holds, when it fixes one variable and ``value`` is affine."""
    if not isinstance(value, Affine):
        return None
    for atom, coefficient in condition.of.terms.items():
        if isinstance(atom, Var) and abs(coefficient) == 1:
            fixed = affine(atom) - condition.of.times(coefficient)
            return value.substitute(atom, fixed)
    return None
