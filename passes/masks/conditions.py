"""Conditions over indices and values that depend on them, simplified as they are built."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

from nsa_compile.passes.masks.affine import Affine, Load, Sym, Var, affine, content, lower, upper


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


Condition: TypeAlias = Ge | Eq | Ne | All | Any_
# A float is a constant that is no integer (or infinite); other numbers are Affine.
Value: TypeAlias = Affine | Condition | Choice | Unknown | float

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
    return Ge(of)


def eq(of: Affine) -> Condition:
    """``of == 0``."""
    normal = _signed(of)
    if isinstance(normal, bool):
        return TRUE if normal else FALSE
    return Eq(normal)


def ne(of: Affine) -> Condition:
    """``of != 0``."""
    normal = _signed(of)
    if isinstance(normal, bool):
        return FALSE if normal else TRUE
    return Ne(normal)


def negation(condition: Condition) -> Condition:
    """The opposite, pushed to the atoms; the opposite of ``x >= 0`` is ``-x - 1 >= 0``."""
    if isinstance(condition, Ge):
        return ge(-condition.of - 1)
    if isinstance(condition, Eq):
        return Ne(condition.of)
    if isinstance(condition, Ne):
        return Eq(condition.of)
    inner = [negation(c) for c in condition.of]
    return any_of(inner) if isinstance(condition, All) else all_of(inner)


def all_of(conditions: Iterable[Condition]) -> Condition:
    """Conjunction: flat, without duplicates, the tightest of comparable bounds."""
    flat: set[Condition] = set()
    for condition in conditions:
        flat.update(condition.of if isinstance(condition, All) else (condition,))
    if FALSE in flat:
        return FALSE
    flat = _tightest(flat)
    if any(_negated_atom(c) in flat for c in flat):
        return FALSE
    if _empty_interval(flat):
        return FALSE
    # x and (x or y) is x
    flat = {c for c in flat if not (isinstance(c, Any_) and c.of & flat)}
    return next(iter(flat)) if len(flat) == 1 else All(frozenset(flat))


def any_of(conditions: Iterable[Condition]) -> Condition:
    """Disjunction: flat, common factors taken out, touching intervals of one direction united."""
    flat: set[Condition] = set()
    for condition in conditions:
        flat.update(condition.of if isinstance(condition, Any_) else (condition,))
    if TRUE in flat:
        return TRUE
    if len(flat) < 2:
        return next(iter(flat)) if flat else FALSE
    if any(_negated_atom(c) in flat for c in flat):
        return TRUE
    common = frozenset.intersection(*(_conjuncts(c) for c in flat))
    if common:
        rests = [all_of(_conjuncts(c) - common) for c in flat]
        return all_of([*common, any_of(rests)])
    united = _united(flat)
    if len(united) == 1:
        return next(iter(united))
    return Any_(frozenset(united))


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
    if isinstance(value, Unknown):
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


def loads(value: Value) -> list[Load]:
    """Every element that ``value`` reads."""
    if isinstance(value, Affine):
        return value.loads()
    if isinstance(value, (Ge, Eq, Ne)):
        return value.of.loads()
    if isinstance(value, (All, Any_)):
        return [load for c in value.of for load in loads(c)]
    if isinstance(value, Choice):
        return loads(value.condition) + loads(value.then) + loads(value.otherwise)
    return [value.load] if isinstance(value, Unknown) else []


def size(value: Value) -> int:
    """How many atoms and branches ``value`` is written with."""
    if isinstance(value, (All, Any_)):
        return 1 + sum(size(c) for c in value.of)
    if isinstance(value, Choice):
        return 1 + size(value.condition) + size(value.then) + size(value.otherwise)
    return 1


def variables(value: Value) -> set[Var]:
    """Every index variable that ``value`` depends on."""
    if isinstance(value, Affine):
        return value.variables()
    if isinstance(value, (Ge, Eq, Ne)):
        return value.of.variables()
    if isinstance(value, (All, Any_)):
        return set().union(*(variables(c) for c in value.of))
    if isinstance(value, Choice):
        return variables(value.condition) | variables(value.then) | variables(value.otherwise)
    if isinstance(value, Unknown):
        return {v for e in value.load.index for v in e.variables()}
    return set()


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


def _is_boolean_load(of: Affine) -> bool:
    if of.const or len(of.terms) != 1:
        return False
    ((atom, coefficient),) = of.terms.items()
    return isinstance(atom, Load) and coefficient == 1 and (atom.low, atom.high) == (0, 1)


def _negated_atom(condition: Condition) -> Condition | None:
    if isinstance(condition, Ge):
        return Ge(-condition.of - 1)
    if isinstance(condition, Eq):
        return Ne(condition.of)
    if isinstance(condition, Ne):
        return Eq(condition.of)
    return None


def _conjuncts(condition: Condition) -> frozenset[Condition]:
    return condition.of if isinstance(condition, All) else frozenset([condition])


def _tightest(conditions: set[Condition]) -> set[Condition]:
    """Of bounds that differ in the constant only, the one that implies the others."""
    best: dict[Affine, Ge] = {}
    kept: set[Condition] = set()
    for condition in conditions:
        if not isinstance(condition, Ge):
            kept.add(condition)
            continue
        direction = condition.of.linear()
        if direction not in best or condition.of.const < best[direction].of.const:
            best[direction] = condition
    return kept | set(best.values())


def _empty_interval(conditions: set[Condition]) -> bool:
    """Whether two bounds exclude each other: ``x + a >= 0`` and ``-x + b >= 0`` with ``a + b < 0``."""
    bounds = {c.of.linear(): c.of.const for c in conditions if isinstance(c, Ge)}
    return any(-d in bounds and bounds[-d] + const < 0 for d, const in bounds.items())


Interval: TypeAlias = "tuple[Affine, Affine | None, Affine | None]"


def _united(conditions: set[Condition]) -> set[Condition]:
    """``conditions`` with intervals of the same direction merged where they touch or overlap."""
    merged: list[Interval] = []
    others: set[Condition] = set()
    for condition in conditions:
        interval = _interval(condition)
        if interval is None:
            others.add(condition)
        else:
            merged.append(interval)
    changed = True
    while changed:
        changed = False
        for a, first in enumerate(merged):
            for second in merged[a + 1 :]:
                union = _union(first, second)
                if union is not None:
                    merged.remove(first)
                    merged.remove(second)
                    merged.append(union)
                    changed = True
                    break
            if changed:
                break
    return others | {_as_condition(interval) for interval in merged}


def _interval(condition: Condition) -> Interval | None:
    """``low <= direction <= high`` when ``condition`` says just that, else None."""
    direction: Affine | None = None
    low: Affine | None = None
    high: Affine | None = None
    for part in _conjuncts(condition):
        if not isinstance(part, (Ge, Eq)):
            return None
        linear = Affine(0, {a: c for a, c in part.of.terms.items() if not isinstance(a, Sym)})
        rest = part.of - linear
        if not linear.terms:
            return None
        if direction is None:
            direction = min(linear, -linear, key=repr)
        if linear not in (direction, -direction):
            return None
        if isinstance(part, Eq):
            if low is not None or high is not None:
                return None
            low = high = -rest if linear == direction else rest
        elif linear == direction:
            if low is not None:
                return None
            low = -rest
        else:
            if high is not None:
                return None
            high = rest
    return None if direction is None else (direction, low, high)


def _union(first: Interval, second: Interval) -> Interval | None:
    direction, low1, high1 = first
    other, low2, high2 = second
    if direction != other or not (_reaches(high1, low2) and _reaches(high2, low1)):
        return None
    low, high = _outer(low1, low2, least=True), _outer(high1, high2, least=False)
    if low is NotImplemented or high is NotImplemented:
        return None
    return direction, low, high


def _reaches(high: Affine | None, low: Affine | None) -> bool:
    """Whether an interval that ends at ``high`` touches or overlaps one that starts at ``low``."""
    if high is None or low is None:
        return True
    gap = lower(high + 1 - low)
    return gap is not None and gap >= 0


def _outer(first: Affine | None, second: Affine | None, *, least: bool) -> Affine | None:
    """The outer of two bounds (None is unbounded); NotImplemented when they cannot be compared."""
    if first is None or second is None:
        return None
    difference = first - second
    low, high = lower(difference), upper(difference)
    if high is not None and high <= 0:
        return first if least else second
    if low is not None and low >= 0:
        return second if least else first
    return NotImplemented


def _as_condition(interval: Interval) -> Condition:
    direction, low, high = interval
    parts: list[Condition] = []
    if low is not None and low == high:
        return eq(direction - low)
    if low is not None:
        parts.append(ge(direction - low))
    if high is not None:
        parts.append(ge(high - direction))
    return all_of(parts)


def _on_line(condition: Eq, value: Value) -> Value | None:
    """``value`` where ``condition`` holds, when it fixes one variable and ``value`` is affine."""
    if not isinstance(value, Affine):
        return None
    for atom, coefficient in condition.of.terms.items():
        if isinstance(atom, Var) and abs(coefficient) == 1:
            fixed = affine(atom) - condition.of.times(coefficient)
            return value.substitute(atom, fixed)
    return None
