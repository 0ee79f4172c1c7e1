"""And, or and not of conditions, simplified as they are built."""

from __future__ import annotations

from collections.abc import Iterable

from nsa_compile.passes.masks.affine import Affine, lower
from nsa_compile.passes.masks.conditions import (
    FALSE,
    TRUE,
    All,
    Any_,
    Condition,
    Eq,
    Ge,
    Ne,
    conjuncts,
    ge,
)
from nsa_compile.passes.masks.intervals import united


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
    flat = _tightest(_without_edges(_on_lines(flat)))
    if FALSE in flat:
        return FALSE
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
    # (c and x) or not c is x or not c
    opposites = {_negated_atom(c) for c in flat}
    if any(conjuncts(c) & opposites for c in flat):
        return any_of(all_of(conjuncts(c) - opposites) for c in flat)
    common = frozenset.intersection(*(conjuncts(c) for c in flat))
    if common:
        rests = [all_of(conjuncts(c) - common) for c in flat]
        return all_of([*common, any_of(rests)])
    pieces = _weakest(united(flat))
    if len(pieces) == 1:
        return next(iter(pieces))
    return Any_(frozenset(pieces))


def _negated_atom(condition: Condition) -> Condition | None:
    if isinstance(condition, Ge):
        return Ge(-condition.of - 1)
    if isinstance(condition, Eq):
        return Ne(condition.of)
    if isinstance(condition, Ne):
        return Eq(condition.of)
    return None


def _on_lines(conditions: set[Condition]) -> set[Condition]:
    """``conditions`` with the bounds decided that an equality among them fixes."""
    lines = [c.of for c in conditions if isinstance(c, Eq)]
    decided: set[Condition] = set()
    for condition in conditions:
        if isinstance(condition, Ge):
            rests = [condition.of - line.times(sign) for line in lines for sign in (1, -1)]
            fixed = [rest.const for rest in rests if rest.constant is not None]
            if fixed:
                condition = TRUE if fixed[0] >= 0 else FALSE
        decided.update(conjuncts(condition))
    return decided


def _without_edges(conditions: set[Condition]) -> set[Condition]:
    """``conditions`` with ``x >= 0`` and ``x != 0`` as ``x >= 1``."""
    edges = {c.of for c in conditions if isinstance(c, Ne)}
    found: set[Condition] = set()
    for condition in conditions:
        if isinstance(condition, Ge) and (condition.of in edges or -condition.of in edges):
            found.update(conjuncts(ge(condition.of - 1)))
        elif not (isinstance(condition, Ne) and {Ge(condition.of), Ge(-condition.of)} & conditions):
            found.add(condition)
    return found


def _weakest(conditions: set[Condition]) -> set[Condition]:
    """``conditions`` without the bounds that imply another one of them."""
    bounds = [c for c in conditions if isinstance(c, Ge)]
    unequal = [sign for c in conditions if isinstance(c, Ne) for sign in (c.of, -c.of)]
    implied = set()
    for strong in bounds:
        for weak in bounds:
            gap = None if weak is strong or weak in implied else lower(weak.of - strong.of)
            if gap is not None and gap >= 0:
                implied.add(strong)
        if any(_positive(each - strong.of) for each in unequal):
            implied.add(strong)
    return conditions - implied


def _positive(of: Affine) -> bool:
    low = lower(of)
    return low is not None and low > 0


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
    """Whether two bounds exclude each other: ``x + a >= 0``, ``b - x >= 0`` and ``a + b < 0``."""
    bounds = {c.of.linear(): c.of.const for c in conditions if isinstance(c, Ge)}
    return any(-d in bounds and bounds[-d] + const < 0 for d, const in bounds.items())
