"""Numbers in a graph: Python numbers, SymFloats, and nodes that hold them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from nsa_compile.passes import dialect


def number(argument: Any) -> float:
    """A float, or NaN for one that is only known at run time."""
    if isinstance(argument, fx.Node):
        constant = _constant(argument)
        if constant is not None:
            return constant
        argument = dialect.value(argument)
    if isinstance(argument, (torch.SymFloat, torch.SymInt)):
        expression = argument.node.expr
        return float(expression) if expression.is_number else math.nan
    return float(argument) if isinstance(argument, (int, float)) else math.nan


def fixed(argument: Any) -> float:
    """Like :func:`number`; a float that a dynamic graph carries is read under a guard on its value.

    The operators need softcaps and the like as constants, and models never change them.
    """
    found = number(argument)
    held = dialect.value(argument) if isinstance(argument, fx.Node) else argument
    if math.isnan(found) and isinstance(held, torch.SymFloat) and held.node.has_hint():
        return float(held.node.guard_float(__file__, 0))
    return found


def is_number(argument: Any) -> bool:
    """Whether ``argument`` is a Python number, or a node that holds one at run time."""
    if isinstance(argument, fx.Node):
        argument = dialect.value(argument)
    return isinstance(argument, (int, float, torch.SymInt, torch.SymFloat))


def _constant(node: fx.Node) -> float | None:
    """What a tensor made of one Python number holds: ``full([], c)``, ``tensor(c)``, ``zeros``."""
    op = dialect.view(node)
    if op is None or any(dialect.written(user) for user in node.users):
        return None
    if dialect.shape(node) != ():
        # A larger one may be written to through its views, unless nobody else reads it.
        return _filled(op) if len(node.users) == 1 else None
    if op.name in ("to", "type", "type_as", "float", "half", "bfloat16", "double", "sqrt"):
        return None if not isinstance(op["x"], fx.Node) else _constant_cast(op.name, op["x"])
    return _plain(op["data"]) if op.name == "tensor" else _filled(op)


def _filled(op: dialect.Op) -> float | None:
    if op.name in ("zeros", "zeros_like", "new_zeros"):
        return 0.0
    if op.name in ("ones", "ones_like", "new_ones"):
        return 1.0
    return _plain(op["fill_value"]) if op.name in ("full", "full_like", "new_full") else None


def _plain(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def _constant_cast(name: str, x: fx.Node) -> float | None:
    value = _constant(x)
    return math.sqrt(value) if name == "sqrt" and value is not None and value >= 0 else value
