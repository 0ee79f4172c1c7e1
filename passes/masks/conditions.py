"""Conditions over indices: comparisons of affine expressions and how they combine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from nsa_compile.passes.masks.affine import Affine, Load, Var, content, lower, upper


@dataclass(frozen=True)
class Ge:
    """``of >= 0``."""

    of: Affine


@dataclass(frozen=True)
class Eq:
    """``of == 0``."""

    of: Affine


@dataclass(frozen=True)
class Ne:
    """``of != 0``."""

    of: Affine


@dataclass(frozen=True)
class All:
    """Conjunction; empty is true."""

    of: frozenset[Condition]


@dataclass(frozen=True)
class Any_:
    """Disjunction; empty is false."""

    of: frozenset[Condition]


Condition: TypeAlias = Ge | Eq | Ne | All | Any_

TRUE = All(frozenset())
FALSE = Any_(frozenset())
CONDITIONS = (Ge, Eq, Ne, All, Any_)


def ge(of: Affine) -> Condition:
    """``of >= 0``, over the integers."""
    divisor = content(of)
    if divisor == 0:
        return TRUE if of.const >= 0 else FALSE
    if divisor > 1:
        of = Affine(of.const // divisor, {a: c // divisor for a, c in of.terms.items()})
    if not _compares_indices(of):
        low, high = lower(of), upper(of)
        if low is not None and low >= 0:
            return TRUE
        if high is not None and high < 0:
            return FALSE
    flag = _flag(of)
    if flag is not None:  # of an element that is 0 or 1: 1 - x >= 1 says that it is 0
        return Ne(flag) if of.const < 0 else Eq(flag)
    return Ge(of)


def eq(of: Affine) -> Condition:
    """``of == 0``."""
    normal = _signed(of)
    if isinstance(normal, bool):
        return TRUE if normal else FALSE
    flag = _flag(normal)
    return Eq(normal) if flag is None or flag == normal else Ne(flag)


def ne(of: Affine) -> Condition:
    """``of != 0``."""
    normal = _signed(of)
    if isinstance(normal, bool):
        return FALSE if normal else TRUE
    flag = _flag(normal)
    return Ne(normal) if flag is None or flag == normal else Eq(flag)


def conjuncts(condition: Condition) -> frozenset[Condition]:
    """The conditions that ``condition`` is the conjunction of."""
    return condition.of if isinstance(condition, All) else frozenset([condition])


def loads(condition: Condition) -> list[Load]:
    """Every element that ``condition`` reads."""
    if isinstance(condition, (All, Any_)):
        return [load for c in condition.of for load in loads(c)]
    return condition.of.loads()


def variables(condition: Condition) -> set[Var]:
    """Every index variable that ``condition`` depends on."""
    if isinstance(condition, (All, Any_)):
        return {v for c in condition.of for v in variables(c)}
    return condition.of.variables()


def size(condition: Condition) -> int:
    """How many comparisons ``condition`` is written with."""
    if isinstance(condition, (All, Any_)):
        return 1 + sum(size(c) for c in condition.of)
    return 1


def describe(condition: Condition) -> str:
    """``condition`` as text, terms on the side where they are positive: ``j <= i + 3``."""
    if isinstance(condition, (All, Any_)):
        parts = sorted(describe(c) for c in condition.of)
        return "(" + (" and " if isinstance(condition, All) else " or ").join(parts) + ")"
    of = condition.of
    positive = Affine(max(of.const, 0), {a: c for a, c in of.terms.items() if c > 0})
    sign = {Ge: "<=", Eq: "==", Ne: "!="}[type(condition)]
    return f"{positive - of!r} {sign} {positive!r}"


def is_flag(atom: object) -> bool:
    """Whether ``atom`` is an element that is 0 or 1."""
    return isinstance(atom, Load) and (atom.low, atom.high) == (0, 1)


def _flag(of: Affine) -> Affine | None:
    """The element that ``of`` is about, when that is one that is 0 or 1."""
    (atom, *more) = of.terms
    return Affine(0, {atom: 1}) if is_flag(atom) and not more else None


def _compares_indices(of: Affine) -> bool:
    """Whether two index variables are compared with each other.

    Such a bound is a diagonal of the mask (causal, window). It is kept even where one concrete
    length happens to decide it: a window must not vanish because the example was short.
    """
    signs = {c > 0 for a, c in of.terms.items() if isinstance(a, Var)}
    return len(signs) == 2


def _signed(of: Affine) -> Affine | bool:
    """``of`` up to sign and common divisor, or whether it is 0 when bounds decide that."""
    divisor = content(of)
    if divisor == 0:
        return of.const == 0
    if of.const % divisor:
        return False
    low, high = lower(of), upper(of)
    if (low is not None and low > 0) or (high is not None and high < 0):
        return False
    if low == high == 0:
        return True
    terms = {a: c // divisor for a, c in of.terms.items()}
    # The sign is free: fix it by a rule that does not depend on the order of the terms.
    lead = min(terms, key=repr)
    sign = 1 if terms[lead] > 0 else -1
    return Affine(sign * (of.const // divisor), {a: sign * c for a, c in terms.items()})
