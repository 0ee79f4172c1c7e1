"""Prefix-LM: ``j <= i + offset`` (perhaps in a window) or ``j < prefix``, in any spelling."""

from __future__ import annotations

from typing import NamedTuple

from nsa_compile.passes.masks.affine import Affine, Var
from nsa_compile.passes.masks.conditions import Any_, Condition, Ge, conjuncts
from nsa_compile.passes.masks.implication import equivalent
from nsa_compile.passes.masks.logic import all_of, any_of


class Prefix(NamedTuple):
    """Keys before ``length`` or those that ``local``, a conjunction of diagonals, lets through."""

    length: Affine
    local: Condition


def prefix(condition: Condition) -> Prefix | None:
    """``condition`` as a prefix and diagonals, None when it is something else.

    ``(i < P and j < P) or j <= i``, ``j <= max(i, P - 1)`` and the like mean the same as ``j < P or
    j <= i``: candidates are read off the comparisons and proven equivalent.
    """
    if not isinstance(condition, Any_):
        return None
    atoms = sorted(_atoms(condition), key=repr)
    ends = [atom.of for atom in atoms if _variables(atom.of) == {"j": -1}]
    upper = [atom for atom in atoms if _variables(atom.of) == {"i": 1, "j": -1}]
    lower = [atom for atom in atoms if _variables(atom.of) == {"i": -1, "j": 1}]
    locals_ = [[above] for above in upper] + [[a, b] for a in upper for b in lower]
    for end in ends:
        before = Ge(end)
        length = Affine(end.const + 1, {a: c for a, c in end.terms.items() if not _is_key(a)})
        if {v.name for v in length.variables()} - {"b"}:
            continue
        for diagonals in locals_:
            local = all_of(diagonals)
            if equivalent(condition, any_of([local, before])):
                return Prefix(length, local)
    return None


def _atoms(condition: Condition) -> set[Ge]:
    if isinstance(condition, Any_):
        return {atom for part in condition.of for atom in _atoms(part)}
    parts = conjuncts(condition)
    if len(parts) == 1:
        return {condition} if isinstance(condition, Ge) else set()
    return {atom for part in parts for atom in _atoms(part)}


def _variables(of: Affine) -> dict[str, int]:
    return {a.name: c for a, c in of.terms.items() if isinstance(a, Var) and a.name != "b"}


def _is_key(atom: object) -> bool:
    return isinstance(atom, Var) and atom.name == "j"
