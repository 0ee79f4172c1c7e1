"""Whether conditions exclude each other: enough arithmetic to compare two ways to write a mask."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations, product

from nsa_compile.passes.masks.affine import Affine, upper
from nsa_compile.passes.masks.conditions import Any_, Condition, Eq, Ge, conjuncts
from nsa_compile.passes.masks.logic import negation

# A mask is a handful of terms; more cases than these are no mask, and must not cost time.
_MOST_CASES = 256


def equivalent(first: Condition, second: Condition) -> bool:
    """Whether both are proven to hold at the same indices."""
    return excludes([first, negation(second)]) and excludes([second, negation(first)])


def excludes(conditions: Iterable[Condition]) -> bool:
    """Whether ``conditions`` are proven never to hold together. False is no answer."""
    cases = _cases(conditions)
    return cases is not None and all(_impossible(case) for case in cases)


def _cases(conditions: Iterable[Condition]) -> list[frozenset[Condition]] | None:
    """The disjunctive normal form: each case is a set of comparisons."""
    choices: list[list[frozenset[Condition]]] = []
    for condition in conditions:
        for part in conjuncts(condition):
            if not isinstance(part, Any_):
                choices.append([frozenset([part])])
                continue
            inner = [_cases([each]) for each in part.of]
            choices.append([case for some in inner for case in some or ()])
            if None in inner:
                return None
    total = 1
    for choice in choices:
        total *= len(choice)
    if total > _MOST_CASES:
        return None
    return [frozenset[Condition]().union(*parts) for parts in product(*choices)]


def _impossible(case: frozenset[Condition]) -> bool:
    """Whether up to three bounds of ``case`` add up to ``negative >= 0``, or two are opposites."""
    if any(negation(condition) in case for condition in case):
        return True
    bounds: list[Affine] = [c.of for c in case if isinstance(c, Ge)]
    for line in (c.of for c in case if isinstance(c, Eq)):
        bounds += [line, -line]
    for count in (1, 2, 3):
        for some in combinations(bounds, count):
            high = upper(sum(some, Affine()))
            if high is not None and high < 0:
                return True
    return False
