"""Chunked attention: comparisons that say ``(i + offset) // c == j // c``, in any spelling."""

from __future__ import annotations

from typing import NamedTuple

from nsa_compile.passes.masks.affine import Affine, FloorDiv, Var
from nsa_compile.passes.masks.conditions import Condition, Eq, Ge


class Chunk(NamedTuple):
    """Where key j lies against the chunk of ``size`` positions that holds ``i + offset``.

    ``from_start``: not before it. ``to_end``: not after it.
    """

    size: int
    offset: Affine
    from_start: bool
    to_end: bool


def chunk(conjunct: Condition) -> Chunk | None:
    """What ``conjunct`` says about chunks, None when it is about something else."""
    if isinstance(conjunct, Eq):
        found = _numbers(conjunct.of) or _numbers(-conjunct.of)
        return found and found._replace(from_start=True, to_end=True)
    if not isinstance(conjunct, Ge):
        return None
    of = conjunct.of
    found = _numbers(of) or _positions(of - _last(of))
    if found is not None:
        return found._replace(to_end=True)
    found = _numbers(-of) or _positions(-of)
    return found and found._replace(from_start=True)


def _numbers(of: Affine) -> Chunk | None:
    """``x // c - j // c + k``, which is ``(x + k * c) // c - j // c``."""
    divided = [a for a in of.terms if isinstance(a, FloorDiv)]
    if len(divided) != 2 or divided[0].by != divided[1].by:
        return None
    first, second = sorted(divided, key=lambda a: -of.terms[a])
    if (of.terms[first], of.terms[second]) != (1, -1) or not _is_key(second.of):
        return None
    rest = Affine(of.const, {a: c for a, c in of.terms.items() if a not in divided})
    return _around(first.of + rest.times(first.by), first.by)


def _positions(of: Affine) -> Chunk | None:
    """``c * (x // c) + k * c - j``: the first key of the chunk of ``x + k * c``, against j."""
    divided = [a for a in of.terms if isinstance(a, FloorDiv)]
    if len(divided) != 1 or of.terms[divided[0]] != divided[0].by:
        return None
    size = divided[0].by
    rest = Affine(of.const, {a: c for a, c in of.terms.items() if a != divided[0]})
    keys = [a for a in rest.terms if isinstance(a, Var)]
    if [(a.name, rest.terms[a]) for a in keys] != [("j", -1)]:
        return None
    shift = Affine(rest.const, {a: c for a, c in rest.terms.items() if a not in keys})
    if shift.const % size or any(c % size for c in shift.terms.values()):
        return None
    return _around(divided[0].of + shift, size)


def _last(of: Affine) -> int:
    """How far the last position of a chunk lies behind its first."""
    return next((a.by - 1 for a in of.terms if isinstance(a, FloorDiv)), 0)


def _is_key(of: Affine) -> bool:
    return not of.const and [(_name(a), c) for a, c in of.terms.items()] == [("j", 1)]


def _around(position: Affine, size: int) -> Chunk | None:
    """The chunk of ``position``, when that is i plus something that holds no index or tensor."""
    query = [a for a in position.terms if _name(a) == "i"]
    if len(query) != 1 or position.terms[query[0]] != 1:
        return None
    offset = position - Affine(0, {query[0]: 1})
    if offset.variables() or offset.loads():
        return None
    return Chunk(size, offset, from_start=False, to_end=False)


def _name(atom: object) -> str | None:
    return atom.name if isinstance(atom, Var) else None
