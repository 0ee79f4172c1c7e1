"""What each operator does to the scores: the right-hand sides of the score grammar."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import fx

from nsa_compile.passes import dialect
from nsa_compile.passes.dialect import Op
from nsa_compile.passes.masks.affine import Affine
from nsa_compile.passes.masks.term import Term
from nsa_compile.passes.masks.views import Element, Index
from nsa_compile.passes.match.logits import Factor, fold
from nsa_compile.passes.match.numbers import is_number, number
from nsa_compile.passes.match.walk import Walk
from nsa_compile.passes.match.weights import CASTS, Stumble, dropout

# A lower clamp at a number that hides a key hides it still.
HIDDEN = -1e4


def _mul(walk: Walk, node: fx.Node, op: Op) -> None:
    scores, other, _ = walk.sides(node, op)
    _factor(walk, node, other, divides=False)
    walk.pass_to(node, scores)


def _div(walk: Walk, node: fx.Node, op: Op) -> None:
    scores, other, first = walk.sides(node, op)
    if not first or op["rounding_mode"] is not None:
        raise Stumble(node, "it divides by scores or rounds")
    _factor(walk, node, other, divides=True)
    walk.pass_to(node, scores)


def _factor(walk: Walk, node: fx.Node, other: Any, *, divides: bool) -> None:
    value = number(other)
    if not math.isnan(value):
        if divides and value == 0:
            raise Stumble(node, "it divides by 0")
        walk.logits.scale *= 1 / value if divides else value
        return
    if not isinstance(other, fx.Node):
        raise Stumble(node, "a factor of unknown kind")
    at = () if is_number(other) else walk.aligned(node, other)
    if _depends(at, walk.key):
        if divides:
            raise Stumble(node, "it divides keys by a tensor")
        walk.add_term(Term(other, "times", node, at))
        return
    walk.logits.factors.append(Factor(Element(other, at), divides))


def _neg(walk: Walk, node: fx.Node, op: Op) -> None:
    walk.logits.scale *= -1.0
    walk.pass_to(node, op["x"])


def _add(walk: Walk, node: fx.Node, op: Op) -> None:
    """``scores + other``, ``scores - other``, ``other - scores``."""
    if op["alpha"] not in (None, 1):
        raise Stumble(node, "an addition with alpha")
    scores, other, first = walk.sides(node, op)
    sign_scores, sign_other = {
        "add": (1.0, 1.0),
        "sub": (1.0, -1.0) if first else (-1.0, 1.0),
        "rsub": (-1.0, 1.0) if first else (1.0, -1.0),
    }[op.name]
    _addend(walk, node, other, sign_other)
    walk.logits.scale *= sign_scores
    walk.pass_to(node, scores)


def _addend(walk: Walk, node: fx.Node, other: Any, sign: float) -> None:
    if is_number(other):
        # The same number on every key of a row changes no softmax, but a sink's share.
        _same_for_all(walk, node)
        return
    if not isinstance(other, fx.Node):
        raise Stumble(node, "an addend of unknown kind")
    at = walk.aligned(node, other)
    # A mask over a single key differs between no two, but hides it from a row that has a sink.
    hides = not walk.key.variables() and _is_relative(walk)
    if not _depends(at, walk.key) and not hides:
        _same_for_all(walk, node)
        return
    after = walk.after
    factor = None if after is None else after * sign
    walk.add_term(Term(other, "add", node, at, factor=factor))


def _is_relative(walk: Walk) -> bool:
    """Whether more than the differences of a row's logits counts."""
    return walk.logits.sinks is not None or bool(walk.logits.softcap)


def _same_for_all(walk: Walk, node: fx.Node) -> None:
    if _is_relative(walk):
        raise Stumble(node, "it moves whole rows against their sink or under their softcap")
    walk.logits.shifted = node


def _depends(at: Index, key: Affine) -> bool:
    """Whether an element differs between keys (with one key, nothing does)."""
    return any(each.variables() & key.variables() for each in at)


def _masked_fill(walk: Walk, node: fx.Node, op: Op) -> None:
    _fill(walk, node, op["mask"], op["value"], "hide")
    walk.pass_to(node, op["x"])


def _where(walk: Walk, node: fx.Node, op: Op) -> None:
    scores, fill, first = walk.sides(node, op)
    _fill(walk, node, op["condition"], fill, "keep" if first else "hide")
    walk.pass_to(node, scores)


