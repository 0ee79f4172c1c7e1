"""Sizes of a graph as affine expressions, with the ranges that its shape environment guards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import sympy
import torch
from torch import fx

from nsa_compile.passes import dialect
from nsa_compile.passes.masks.affine import Affine, from_sympy

Size: TypeAlias = "int | sympy.Expr"


class Sizes:
    """Turns sizes into Affine; reads symbol ranges from the first SymInt it meets."""

    def __init__(self, graph: fx.Graph) -> None:
        self._ranges = _ranges(graph)
        self._known: dict[Any, Affine] = {}

    def affine(self, size: Size) -> Affine:
        if isinstance(size, int):
            return Affine(size)
        if size not in self._known:
            self._known[size] = from_sympy(size, self._ranges)
        return self._known[size]

    def shape(self, node: fx.Node) -> list[Affine] | None:
        shape = dialect.shape(node)
        return None if shape is None else [self.affine(s) for s in shape]

    def integer(self, argument: Any) -> Affine | None:
        """An int, SymInt or SymInt-valued node as an Affine, None for anything else."""
        size = dialect.integer(argument)
        return None if size is None else self.affine(size)


def product(sizes: Sequence[Size]) -> Size:
    """Product in canonical form, so that equal products are structurally equal."""
    result: Any = 1
    for size in sizes:
        result = result * size
    if isinstance(result, sympy.Expr):
        return dialect.extent(sympy.expand(result))
    return int(result)


def _ranges(graph: fx.Graph) -> Mapping[Any, Any]:
    for node in graph.nodes:
        fake = dialect.value(node)
        candidates = fake.shape if isinstance(fake, torch.Tensor) else (fake,)
        for candidate in candidates:
            if isinstance(candidate, torch.SymInt):
                env = getattr(candidate.node, "shape_env", None)
                ranges: Mapping[Any, Any] = getattr(env, "var_to_range", {})
                return ranges
    return {}
