"""Unions of intervals: ``0 <= x < w or -w < x < 0`` is one window, not two cases."""

from __future__ import annotations

from typing import NamedTuple

from nsa_compile.passes.masks.affine import Affine, Sym, lower, upper
from nsa_compile.passes.masks.conditions import All, Condition, Eq, Ge, conjuncts, eq, ge


class Interval(NamedTuple):
    """``low <= direction <= high``; None is unbounded. Bounds hold constants and sizes only."""

    direction: Affine
    low: Affine | None
    high: Affine | None


def united(conditions: set[Condition]) -> set[Condition]:
    """``conditions`` with intervals of the same direction merged where they touch or overlap."""
    intervals: list[Interval] = []
    others: set[Condition] = set()
    for condition in conditions:
        interval = _interval(condition)
        if interval is None:
            others.add(condition)
        else:
            intervals.append(interval)
    while (pair := _first_union(intervals)) is not None:
        first, second, union = pair
        intervals.remove(first)
        intervals.remove(second)
        intervals.append(union)
    return others | {_as_condition(interval) for interval in intervals}


def _first_union(intervals: list[Interval]) -> tuple[Interval, Interval, Interval] | None:
    for position, first in enumerate(intervals):
        for second in intervals[position + 1 :]:
            union = _union(first, second)
            if union is not None:
                return first, second, union
    return None


def _interval(condition: Condition) -> Interval | None:
    """The interval that ``condition`` says, None when it says something else."""
    found: Interval | None = None
    for part in conjuncts(condition):
        one = _bound(part)
        if one is None:
            return None
        found = one if found is None else _intersection(found, one)
        if found is None:
            return None
    return found


def _bound(part: Condition) -> Interval | None:
    """A single comparison as an interval of its index part."""
    if not isinstance(part, (Ge, Eq)):
        return None
    linear = Affine(0, {a: c for a, c in part.of.terms.items() if not isinstance(a, Sym)})
    if not linear.terms:
        return None
    rest = part.of - linear
    direction = min(linear, -linear, key=repr)
    at = -rest if linear == direction else rest
    if isinstance(part, Eq):
        return Interval(direction, at, at)
    return Interval(direction, at, None) if linear == direction else Interval(direction, None, at)


def _intersection(first: Interval, second: Interval) -> Interval | None:
    """A lower and an upper bound as one interval; anything else is left alone (None)."""
    if first.direction != second.direction:
        return None
    if (first.low is not None and second.low is not None) or (
        first.high is not None and second.high is not None
    ):
        return None
    low = second.low if first.low is None else first.low
    high = second.high if first.high is None else first.high
    return Interval(first.direction, low, high)


def _union(first: Interval, second: Interval) -> Interval | None:
    if first.direction != second.direction:
        return None
    if not (_reaches(first.high, second.low) and _reaches(second.high, first.low)):
        return None
    lows = _ordered(first.low, second.low)
    highs = _ordered(first.high, second.high)
    if lows is None or highs is None:
        return None
    return Interval(first.direction, lows[0], highs[1])


def _reaches(high: Affine | None, low: Affine | None) -> bool:
    """Whether an interval that ends at ``high`` touches or overlaps one that starts at ``low``."""
    if high is None or low is None:
        return True
    gap = lower(high + 1 - low)
    return gap is not None and gap >= 0


def _ordered(
    first: Affine | None, second: Affine | None
) -> tuple[Affine | None, Affine | None] | None:
    """The two as (smaller, larger); unbounded (None) is both. None when sizes leave it open."""
    if first is None or second is None:
        return None, None
    low, high = lower(first - second), upper(first - second)
    if high is not None and high <= 0:
        return first, second
    return (second, first) if low is not None and low >= 0 else None


def _as_condition(interval: Interval) -> Condition:
    direction, low, high = interval
    if low is not None and low == high:
        return eq(direction - low)
    parts = []
    if low is not None:
        parts.append(ge(direction - low))
    if high is not None:
        parts.append(ge(high - direction))
    return parts[0] if len(parts) == 1 else All(frozenset(parts))
