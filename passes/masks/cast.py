"""What an element is in another dtype: as a number, as a condition, truncated."""

from __future__ import annotations

import math

import torch

from nsa_compile.passes import dialect
from nsa_compile.passes.masks.affine import Affine
from nsa_compile.passes.masks.conditions import CONDITIONS, Condition
from nsa_compile.passes.masks.values import (
    Stuck,
    Unknown,
    Value,
    Weighted,
    as_number,
    map_leaves,
    truth,
)


def cast(value: Value, dtype: torch.dtype) -> Value:
    """``value`` in ``dtype``; rounding is not modelled (see ``Lifter``).

    Raises:
        Stuck: it reads a floating-point element that the proof does not look into.
    """
    if dtype == torch.bool:
        return condition(value)
    if isinstance(value, CONDITIONS):
        return as_number(value)
    if not dtype.is_floating_point:
        return map_leaves(value, _truncated)
    return value


def _truncated(value: Value) -> Value:
    if isinstance(value, float) and math.isfinite(value):
        return Affine(int(value))
    if isinstance(value, Affine):
        return value
    raise Stuck("a cast of an unknown value to an integer")


def numbers(value: Value) -> Value:
    """``value`` for arithmetic: conditions become 1 and 0.

    Raises:
        Stuck: it reads a floating-point element that the proof does not look into.
    """
    return map_leaves(value, _number)


def _number(value: Value) -> Value:
    if isinstance(value, (Unknown, Weighted)):
        raise Stuck(f"arithmetic on {dialect.describe(value.load.node)}")
    return as_number(value)


def condition(value: Value) -> Condition:
    """``value != 0``.

    Raises:
        Stuck: it reads a floating-point element that the proof does not look into.
    """
    found = truth(value)
    if found is None:
        raise Stuck("the truth of an unknown value")
    return found
