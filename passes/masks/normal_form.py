"""Name a lifted condition: causal, window, chunk, prefix, document, padding, or refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NoReturn

from torch import fx

from nsa_compile.passes import dialect
from nsa_compile.passes.masks import blame, documents
from nsa_compile.passes.masks.affine import Affine, Var
from nsa_compile.passes.masks.chunks import Chunk, chunk
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
    describe,
    eq,
    ge,
    loads,
    ne,
    variables,
)
from nsa_compile.passes.masks.lift import Lifter
from nsa_compile.passes.masks.logic import all_of, negation
from nsa_compile.passes.masks.prefixes import prefix
from nsa_compile.passes.reasons import Reason, Refusal
from nsa_compile.passes.site import Mask

# Finds the node of a graph that holds a run-time integer, None when there is none.
FindInteger = Callable[[Affine], "fx.Node | None"]


@dataclass
class _Terms:
    """What a conjunction says so far.

    ``j <= i + above``, ``j >= i - below``, the real keys and queries, chunks, what else query and
    key must have in common, and the prefix (whose alternative the two diagonals then are).
    """

    above: Affine | None = None
    below: Affine | None = None
    keys: list[Condition] = field(default_factory=list)
    queries: list[Condition] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    same: list[Condition] = field(default_factory=list)
    prefix: Affine | None = None


class _Refused(Exception):
    """Carries the refusal out of the steps of :func:`classify`; never leaves this file."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.text)
        self.refusal = refusal


def classify(
    keep: Condition,
    mask: fx.Node | None,
    *,
    buffers: Iterable[fx.Node],
    lifter: Lifter,
    find_integer: FindInteger,
) -> Mask | Refusal:
    """The normal form of the condition under which query i sees key j.

    Args:
        mask: the mask tensor, to name in a refusal.
        buffers: what the proof read, to be recorded.
        lifter: what lifted ``keep``; knows the tensors that hold its terms.
        find_integer: the node that holds a run-time offset.
    """
    if keep == FALSE:
        return _refusal(mask, "no key is ever visible")
    try:
        namer = _Namer(mask, lifter, find_integer)
        return namer.named(documents.straightened(keep, lifter), tuple(sorted(buffers)))
    except _Refused as refused:
        return refused.refusal


class _Namer:
    """Sorts the terms of one condition and puts them together as a Mask."""

    def __init__(self, mask: fx.Node | None, lifter: Lifter, find_integer: FindInteger) -> None:
        self.mask = mask
        self.lifter = lifter
        self.find_integer = find_integer
        self.terms = _Terms()

    def named(self, keep: Condition, buffers: tuple[fx.Node, ...]) -> Mask:
        # Alternatives last: a prefix must find the diagonals that stand beside it.
        for conjunct in sorted(conjuncts(keep), key=lambda c: (not isinstance(c, Ge), repr(c))):
            self._sort(conjunct)
        causal, offset, window = self._diagonals()
        size = self._chunk(offset)
        segments, in_order = self._segments(offset)
        valid, hidden = self._padding()
        return Mask(
            causal=causal,
            offset=self._integer(offset, "offset"),
            window=window,
            valid=valid,
            hidden=hidden,
            chunk=size,
            prefix=self._prefix(),
            segments=segments,
            segments_sorted=in_order,
            buffers=buffers,
        )

    def _sort(self, conjunct: Condition) -> None:
        if self._diagonal(conjunct):
            return
        part = chunk(conjunct)
        if part is not None:
            self.terms.chunks.append(part)
        elif loads(conjunct) and {v.name for v in variables(conjunct)} <= {"b", "j"}:
            self.terms.keys.append(conjunct)
        elif loads(conjunct) and {v.name for v in variables(conjunct)} <= {"b", "i"}:
            self.terms.queries.append(conjunct)
        elif documents.ids(conjunct, self.lifter) is not None:
            self.terms.same.append(conjunct)
        elif not self._alternatives(conjunct):
            raise _Refused(_unclassified([conjunct], self.mask))

    def _diagonal(self, conjunct: Condition) -> bool:
        rest = _without_diagonal(conjunct.of) if isinstance(conjunct, Ge) else None
        if not isinstance(conjunct, Ge) or rest is None or rest.loads():
            return False
        upper = _sign(conjunct.of, "i") > 0
        tight = _tighter(self.terms.above if upper else self.terms.below, rest)
        if tight is None:
            self._refuse(f"two diagonals that cannot be compared, {_shown(conjunct)}")
        if upper:
            self.terms.above = tight
        else:
            self.terms.below = tight
        return True

    def _alternatives(self, conjunct: Condition) -> bool:
        """A prefix: its keys are seen whatever the diagonals beside it say."""
        found = prefix(conjunct)
        if found is None:
            return False
        if self.terms.above is not None or self.terms.below is not None:
            self._refuse("a prefix under a window of its own")
        for part in conjuncts(found.local):
            self._diagonal(part)
        self.terms.prefix = found.length
        return True

    def _diagonals(self) -> tuple[bool, Affine, int | None]:
        """causal, offset and window."""
        above, below = self.terms.above, self.terms.below
        if above is None:
            if below is not None:
                self._refuse("it hides the past and shows the future")
            whole = next((part.offset for part in self.terms.chunks), Affine())
            return False, whole, None
        if below is None:
            return True, above, None
        two_sided = below == above and below.constant != 0
        width = above + 1 if two_sided else above + below + 1
        window = width.constant
        if window is None or window < 1:
            self._refuse(f"a window of {width!r}")
        return (False, Affine(), window) if two_sided else (True, above, window)

    def _chunk(self, offset: Affine) -> int | None:
        """The size of the chunks of ``i + offset``, when all comparisons are about the same."""
        parts = self.terms.chunks
        if not parts:
            return None
        size = parts[0].size
        if any((part.size, part.offset) != (size, offset) for part in parts):
            self._refuse("chunks that do not start where its positions do")
        # Keys up to the query's own are never past the end of its chunk.
        ends = self.terms.above is not None and self.terms.prefix is None
        if any(part.from_start for part in parts) and (ends or any(p.to_end for p in parts)):
            return size
        self._refuse(f"one end of a chunk of {size} only")

    def _segments(self, offset: Affine) -> tuple[tuple[fx.Node, fx.Node] | None, bool]:
        """The tensors that query and key must agree in, and whether those are sorted documents."""
        same, queries = self.terms.same, self._queries()
        found = [documents.ids(each, self.lifter) for each in same]
        if queries and not same:
            # Real queries see real keys: both are true, and the keys are told to be.
            pair = self.lifter.rows.flagged(all_of(queries), all_of(self.terms.keys))
            if pair is not None:
                return pair, False
        if queries or len(found) > 1 or None in found:
            raise _Refused(_unclassified(queries + same, self.mask))
        ids = next((each for each in found if each is not None), None)
        if ids is None:
            return None, False
        return (ids.query, ids.key), ids.in_order(offset, self.lifter)

    def _queries(self) -> list[Condition]:
        """What is asked of the query and not, by the ids that both share, of the key as well."""
        equal = [each.of for each in self.terms.same if isinstance(each, Eq)]
        keys = set(self.terms.keys)
        return [each for each in self.terms.queries if not _of_the_key(each, equal) & keys]

    def _padding(self) -> tuple[fx.Node | None, fx.Node | None]:
        """The row that is not 0 at real keys, and the row that is not 0 at hidden ones."""
        if not self.terms.keys:
            return None, None
        rows = self.lifter.rows.valid
        hiding = {key: rows.get(negation(key)) for key in self.terms.keys}
        shown = all_of(self.terms.keys)
        if shown in rows:
            return rows[shown], None
        if negation(shown) in rows:
            return None, rows[negation(shown)]
        hidden = {row for row in hiding.values() if row is not None}
        shown = all_of(key for key, row in hiding.items() if row is None)
        if len(hidden) != 1 or not (shown == TRUE or shown in rows):
            raise _Refused(_unclassified(self.terms.keys, self.mask))
        return rows.get(shown), hidden.pop()

    def _prefix(self) -> int | fx.Node | None:
        length = self.terms.prefix
        if length is None:
            return None
        if not length.loads():
            return self._integer(length, "prefix")
        found = self.lifter.rows.ids.get(length)
        if found is None:
            self._refuse(f"no node of the graph holds the prefix {length!r}")
        return found

    def _integer(self, value: Affine, what: str) -> int | fx.Node:
        if value.constant is not None:
            return value.constant
        found = self.find_integer(value)
        if found is None:
            self._refuse(f"no node of the graph holds the {what} {value!r}")
        return found

    def _refuse(self, what: str) -> NoReturn:
        raise _Refused(_refusal(self.mask, what))


