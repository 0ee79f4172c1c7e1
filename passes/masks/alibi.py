"""Tell ALiBi, ``slope[h] * position[j]`` added to the scores, from the mask in the same sum."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from nsa_compile.passes import dialect
from nsa_compile.passes.masks import blame
from nsa_compile.passes.masks.affine import Affine, Load, Var, affine, content
from nsa_compile.passes.masks.conditions import TRUE, Condition
from nsa_compile.passes.masks.implication import excludes
from nsa_compile.passes.masks.lift import Lifter
from nsa_compile.passes.masks.logic import all_of, negation
from nsa_compile.passes.masks.values import (
    Choice,
    Unknown,
    Value,
    Weighted,
    choose,
    leaves,
)
from nsa_compile.passes.reasons import Reason, Refusal

# A bias grows with the distance of two keys, slope < 1 a key: what hides a key must outweigh it.
# finfo(float16).min does up to 65,000 keys, and -1e9 and finfo(float32).min up to any length.
_HIDES = -6e4


@dataclass(frozen=True)
class Alibi:
    """``logit += factor * slopes[h] * positions[j]``, up to what is the same for a whole row.

    Attributes:
        slopes: tensor with one number a query head.
        positions: row over keys; None is the key's index.
        factor: what the slopes are multiplied by.
    """

    slopes: fx.Node
    positions: fx.Node | None
    factor: float


# A bias and the condition under which a term adds it; None adds nothing.
Case = tuple[Condition, "Weighted | None"]


def split(value: Value) -> tuple[Value, tuple[Case, ...]]:
    """``value`` without its biases, and the biases. None of them when it has none."""
    if not any(_is_bias(leaf) for leaf in leaves(value)):
        return value, ()
    cases = tuple(
        (path, _as_weighted(leaf)) for path, leaf in _paths(value, TRUE) if not _hides(leaf)
    )
    return _without(value), cases


def resolve(
    cases: tuple[Case, ...],
    keep: Condition,
    factor: float | None,
    heads: Affine,
    dtype: torch.dtype,
    lifter: Lifter,
) -> Alibi | Refusal | None:
    """The ALiBi that ``cases`` are where ``keep`` holds; None when they add nothing there.

    Args:
        factor: what the bias is multiplied by before the softmax; None is known at run time only.
        heads: how many query heads there are.
        dtype: of the scores; a bias that was rounded to less cannot be computed again.
    """
    shown = {bias for path, bias in cases if not excludes([keep, path])}
    if shown <= {None}:
        return None
    first = next(bias for bias in shown if bias is not None)
    if len(shown) > 1 or factor is None:
        return _refusal(first.load, "it adds different numbers to keys that one query sees")
    part = _key_part(first)
    if part is None:
        if not affine(first.load).variables() and first.times.constant is not None:
            # Small, it changes nothing; the lowest number would make all scores equal.
            return _refusal(first.load, "it adds a number that is only known at run time")
        return None
    if part.load is None:
        made = blame.of_activations(first.load)
        return made or _refusal(first.load, "it is no slope of each head times a position")
    if torch.finfo(part.dtype).eps > torch.finfo(dtype).eps:
        return _refusal(part.load, f"it is rounded to {part.dtype}")
    return _alibi(part, factor, heads, lifter)


@dataclass(frozen=True)
class _KeyPart:
    """What of a bias depends on the key; ``load`` is None where that is no ALiBi."""

    load: Load | None
    times: Affine
    factor: float
    dtype: torch.dtype


def _key_part(bias: Weighted) -> _KeyPart | None:
    """A softmax does not see what is the same for all keys of a query."""
    rest = isinstance(bias.rest, Affine) and _of_key(bias.rest) != Affine()
    times = _of_key(bias.times)
    on_keys = any(v.name != "h" for v in affine(bias.load).variables())
    if rest or on_keys:
        return _KeyPart(None, bias.times, bias.factor, bias.dtype)
    if times == Affine():
        return None
    scale = content(times) * (1 if min(times.terms.items(), key=repr)[1] > 0 else -1)
    base = Affine(0, {a: c // scale for a, c in times.terms.items()})
    return _KeyPart(bias.load, base, bias.factor * scale, bias.dtype)


def _of_key(of: Affine) -> Affine:
    """The terms of ``of`` that depend on the key."""
    keyed = {a: c for a, c in of.terms.items() if "j" in {v.name for v in affine(a).variables()}}
    return Affine(0, keyed)


def _alibi(part: _KeyPart, factor: float, heads: Affine, lifter: Lifter) -> Alibi | Refusal:
    assert part.load is not None
    shape = lifter.sizes.shape(part.load.node) or []
    used = [(a, s) for a, s in zip(part.load.index, shape, strict=True) if s.constant != 1]
    if used != ([] if heads.constant == 1 else [(affine(Var("h", heads)), heads)]):
        return _refusal(part.load, "it holds no number for each head, in their order")
    ((atom, _), *more) = part.times.terms.items()
    if isinstance(atom, Var) and not more:
        return Alibi(part.load.node, None, part.factor * factor)
    for held, row in lifter.rows.over("j").items():
        if _of_key(held) == part.times and "i" not in {v.name for v in held.variables()}:
            return Alibi(part.load.node, row, part.factor * factor)
    return _refusal(part.load, f"no node of the graph holds the positions {part.times!r}")


def _paths(value: Value, path: Condition) -> Iterator[tuple[Condition, Value]]:
    if not isinstance(value, Choice):
        yield path, value
        return
    yield from _paths(value.then, all_of([path, value.condition]))
    yield from _paths(value.otherwise, all_of([path, negation(value.condition)]))


def _is_bias(leaf: Value) -> bool:
    """Whether ``leaf`` differs from head to head; what does not is a mask, known or not."""
    if not isinstance(leaf, (Unknown, Weighted)):
        return False
    names = {v.name for v in affine(leaf.load).variables()}
    return not names or "h" in names


def _as_weighted(leaf: Value) -> Weighted | None:
    if isinstance(leaf, Unknown) and _is_bias(leaf):
        return Weighted(leaf.load, Affine(1))
    return leaf if isinstance(leaf, Weighted) and _is_bias(leaf) else None


def _hides(leaf: Value) -> bool:
    if isinstance(leaf, Weighted) and any(abs(n * leaf.factor) > 1 for n in _weights(leaf.times)):
        return False  # a slope times more than a position may take back what hides
    rest = leaf.rest if isinstance(leaf, Weighted) else leaf
    if isinstance(rest, Affine):
        return rest.constant is not None and rest.constant <= _HIDES
    return isinstance(rest, float) and rest <= _HIDES


def _weights(times: Affine) -> list[int]:
    """How often a slope counts for each position; a constant of one position is none."""
    return [*times.terms.values(), times.const if times.constant is not None else 0]


def _without(value: Value) -> Value:
    """``value`` with every bias taken off."""
    if isinstance(value, Choice):
        return choose(value.condition, _without(value.then), _without(value.otherwise))
    if not _is_bias(value):
        return value
    return value.rest if isinstance(value, Weighted) and _hides(value) else Affine()


def _refusal(load: Load, what: str) -> Refusal:
    return Refusal(Reason.ADDITIVE_BIAS, f"node {dialect.describe(load.node)}: {what}")