def _fill(walk: Walk, node: fx.Node, mask: Any, fill: Any, kind: str) -> None:
    if not isinstance(mask, fx.Node) or dialect.shape(mask) is None:
        raise Stumble(node, "a mask of unknown kind")
    value = number(fill)
    held: float | fx.Node = value
    if math.isnan(value):
        if not isinstance(fill, fx.Node):
            raise Stumble(node, f"it fills scores with {fill}")
        held = fill
    term = Term(mask, kind, node, walk.aligned(node, mask), fill=held, factor=walk.after)
    walk.add_term(term)


def _tanh(walk: Walk, node: fx.Node, op: Op) -> None:
    logits = walk.logits
    fold(logits)
    if logits.softcap or logits.factors or not logits.scale > 0:
        raise Stumble(node, "a softcap that is no positive constant")
    logits.softcap, logits.scale = logits.scale, 1.0
    walk.pass_to(node, op["x"])


def _cast(walk: Walk, node: fx.Node, op: Op) -> None:
    fake = dialect.value(node)
    if not fake.dtype.is_floating_point:
        raise Stumble(node, "it rounds scores")
    walk.pass_to(node, op["x"])


def _dropout(walk: Walk, node: fx.Node, op: Op) -> None:
    if dropout(op) != 0:
        raise Stumble(node, "dropout of scores")
    walk.pass_to(node, op["x"])


def _floor(walk: Walk, node: fx.Node, op: Op) -> None:
    """``max(scores, finfo.min)`` and ``clamp(min=finfo.min)`` make -inf finite, nothing else."""
    if op.name == "clamp":
        scores, low = op["x"], op["min"]
        if op["max"] is not None:
            raise Stumble(node, "it clamps scores from above")
    else:
        scores, low, _ = walk.sides(node, op)
    if not number(low) <= HIDDEN or walk.logits.softcap:
        raise Stumble(node, f"it clamps scores to {low}")
    walk.floor = max(walk.floor, number(low) * (walk.after or 1.0))
    walk.pass_to(node, scores)


def _max(walk: Walk, node: fx.Node, op: Op) -> None:
    """``torch.max(scores, low)``."""
    other = op["dim"] if op["y"] is None else op["y"]
    _floor(walk, node, Op("maximum", {"x": op["x"], "y": other}))


def _cat(walk: Walk, node: fx.Node, op: Op) -> None:
    """``cat([scores, sinks], -1)``: the part that holds the element goes on."""
    rank = len(walk.at)
    dim = 0 if op["dim"] is None else op["dim"] % rank
    parts = list(op["tensors"])
    shapes = [dialect.shape(part) for part in parts]
    if len(parts) != 2 or any(shape is None for shape in shapes) or walk.logits.sinks is not None:
        raise Stumble(node, "a concatenation that adds no sinks")
    sizes = [walk.grammar.lifter.sizes.affine(shape[dim]) for shape in shapes if shape is not None]
    lead = walk.grammar.leads(parts[0], node)
    scores, sinks = (parts[0], parts[1]) if lead else (parts[1], parts[0])
    size = sizes[1] if lead else sizes[0]
    start = Affine() if lead else sizes[0]
    at = walk.at[dim] - start
    if at != walk.key or size.constant != 1 or walk.logits.terms or walk.logits.softcap:
        raise Stumble(node, "a concatenation that adds no sinks")
    fold(walk.logits)
    if walk.logits.factors or walk.logits.scale != 1:
        raise Stumble(node, "sinks that are scaled with the scores")
    column = (*walk.at[:dim], Affine(), *walk.at[dim + 1 :])
    walk.logits.sinks = Element(walk.grammar.current(sinks, node), column)
    walk.enter(scores, node, (*walk.at[:dim], at, *walk.at[dim + 1 :]))


RULES: dict[str, Callable[[Walk, fx.Node, Op], None]] = {
    "mul": _mul,
    "div": _div,
    "neg": _neg,
    "add": _add,
    "sub": _add,
    "rsub": _add,
    "masked_fill": _masked_fill,
    "where": _where,
    "tanh": _tanh,
    "dropout": _dropout,
    "clamp": _floor,
    "maximum": _floor,
    "max": _max,
    "cat": _cat,
    **dict.fromkeys(CASTS, _cast),
}
