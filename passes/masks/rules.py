"""The rule of every operator that builds masks: its element in terms of its inputs' elements."""

from __future__ import annotations

from torch import fx

from nsa_compile.passes import dialect
from nsa_compile.passes.dialect import Op
from nsa_compile.passes.masks import elementwise, functions, rearrange, structure
from nsa_compile.passes.masks.cast import cast
from nsa_compile.passes.masks.lift import Lifter, Rule
from nsa_compile.passes.masks.values import Value
from nsa_compile.passes.masks.views import Index

CASTS = ("to", "type", "type_as", "bool", "int", "long", "float", "half", "bfloat16", "double")


def _to(lifter: Lifter, node: fx.Node, op: Op, index: Index) -> Value:
    return cast(lifter.lift(op["x"], index), dialect.value(node).dtype)


RULES: dict[str, Rule] = {
    **dict.fromkeys(CASTS, _to),
    **elementwise.RULES,
    **functions.RULES,
    **rearrange.RULES,
    **structure.RULES,
}
