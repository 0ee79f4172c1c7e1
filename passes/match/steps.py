"""Steps between a tensor of any layout and ``[B, H, T, D]``: unflatten, permute, flatten."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from torch import fx

from nsa_compile.passes.masks.affine import Affine, Var
from nsa_compile.passes.masks.sizes import Sizes
from nsa_compile.passes.masks.views import Index
from nsa_compile.passes.match import axes
from nsa_compile.passes.site import Steps

# The axes of [B, H, T, D], each dimension's outermost first.
Canonical = tuple[Sequence[Var], Sequence[Var], Sequence[Var], Sequence[Var]]
Step = tuple[str, tuple[Any, ...]]


def towards(node: fx.Node, at: Index, canonical: Canonical, sizes: Sizes) -> Steps | None:
    """Steps that lay out ``node``, read at ``at``, as ``canonical``; None: there are none.

    Axes that ``node`` lacks are expanded where their size is a constant.
    """
    shape = sizes.shape(node)
    if shape is None or len(shape) != len(at):
        return None
    return _towards(tuple(shape), at, tuple(tuple(dimension) for dimension in canonical))


@lru_cache(maxsize=1024)
def _towards(
    shape: tuple[Affine, ...], at: Index, canonical: tuple[tuple[Var, ...], ...]
) -> Steps | None:
    """The layers of a model share their layouts."""
    grouped = [axes.digits(each, size) for each, size in zip(at, shape, strict=True)]
    if any(group is None for group in grouped):
        return None
    groups = [group or [] for group in grouped]
    if _repeats([var for group in groups for var in group]):
        return None
    wanted = [var for dimension in canonical for var in dimension]
    if not {var for group in groups for var in group} <= set(wanted):
        return None
    return _Layout([list(group) for group in groups]).to(canonical)


def back(at: Index, canonical: Canonical, shape: Sequence[Any]) -> Steps | None:
    """Steps from ``[B, H, T, D]`` of ``canonical`` to a tensor that is read at ``at``."""
    grouped = [axes.digits(each, size) for each, size in zip(at, shape, strict=True)]
    if any(group is None for group in grouped):
        return None
    groups = [group or [] for group in grouped]
    order = [var for group in groups for var in group]
    if _repeats(order) or set(order) != {var for dimension in canonical for var in dimension}:
        return None
    layout = _Layout([list(dimension) for dimension in canonical])
    return layout.to(groups)


class _Layout:
    """Dimensions as lists of axes, and the steps taken so far; ``[]`` has one element."""

    def __init__(self, dimensions: list[list[Var]]) -> None:
        self.dimensions = dimensions
        self.steps: list[Step] = []

    def to(self, target: Sequence[Sequence[Var]]) -> Steps | None:
        wanted = [list(dimension) for dimension in target]
        if self.dimensions == wanted:
            return ()
        if not self._unflatten(wanted):
            return None
        # A group that is one dimension already stays one.
        runs = [
            [group] if group in self.dimensions or not group else [[var] for var in group]
            for group in wanted
        ]
        if not self._reorder([run for group in runs for run in group]):
            return None
        for position, group in enumerate(runs):
            if len(group) > 1:
                self.steps.append(("flatten", (position, position + len(group) - 1)))
        return tuple(self.steps)

    def _unflatten(self, wanted: list[list[Var]]) -> bool:
        """One axis a dimension, but for groups that stay together."""
        for position in reversed(range(len(self.dimensions))):
            dimension = self.dimensions[position]
            if len(dimension) < 2 or dimension in wanted:
                continue
            sizes = [var.size.constant for var in dimension]
            if any(size is None for size in sizes[1:]):
                return False
            self.steps.append(("unflatten", (position, (-1, *sizes[1:]))))
            self.dimensions[position : position + 1] = [[var] for var in dimension]
        return True

    def _reorder(self, runs: list[list[Var]]) -> bool:
        """One dimension a run, in their order; axes that no dimension has are expanded."""
        held = {var for dimension in self.dimensions for var in dimension}
        free = list(range(len(self.dimensions)))
        sources: list[int | None] = []
        expanded: list[int] = []
        for run in runs:
            real = run if set(run) <= held else []
            found = next((p for p in free if self.dimensions[p] == real), None)
            if found is not None:
                free.remove(found)
            sources.append(found)
            missing = run[0].size.constant if run != real else -1
            if missing is None:
                return False
            expanded.append(missing)
        self._squeeze(free, sources)
        order = tuple(p for p in sources if p is not None)
        if order != tuple(range(len(order))):
            self.steps.append(("permute", order))
        for position, source in enumerate(sources):
            if source is None:
                self.steps.append(("unsqueeze", (position,)))
        if any(size != -1 for size in expanded):
            self.steps.append(("expand", tuple(expanded)))
        return True

    def _squeeze(self, unused: list[int], sources: list[int | None]) -> None:
        """Drop dimensions of one element that the target has no place for."""
        for position in reversed(unused):
            assert not self.dimensions[position]
            self.steps.append(("squeeze", (position,)))
            for place, source in enumerate(sources):
                if source is not None and source > position:
                    sources[place] = source - 1


def _repeats(vars_: list[Var]) -> bool:
    return len(set(vars_)) != len(vars_)
