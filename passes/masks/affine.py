"""Integer expressions, affine in indices and sizes, with bounds: what mask proofs compute with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import sympy

if TYPE_CHECKING:
    from torch import fx


@dataclass(frozen=True)
class Var:
    """An index variable, ``0 <= var < size``."""

    name: str
    size: Affine


@dataclass(frozen=True)
class Sym:
    """A size that is only known at run time: a symbol of the graph, or an expression of symbols."""

    expr: sympy.Expr
    low: int | None = field(default=None, compare=False)
    high: int | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Load:
    """One element of an integer or boolean tensor that the proof does not look into.

    ``why`` says what stopped the proof at ``node``; empty for a graph input.
    """

    node: fx.Node
    index: tuple[Affine, ...]
    low: int | None = field(default=None, compare=False)
    high: int | None = field(default=None, compare=False)
    why: str = field(default="", compare=False)


@dataclass(frozen=True)
class FloorDiv:
    """``floor(of / by)`` with ``by >= 2``."""

    of: Affine
    by: int


Atom: TypeAlias = Var | Sym | Load | FloorDiv


class Affine:
    """``const + sum(coefficient * atom)``, immutable; equality is structural."""

    __slots__ = ("_hash", "const", "terms")

    def __init__(self, const: int = 0, terms: Mapping[Atom, int] | None = None) -> None:
        self.const = const
        self.terms: dict[Atom, int] = {a: c for a, c in (terms or {}).items() if c}
        self._hash = hash((const, frozenset(self.terms.items())))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Affine):
            return NotImplemented
        return self.const == other.const and self.terms == other.terms

    def __add__(self, other: Affine | int) -> Affine:
        if isinstance(other, int):
            return Affine(self.const + other, self.terms)
        terms = dict(self.terms)
        for atom, coefficient in other.terms.items():
            terms[atom] = terms.get(atom, 0) + coefficient
        return Affine(self.const + other.const, terms)

    def __neg__(self) -> Affine:
        return self.times(-1)

    def __sub__(self, other: Affine | int) -> Affine:
        return self + (-other)

    def times(self, factor: int) -> Affine:
        return Affine(self.const * factor, {a: c * factor for a, c in self.terms.items()})

    @property
    def constant(self) -> int | None:
        """The value when there is no term, else None."""
        return None if self.terms else self.const

    def linear(self) -> Affine:
        """This expression without its constant."""
        return Affine(0, self.terms)

    def atoms(self) -> Iterable[Atom]:
        """Every atom, those inside floor divisions and load indices included."""
        for atom in self.terms:
            yield atom
            inner = [atom.of] if isinstance(atom, FloorDiv) else []
            if isinstance(atom, Load):
                inner = list(atom.index)
            for expression in inner:
                yield from expression.atoms()

    def variables(self) -> set[Var]:
        return {a for a in self.atoms() if isinstance(a, Var)}

    def loads(self) -> list[Load]:
        return [a for a in self.atoms() if isinstance(a, Load)]

    def substitute(self, var: Var, value: Affine) -> Affine:
        """This expression with ``value`` in place of ``var``."""
        if var not in self.variables():
            return self
        result = Affine(self.const)
        for atom, coefficient in self.terms.items():
            result = result + _substituted(atom, var, value).times(coefficient)
        return result

    def __repr__(self) -> str:
        parts = [f"{_signed(c)}{_shown(a)}" for a, c in self.terms.items()]
        if self.const or not parts:
            parts.append(f"{self.const:+d}")
        text = " ".join(parts)
        return text[1:] if text.startswith("+") else text


def affine(value: int | Affine | Atom) -> Affine:
    """``value`` as an Affine."""
    if isinstance(value, Affine):
        return value
    if isinstance(value, int):
        return Affine(value)
    return Affine(0, {value: 1})


def floor_div(of: Affine, by: int) -> Affine:
    """``floor(of / by)``; multiples of ``by`` leave the division, the rest stays if it must."""
    if by == 1:
        return of
    whole = Affine(of.const // by, {a: c // by for a, c in of.terms.items() if c % by == 0})
    rest = Affine(of.const % by, {a: c for a, c in of.terms.items() if c % by})
    if rest.constant is not None:  # 0 <= const % by < by
        return whole
    low, high = lower(rest), upper(rest)
    if low is not None and high is not None and low // by == high // by:
        return whole + low // by
    return whole + affine(FloorDiv(rest, by))


def modulo(of: Affine, by: int) -> Affine:
    """``of - by * floor(of / by)``."""
    return of - floor_div(of, by).times(by)


def lower(expression: Affine) -> int | None:
    """A proven lower bound over every index in range and every size, or None."""
    at_extreme = _extreme(expression, low=True)
    total = at_extreme.const
    for atom, coefficient in at_extreme.terms.items():
        bound = _range(atom)[0 if coefficient > 0 else 1]
        if bound is None:
            return None
        total += coefficient * bound
    return total


def upper(expression: Affine) -> int | None:
    """A proven upper bound, or None."""
    bound = lower(-expression)
    return None if bound is None else -bound


def content(expression: Affine) -> int:
    """Greatest common divisor of the coefficients, 0 without terms."""
    return math.gcd(*expression.terms.values())


def from_sympy(expression: sympy.Expr, ranges: Mapping[Any, Any] | None = None) -> Affine:
    """A size expression as an Affine; products of symbols become one symbol."""
    result = Affine()
    for term in sympy.Add.make_args(sympy.expand(expression)):
        coefficient, rest = term.as_coeff_Mul()
        if not coefficient.is_Integer:
            return affine(Sym(expression))
        if rest == sympy.S.One:
            result = result + int(coefficient)
        else:
            result = result + affine(_symbol(rest, ranges)).times(int(coefficient))
    return result


def _symbol(expression: sympy.Expr, ranges: Mapping[Any, Any] | None) -> Sym:
    bounds = (ranges or {}).get(expression)
    if bounds is not None:
        return Sym(expression, _integer(bounds.lower), _integer(bounds.upper))
    # A product of sizes is a size; of anything else nothing is known.
    factors = sympy.Mul.make_args(expression)
    known = [(ranges or {}).get(factor) for factor in factors]
    if all(b is not None and (_integer(b.lower) or -1) >= 0 for b in known):
        return Sym(expression, low=0)
    return Sym(expression)


def _integer(bound: Any) -> int | None:
    return int(bound) if getattr(bound, "is_Integer", False) else None


def _extreme(expression: Affine, *, low: bool) -> Affine:
    """``expression`` with every variable at the end of its range that makes it smallest."""
    for _ in range(4):  # a variable's size may hold no variable; nesting is shallow
        variables = [(a, c) for a, c in expression.terms.items() if isinstance(a, Var)]
        if not variables:
            break
        for var, coefficient in variables:
            end = Affine() if (coefficient > 0) == low else var.size - 1
            expression = expression + (end - affine(var)).times(coefficient)
    return expression


def _range(atom: Atom) -> tuple[int | None, int | None]:
    if isinstance(atom, FloorDiv):
        low, high = lower(atom.of), upper(atom.of)
        return (
            None if low is None else low // atom.by,
            None if high is None else high // atom.by,
        )
    if isinstance(atom, Var):  # only when a size holds a variable, which lifting never builds
        return 0, None
    return atom.low, atom.high


def _substituted(atom: Atom, var: Var, value: Affine) -> Affine:
    if atom == var:
        return value
    if isinstance(atom, FloorDiv):
        return floor_div(atom.of.substitute(var, value), atom.by)
    if isinstance(atom, Load):
        index = tuple(e.substitute(var, value) for e in atom.index)
        return affine(Load(atom.node, index, atom.low, atom.high, atom.why))
    return affine(atom)


def _signed(coefficient: int) -> str:
    if abs(coefficient) == 1:
        return "+" if coefficient > 0 else "-"
    return f"{coefficient:+d}*"


def _shown(atom: Atom) -> str:
    if isinstance(atom, Var):
        return atom.name
    if isinstance(atom, Sym):
        return str(atom.expr)
    if isinstance(atom, FloorDiv):
        return f"(({atom.of!r}) // {atom.by})"
    return f"%{atom.node.name}[{', '.join(map(repr, atom.index))}]"
