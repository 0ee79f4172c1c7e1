"""Simplification never changes a condition: formulas compared with their meaning at each point."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest

from nsa_compile.passes.masks.affine import Affine, Var, affine, floor_div, lower, modulo, upper
from nsa_compile.passes.masks.conditions import (
    FALSE,
    TRUE,
    All,
    Condition,
    Eq,
    Ge,
    describe,
    eq,
    ge,
    ne,
)
from nsa_compile.passes.masks.logic import all_of, any_of, negation
from nsa_compile.passes.masks.values import Choice, Value, choose

ROW, COLUMN, TERM = Var("i", Affine(5)), Var("j", Affine(4)), Var("t", Affine(3))
i, j, t = affine(ROW), affine(COLUMN), affine(TERM)
Point = dict[Var, int]
POINTS: list[Point] = [
    dict(zip((ROW, COLUMN, TERM), at, strict=True))
    for at in itertools.product(range(5), range(4), range(3))
]


def number(of: Affine, at: Point) -> int:
    total = of.const
    for atom, coefficient in of.terms.items():
        value = at[atom] if isinstance(atom, Var) else number(atom.of, at) // atom.by
        total += coefficient * value
    return total


def holds(condition: Condition, at: Point) -> bool:
    if isinstance(condition, Ge):
        return number(condition.of, at) >= 0
    if isinstance(condition, Eq):
        return number(condition.of, at) == 0
    if hasattr(condition.of, "terms"):
        return number(condition.of, at) != 0
    parts = [holds(c, at) for c in condition.of]
    return all(parts) if isinstance(condition, All) else any(parts)


def value_at(value: Value, at: Point) -> int:
    while isinstance(value, Choice):
        value = value.then if holds(value.condition, at) else value.otherwise
    return number(value, at)


def random_affine(rng: random.Random) -> Affine:
    result = Affine(rng.randint(-5, 5))
    for atom in rng.sample([i, j, t], rng.randint(1, 2)):
        result = result + atom.times(rng.choice([-2, -1, -1, 1, 1, 2]))
    return result if rng.random() < 0.8 else floor_div(result, rng.randint(2, 3))


def random_formula(rng: random.Random, depth: int) -> tuple[Condition, Callable[[Point], bool]]:
    """A simplified condition, and what it must mean."""
    if depth == 0 or rng.random() < 0.2:
        build = rng.choice([ge, ge, ge, eq, ne])
        of = random_affine(rng)
        test = {ge: lambda n: n >= 0, eq: lambda n: n == 0, ne: lambda n: n != 0}[build]
        return build(of), lambda at: test(number(of, at))
    kind = rng.choice(["and", "or", "not", "and", "or"])
    if kind == "not":
        inner, means = random_formula(rng, depth - 1)
        return negation(inner), lambda at: not means(at)
    parts = [random_formula(rng, depth - 1) for _ in range(rng.randint(2, 3))]
    join, decide = (all_of, all) if kind == "and" else (any_of, any)
    return join(c for c, _ in parts), lambda at: decide(m(at) for _, m in parts)


@pytest.mark.parametrize("seed", range(8))
def test_simplified_formulas_mean_the_same(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(60):
        condition, means = random_formula(rng, 3)
        for at in POINTS:
            assert holds(condition, at) == means(at), condition


@pytest.mark.parametrize("seed", range(2))
def test_bounds_hold_and_divisions_are_exact(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(100):
        of, by = random_affine(rng), rng.randint(1, 5)
        low, high = lower(of), upper(of)
        assert low is not None
        assert high is not None
        for at in POINTS:
            exact = number(of, at)
            assert low <= exact <= high
            assert number(floor_div(of, by), at) == exact // by
            assert number(modulo(of, by), at) == exact % by


@pytest.mark.parametrize("seed", range(2))
def test_choices_mean_the_same(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(60):
        condition, means = random_formula(rng, 2)
        then, otherwise = random_affine(rng), random_affine(rng)
        value = choose(condition, then, otherwise)
        for at in POINTS:
            expected = number(then if means(at) else otherwise, at)
            assert value_at(value, at) == expected


def test_forms_that_models_write_collapse() -> None:
    d = i - j
    assert any_of([all_of([ge(d), ge(-d + 2)]), all_of([ge(-d - 1), ge(d + 2)])]) == all_of(
        [ge(-d + 2), ge(d + 2)]
    ), "abs(i - j) < 3 is one window"
    assert any_of([ge(d), ge(-d - 1)]) == TRUE
    assert all_of([ge(d), ge(-d - 1)]) == FALSE
    assert all_of([ge(d), ge(d + 3)]) == ge(d)
    assert any_of([all_of([ge(i - 3), ge(j - i + 3)]), ge(-i + 2)]) == ge(j - i + 3)
    assert choose(eq(t), t + 1, affine(1)) == affine(1), "the first difference of an arange"


def test_a_diagonal_is_kept_where_the_example_length_decides_it() -> None:
    assert ge(j - i + 100) == Ge(j - i + 100)
    assert ge(j + 100) == TRUE


def test_text_reads_as_an_inequality() -> None:
    assert describe(ge(i - j + 3)) == "j <= i +3"
    assert describe(eq(floor_div(i, 4) - floor_div(j, 3))) == "((j) // 3) == ((i) // 4)"
    assert describe(all_of([ge(i - j), ne(t)])) == "(0 != t and j <= i)"
