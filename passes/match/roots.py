"""The nodes that compute attention, with the arguments of their spelling read out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from nsa_compile.passes import dialect

_SDPA = "scaled_dot_product_attention"


@dataclass(frozen=True)
class Root:
    """One attention as its spelling gives it, heads not yet undone and mask not yet proven."""

    output: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None
    is_causal: bool | fx.Node
    scale: float | fx.Node
    dropout: float
    spelling: str


def find_roots(graph: fx.Graph) -> Iterator[Root]:
    """Every attention of ``graph``, in graph order."""
    for node in graph.nodes:
        if _SDPA in str(node.target):
            root = _sdpa(node)
            if root is not None:
                yield root


def _sdpa(node: fx.Node) -> Root | None:
    op = dialect.view(node)
    if op is None or op.name != _SDPA:
        return None
    query, key, value, mask = op["query"], op["key"], op["value"], op["attn_mask"]
    return Root(
        output=node,
        query=query,
        key=key,
        value=value,
        mask=mask,
        is_causal=op["is_causal"] or False,
        scale=_scale(op["scale"], query),
        dropout=_number(op["dropout_p"] or 0.0),
        spelling="sdpa",
    )


def _scale(scale: Any, query: fx.Node) -> float | fx.Node:
    """``scale``, or its default ``1 / sqrt(D)``; the node where only that knows the number."""
    if scale is None:
        shape = dialect.shape(query)
        width = shape[-1] if shape else None
        return 1 / math.sqrt(width) if isinstance(width, int) and width > 0 else math.nan
    number = _number(scale)
    return scale if isinstance(scale, fx.Node) and math.isnan(number) else number


def _number(argument: Any) -> float:
    """A float, or NaN for one that is only known at run time."""
    if isinstance(argument, fx.Node):
        argument = dialect.value(argument)
    if isinstance(argument, (torch.SymFloat, torch.SymInt)):
        expression = argument.node.expr
        return float(expression) if expression.is_number else math.nan
    return float(argument) if isinstance(argument, (int, float)) else math.nan
