"""What one term of a score does to a key: lets it through, hides it, or adds something else."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import fx

from nsa_compile.passes import dialect
from nsa_compile.passes.masks import blame
from nsa_compile.passes.masks.affine import Affine, affine
from nsa_compile.passes.masks.alibi import Case
from nsa_compile.passes.masks.conditions import CONDITIONS, FALSE, TRUE, Condition
from nsa_compile.passes.masks.term import Term
from nsa_compile.passes.masks.values import (
    Choice,
    Unknown,
    Value,
    Weighted,
    as_number,
    by_cases,
    choose,
    leaves,
    truth,
)
from nsa_compile.passes.reasons import Reason, Refusal

# An additive mask hides a key when it adds at most this. exp(score - maximum) is then 0 in float32
# unless the scores of one row span more than 9,000, so dropping the key changes nothing. finfo.min,
# -inf, -1e9 and the -1e4 of older models all count; a smaller penalty is a bias, not a mask.
MASKED = -1e4
# Adding this leaves nothing of a score: a row that is hidden whole holds equal numbers.
ABSORBS = -1e30


@dataclass(frozen=True)
class Kept:
    """Where a term lets a key through; ``penalty`` is the finite number that it adds elsewhere.

    ``ones`` says where a factor leaves the logit as it is; ``biases`` what else it adds, and where.
    """

    condition: Condition
    penalty: float | None = None
    ones: Condition = TRUE
    biases: tuple[Case, ...] = ()


def kept(value: Value, term: Term) -> Kept | Refusal:
    """Where ``value`` lets a key through: true, or an additive 0."""
    if isinstance(value, CONDITIONS):
        if term.kind == "add":  # true adds 1
            return kept(as_number(value), term)
        return Kept(value)
    if isinstance(value, Choice):
        return _choice(value, term)
    if isinstance(value, (Unknown, Weighted)):
        return unknown(value, term.node)
    if isinstance(value, Affine):
        return _integer(value, term)
    return _constant(value, term)


def unknown(value: Value, mask: fx.Node) -> Refusal:
    what = "its values are only known at run time"
    if isinstance(value, (Unknown, Weighted)):
        return blame.refusal(value.load, what)
    return refusal(mask, what)


def _choice(value: Choice, term: Term) -> Kept | Refusal:
    then, otherwise = kept(value.then, term), kept(value.otherwise, term)
    if isinstance(then, Refusal):
        return then
    if isinstance(otherwise, Refusal):
        return otherwise
    decided = choose(value.condition, then.condition, otherwise.condition)
    assert isinstance(decided, CONDITIONS)
    penalty = otherwise.penalty if then.penalty is None else then.penalty
    return Kept(decided, penalty)


def _integer(value: Affine, term: Term) -> Kept | Refusal:
    if value.constant is not None:
        return _constant(value.constant, term)
    cases = by_cases(value)
    if not isinstance(cases, Affine):
        return kept(cases, term)
    loads = value.loads()
    if not loads:
        return refusal(term.node, f"it adds {value!r} to the scores")
    what = f"it adds {value!r} to the scores, and that may be more than 0 and 1"
    return blame.refusal(loads[0], what)


def _constant(value: float, term: Term) -> Kept | Refusal:
    if value == 0:
        return Kept(TRUE)
    if term.factor is None and value != -math.inf:
        return refusal(term.node, f"it adds {value} times a number known at run time")
    added = value * (1.0 if term.factor is None else term.factor)
    if added <= MASKED:
        added = max(added, term.floor)
        return Kept(FALSE, None if added == -math.inf else added)
    return refusal(term.node, f"it adds {added} to scores, which neither keeps nor hides a key")


def ones_of(value: Value, term: Term) -> Kept | Refusal:
    """Where ``value`` is 1; it must be 0 elsewhere."""
    value = as_number(value)
    if any(leaf not in (affine(0), affine(1)) for leaf in leaves(value)):
        return refusal(term.node, "it multiplies scores by more than 0 and 1")
    ones = truth(value)
    assert ones is not None
    return Kept(TRUE, ones=ones)


def refusal(node: fx.Node, what: str) -> Refusal:
    """``mask_not_understood``, at ``node``."""
    return Refusal(Reason.MASK_NOT_UNDERSTOOD, f"node {dialect.describe(node)}: {what}")
