"""Axes of an attention: which index variables are batch, heads, queries, and how they nest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import sympy

from nsa_compile.passes import dialect
from nsa_compile.passes.masks.affine import Affine, FloorDiv, Var, affine, floor_div, modulo
from nsa_compile.passes.masks.sizes import Size, Sizes
from nsa_compile.passes.masks.views import Index

_MOST_SPLITS = 8


@dataclass
class Splits:
    """Variables taken apart: ``n`` over B * H elements becomes ``b * H + h``.

    Index maps say ``n // H`` where they tell the two apart; after the split every variable is an
    axis of its own, and the maps are sums of axes.
    """

    sizes: Sizes
    replaced: list[tuple[Var, Affine]] = field(default_factory=list)

    def apply(self, index: Iterable[Affine]) -> Index:
        """``index`` with every variable that was split replaced."""
        result = []
        for at in index:
            for var, value in self.replaced:
                at = at.substitute(var, value)
            result.append(at)
        return tuple(result)

    def split(self, var: Var, by: int) -> bool:
        """Take ``var`` apart at the divisor ``by``; False where its size is no multiple of it."""
        outer_size = divided(var.size, by)
        if outer_size is None or len(self.replaced) >= _MOST_SPLITS:
            return False
        outer = Var(f"{var.name}o", outer_size)
        inner = Var(f"{var.name}i", Affine(by))
        self.replaced.append((var, affine(outer).times(by) + affine(inner)))
        return True


def divided(size: Affine, by: int) -> Affine | None:
    """``size / by`` where that is exact and more than 1."""
    if size.const % by or any(c % by for c in size.terms.values()) or by < 2:
        return None
    result = Affine(size.const // by, {a: c // by for a, c in size.terms.items()})
    return None if result.constant is not None and result.constant < 2 else result


def divisions(index: Iterable[Affine]) -> list[tuple[Var, int]]:
    """Every ``var // by`` in ``index``."""
    found = []
    for at in index:
        for atom in at.terms:
            if isinstance(atom, FloorDiv) and atom.of.const == 0 and len(atom.of.terms) == 1:
                ((var, coefficient),) = atom.of.terms.items()
                if isinstance(var, Var) and coefficient == 1:
                    found.append((var, atom.by))
    return found


def axes(index: Iterable[Affine]) -> list[Var]:
    """The variables of ``index`` in order, each once."""
    found: dict[Var, None] = {}
    for at in index:
        for atom in sorted((a for a in at.terms if isinstance(a, Var)), key=lambda a: -at.terms[a]):
            found.setdefault(atom)
        for var in sorted(at.variables(), key=lambda v: v.name):
            found.setdefault(var)
    return list(found)


def digits(at: Affine, size: Affine) -> list[Var] | None:
    """The axes that a dimension of ``size`` runs over, outermost first; None for another index.

    ``[]`` where it holds one element. All but the first axis must have constant sizes.
    """
    if not at.terms:
        return [] if at.const == 0 and size.constant == 1 else None
    if at.const or not all(isinstance(a, Var) for a in at.terms):
        return None
    order: list[Var] = sorted(
        (a for a in at.terms if isinstance(a, Var)), key=lambda a: -at.terms[a]
    )
    stride = 1
    for var in reversed(order):
        if at.terms[var] != stride:
            return None
        if var is order[0]:
            return order if var.size.times(stride) == size else None
        if var.size.constant is None:
            return None
        stride *= var.size.constant
    return None


def extent(vars_: Sequence[Var]) -> Affine | None:
    """Product of the sizes of ``vars_``; None when more than one is a run-time size."""
    result = Affine(1)
    for var in vars_:
        if var.size.constant is not None:
            result = result.times(var.size.constant)
        elif result.constant is not None:
            result = var.size.times(result.constant)
        else:
            return None
    return result


def decoded(vars_: Sequence[Var], at: Affine) -> dict[Var, Affine] | None:
    """What each axis is when ``at`` counts through all of ``vars_``, outermost first."""
    found: dict[Var, Affine] = {}
    for position, var in reversed(list(enumerate(vars_))):
        if position == 0:
            found[var] = at
        elif var.size.constant is None:
            return None
        else:
            found[var] = modulo(at, var.size.constant)
            at = floor_div(at, var.size.constant)
    return found


def as_size(size: Affine) -> Size | None:
    """An Affine size as an int or sympy expression."""
    result: Size = size.const
    for atom, coefficient in size.terms.items():
        expression = getattr(atom, "expr", None)
        if not isinstance(expression, sympy.Expr):
            return None
        result = result + coefficient * expression
    return dialect.extent(result)