def _without_diagonal(of: Affine) -> Affine | None:
    """``of`` without ``i - j`` (or ``j - i``), None when it is not a diagonal."""
    positions = {a.name: c for a, c in of.terms.items() if isinstance(a, Var)}
    if set(positions) != {"i", "j"} or sorted(positions.values()) != [-1, 1]:
        return None
    rest = Affine(of.const, {a: c for a, c in of.terms.items() if not isinstance(a, Var)})
    return None if rest.variables() else rest


def _of_the_key(query: Condition, equal: list[Affine]) -> set[Condition]:
    """``query`` with what it reads replaced by what, as ``equal`` say, is the same."""
    if isinstance(query, (All, Any_)):
        return set()
    make = {Ge: ge, Eq: eq, Ne: ne}[type(query)]
    found = set()
    for line in equal:
        for atom, coefficient in query.of.terms.items():
            at = line.terms.get(atom, 0)
            if abs(at) == 1:
                found.add(make(query.of - line.times(at * coefficient)))
    return found


def _sign(of: Affine, name: str) -> int:
    return sum(c for a, c in of.terms.items() if isinstance(a, Var) and a.name == name)


def _tighter(current: Affine | None, bound: Affine) -> Affine | None:
    if current is None:
        return bound
    difference = (bound - current).constant
    if difference is None:
        return None
    return bound if difference < 0 else current


def _unclassified(terms: list[Condition], mask: fx.Node | None) -> Refusal:
    """Name the first node that the condition could not see through, or the condition itself."""
    found = [load for term in terms for load in loads(term)]
    stopped = [load for load in found if load.why] or found
    if not stopped:
        return _refusal(mask, f"the condition {_shown(terms[0])}")
    load = min(stopped, key=lambda each: each.node)
    at = ", ".join(repr(e) for e in load.index)
    return blame.refusal(
        load, f"its value at [{at}] is only known at run time, and it is no padding or id"
    )


def _shown(condition: Condition) -> str:
    text = describe(condition)
    return text if len(text) < 120 else text[:117] + "..."


def _refusal(node: fx.Node | None, what: str) -> Refusal:
    named = "the mask" if node is None else f"node {dialect.describe(node)}"
    return Refusal(Reason.MASK_NOT_UNDERSTOOD, f"{named}: {what}")
