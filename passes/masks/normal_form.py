"""Name a lifted condition: causal(offset), window(w), padding and their conjunctions, or refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from torch import fx

from nsa_compile.passes import dialect
from nsa_compile.passes.masks.affine import Affine, Var
from nsa_compile.passes.masks.conditions import (
    FALSE,
    Condition,
    Ge,
    conjuncts,
    describe,
    loads,
    variables,
)
from nsa_compile.passes.masks.logic import all_of
from nsa_compile.passes.reasons import Reason, Refusal
from nsa_compile.passes.site import Mask

# Finds the node of a graph that holds a run-time integer, None when there is none.
FindInteger = Callable[[Affine], "fx.Node | None"]


@dataclass
class _Terms:
    """What a conjunction says so far: ``j <= i + above``, ``j >= i - below``, the real keys."""

    above: Affine | None = None
    below: Affine | None = None
    keys: list[Condition] = field(default_factory=list)


def classify(
    keep: Condition,
    mask: fx.Node | None,
    *,
    buffers: Iterable[fx.Node],
    rows: Mapping[Condition, fx.Node],
    find_integer: FindInteger,
) -> Mask | Refusal:
    """The normal form of the condition under which query i sees key j.

    Args:
        mask: the mask tensor, to name in a refusal.
        buffers: what the proof read, to be recorded.
        rows: the graph's tensors ``[B, Tk]`` by the condition that they hold.
        find_integer: the node that holds a run-time offset.
    """
    if keep == FALSE:
        return _refusal(mask, "no key is ever visible")
    terms = _Terms()
    for conjunct in sorted(conjuncts(keep), key=repr):
        refusal = _term(conjunct, terms, mask)
        if refusal is not None:
            return refusal
    valid: fx.Node | None = None
    if terms.keys:
        valid = rows.get(all_of(terms.keys))
        if valid is None:
            return _unclassified(terms.keys, mask)
    return _named(terms, mask, valid, tuple(sorted(buffers)), find_integer)


def _term(conjunct: Condition, terms: _Terms, mask: fx.Node | None) -> Refusal | None:
    rest = _without_diagonal(conjunct.of) if isinstance(conjunct, Ge) else None
    if isinstance(conjunct, Ge) and rest is not None and not rest.loads():
        upper = _sign(conjunct.of, "i") > 0
        tight = _tighter(terms.above if upper else terms.below, rest)
        if tight is None:
            return _refusal(mask, f"two diagonals that cannot be compared, {_shown(conjunct)}")
        if upper:
            terms.above = tight
        else:
            terms.below = tight
        return None
    if loads(conjunct) and {v.name for v in variables(conjunct)} <= {"b", "j"}:
        terms.keys.append(conjunct)
        return None
    return _unclassified([conjunct], mask)


def _without_diagonal(of: Affine) -> Affine | None:
    """``of`` without ``i - j`` (or ``j - i``), None when it is not a diagonal."""
    positions = {a.name: c for a, c in of.terms.items() if isinstance(a, Var)}
    if set(positions) != {"i", "j"} or sorted(positions.values()) != [-1, 1]:
        return None
    rest = Affine(of.const, {a: c for a, c in of.terms.items() if not isinstance(a, Var)})
    return None if rest.variables() else rest


def _sign(of: Affine, name: str) -> int:
    return sum(c for a, c in of.terms.items() if isinstance(a, Var) and a.name == name)


def _tighter(current: Affine | None, bound: Affine) -> Affine | None:
    if current is None:
        return bound
    difference = (bound - current).constant
    if difference is None:
        return None
    return bound if difference < 0 else current


def _named(
    terms: _Terms,
    mask: fx.Node | None,
    valid: fx.Node | None,
    buffers: tuple[fx.Node, ...],
    find_integer: FindInteger,
) -> Mask | Refusal:
    above, below = terms.above, terms.below
    if above is None:
        if below is not None:
            return _refusal(mask, "it hides the past and shows the future")
        return Mask(causal=False, valid=valid, buffers=buffers)
    if below is not None and below == above and below.constant != 0:
        window = (above + 1).constant
        if window is None or window < 1:
            return _refusal(mask, f"a window of {above + 1!r}")
        return Mask(causal=False, window=window, valid=valid, buffers=buffers)
    window = None
    if below is not None:
        window = (above + below + 1).constant
        if window is None or window < 1:
            return _refusal(mask, f"a window of {above + below + 1!r}")
    offset: int | fx.Node | None = above.constant
    if offset is None:
        offset = find_integer(above)
    if offset is None:
        return _refusal(mask, f"no node of the graph holds the offset {above!r}")
    return Mask(causal=True, offset=offset, window=window, valid=valid, buffers=buffers)


def _unclassified(terms: list[Condition], mask: fx.Node | None) -> Refusal:
    """Name the first node that the condition could not see through, or the condition itself."""
    found = [load for term in terms for load in loads(term)]
    stopped = [load for load in found if load.why] or found
    if not stopped:
        return _refusal(mask, f"the condition {_shown(terms[0])}")
    load = min(stopped, key=lambda each: each.node)
    at = ", ".join(repr(e) for e in load.index)
    known_later = f"its value at [{at}] is only known at run time, and it is no [B, Tk] key padding"
    return _refusal(load.node, load.why or known_later)


def _shown(condition: Condition) -> str:
    text = describe(condition)
    return text if len(text) < 120 else text[:117] + "..."


def _refusal(node: fx.Node | None, what: str) -> Refusal:
    named = "the mask" if node is None else f"node {dialect.describe(node)}"
    return Refusal(Reason.MASK_NOT_UNDERSTOOD, f"{named}: {what}")
