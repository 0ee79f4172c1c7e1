"""Documents packed into one sequence: ids that query and key share, and what sorted ids imply."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import fx

from nsa_compile.passes import dialect
from nsa_compile.passes.masks.affine import Affine, FloorDiv, Load, Var, affine, lower
from nsa_compile.passes.masks.cast import condition, numbers
from nsa_compile.passes.masks.conditions import (
    All,
    Any_,
    Condition,
    Eq,
    Ge,
    Ne,
    conjuncts,
    eq,
    ge,
    ne,
)
from nsa_compile.passes.masks.lift import Lifter
from nsa_compile.passes.masks.logic import all_of, any_of, negation
from nsa_compile.passes.masks.values import Stuck, leaves


class Steps(NamedTuple):
    """A running sum read at one position: ``sum(x[.., t]) for t <= at``, x never negative."""

    of: fx.Node
    dim: int
    at: Affine


def straightened(keep: Condition, lifter: Lifter) -> Condition:
    """``keep`` with positions that restart in each document replaced by indices.

    before: ``ids[b, i] == ids[b, j] and pos[b, j] <= pos[b, i]``, ids the cumsum of
            ``pos[b, t] - pos[b, t - 1] != 1``
    after:  ``ids[b, i] == ids[b, j] and j <= i``

    Equal running sums mean that no term between i and j counts, so between them pos grows by 1 at
    each step and ``pos[b, i] - pos[b, j]`` is ``i - j``.
    """
    parts = conjuncts(keep)
    for part in sorted(parts, key=repr):
        pair = _pair(part)
        if pair is None or not any(_reads_both(other) for other in parts if other != part):
            continue
        for unit in _unit_steps(*pair, lifter):
            rest = all_of(parts - {part})
            keep = all_of([part, _replaced(rest, unit)])
            parts = conjuncts(keep)
    return keep


class Ids(NamedTuple):
    """Ids that a query and the keys it sees share: what they are and the tensors that hold them."""

    of_query: Affine
    of_key: Affine
    query: fx.Node
    key: fx.Node

    def in_order(self, offset: Affine, lifter: Lifter) -> bool:
        """Whether the ids never fall along the keys, and query i has the id of key i + offset."""
        query, key = (
            next((v for v in held.variables() if v.name == name), None)
            for held, name in ((self.of_query, "i"), (self.of_key, "j"))
        )
        if query is None or key is None:
            return False
        at_query = self.of_key.substitute(key, affine(query) + offset)
        return at_query == self.of_query and never_falls(self.of_key, lifter)


def ids(same: Condition, lifter: Lifter) -> Ids | None:
    """The ids that ``same`` compares, None when no tensors of the graph hold them."""
    if not isinstance(same, Eq):
        return None
    keys = lifter.rows.over("j")
    for of_query, query in lifter.rows.over("i").items():
        for of_key, key in keys.items():
            same_dtype = dialect.value(query).dtype == dialect.value(key).dtype
            if same_dtype and eq(of_query - of_key) == same:
                return Ids(of_query, of_key, query, key)
    return None


def never_falls(held: Affine, lifter: Lifter) -> bool:
    """Whether ``held`` is proven not to fall along the sequence, position i or j."""
    return all(
        coefficient > 0 and _atom_never_falls(atom, lifter)
        for atom, coefficient in held.terms.items()
        if {v.name for v in affine(atom).variables()} & {"i", "j"}
    )


def _atom_never_falls(atom: object, lifter: Lifter) -> bool:
    if isinstance(atom, Var):
        return True
    if isinstance(atom, FloorDiv):
        return never_falls(atom.of, lifter)
    steps = _steps(atom, lifter) if isinstance(atom, Load) else None
    return steps is not None and all(coefficient > 0 for coefficient in steps.at.terms.values())


def _pair(part: Condition) -> tuple[Load, Load] | None:
    """The two elements of one tensor that ``part`` says are equal."""
    if not isinstance(part, Eq) or part.of.const or len(part.of.terms) != 2:
        return None
    (first, a), (second, b) = part.of.terms.items()
    if not isinstance(first, Load) or not isinstance(second, Load):
        return None
    return (first, second) if a == -b and first.node is second.node else None


def _reads_both(condition_: Condition) -> bool:
    """Whether ``condition_`` compares elements of one tensor with each other."""
    if isinstance(condition_, (All, Any_)):
        return any(_reads_both(c) for c in condition_.of)
    nodes = [a.node for a in condition_.of.terms if isinstance(a, Load)]
    return len(nodes) > len(set(nodes))


def _steps(load: Load, lifter: Lifter) -> Steps | None:
    """``load`` as a running sum, when its terms are proven not to be negative."""
    op = dialect.view(load.node)
    if op is None or op.name != "cumsum" or not isinstance(op["dim"], int):
        return None
    if dialect.value(load.node).dtype not in (torch.int32, torch.int64):
        return None  # a narrow sum wraps around
    dim = op["dim"] % len(load.index)
    if not _is_position(load.index[dim]):
        return None
    term = _term(op["x"], load, dim, affine(Var("t", (lifter.sizes.shape(load.node) or [])[dim])))
    try:
        values = leaves(numbers(lifter.lift(*term)))
    except Stuck:
        return None
    lows = [lower(v) if isinstance(v, Affine) else None for v in values]
    if any(low is None or low < 0 for low in lows):
        return None
    return Steps(op["x"], dim, load.index[dim])


def _term(x: fx.Node, load: Load, dim: int, at: Affine) -> tuple[fx.Node, tuple[Affine, ...]]:
    return x, (*load.index[:dim], at, *load.index[dim + 1 :])


def _is_position(at: Affine) -> bool:
    return len(at.terms) == 1 and [type(a) for a in at.terms] == [Var]


class _Unit(NamedTuple):
    """``tensor`` grows by 1 at each step between positions ``first`` and ``second``."""

    first: Load
    second: Load
    distance: Affine


def _unit_steps(first: Load, second: Load, lifter: Lifter) -> list[_Unit]:
    """The tensors that are proven to grow by 1 at each step between two equal running sums."""
    one, two = _steps(first, lifter), _steps(second, lifter)
    if one is None or two is None or one.dim != two.dim:
        return []
    if _without(first, one.dim) != _without(second, two.dim):
        return []
    size = (lifter.sizes.shape(first.node) or [])[one.dim]
    before = affine(Var("t", size - 1))
    try:
        counts = condition(lifter.lift(*_term(one.of, first, one.dim, before + 1)))
    except Stuck:
        return []
    found = []
    for part in conjuncts(negation(counts)):
        loads = _grows_by_one(part, before)
        if loads is not None:
            earlier, _ = loads
            (var,) = before.variables()
            ends = [affine(earlier).substitute(var, at).loads()[0] for at in (one.at, two.at)]
            found.append(_Unit(ends[0], ends[1], one.at - two.at))
    return found


def _without(load: Load, dim: int) -> tuple[Affine, ...]:
    return (*load.index[:dim], *load.index[dim + 1 :])


def _grows_by_one(part: Condition, before: Affine) -> tuple[Load, Load] | None:
    """``x[t]`` and ``x[t + 1]`` when ``part`` says that the second is the first plus 1."""
    if not isinstance(part, Eq) or len(part.of.terms) != 2 or abs(part.of.const) != 1:
        return None
    (var,) = before.variables()
    for earlier in part.of.loads():
        later = affine(earlier).substitute(var, before + 1)
        if later != affine(earlier) and eq(later - affine(earlier) - 1) == part:
            return earlier, later.loads()[0]
    return None


def _replaced(condition_: Condition, unit: _Unit) -> Condition:
    """``condition_`` with ``distance`` in place of the difference of the two elements."""
    if isinstance(condition_, All):
        return all_of(_replaced(c, unit) for c in condition_.of)
    if isinstance(condition_, Any_):
        return any_of(_replaced(c, unit) for c in condition_.of)
    terms = condition_.of.terms
    factor = terms.get(unit.first, 0)
    if not factor or terms.get(unit.second, 0) != -factor:
        return condition_
    difference = affine(unit.first) - affine(unit.second) - unit.distance
    of = condition_.of - difference.times(factor)
    make = {Ge: ge, Eq: eq, Ne: ne}[type(condition_)]
    return make(of)
