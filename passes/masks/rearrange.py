"""Elements of operators that move or surround elements: flip, index_select, pad, an assignment."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from nsa_compile.passes import dialect
from nsa_compile.passes.dialect import Op
from nsa_compile.passes.masks.affine import Affine, lower
from nsa_compile.passes.masks.cast import cast, condition
from nsa_compile.passes.masks.conditions import Condition, eq, ge
from nsa_compile.passes.masks.lift import Lifter, Rule
from nsa_compile.passes.masks.logic import all_of
from nsa_compile.passes.masks.values import Stuck, Value, choose
from nsa_compile.passes.masks.views import Index, picked, start, without_ellipsis


def _flip(lifter: Lifter, node: fx.Node, op: Op, index: Index) -> Value:
    sizes = lifter.sizes.shape(node) or []
    dims = {dim % len(sizes) for dim in op["dims"]}
    turned = tuple(
        size - 1 - at if dim in dims else at
        for dim, (at, size) in enumerate(zip(index, sizes, strict=True))
    )
    return lifter.lift(op["x"], turned)


def _index_select(lifter: Lifter, node: fx.Node, op: Op, index: Index) -> Value:
    dim = op["dim"] % len(index)
    at = lifter.index_value(op["index"], (index[dim],))
    low = lower(at)
    if low is None or low < 0:
        raise Stuck(f"an index that may be negative, {at!r}")
    return lifter.lift(op["x"], (*index[:dim], at, *index[dim + 1 :]))


def _pad(lifter: Lifter, node: fx.Node, op: Op, index: Index) -> Value:
    """Constants around a tensor: ``pad`` counts (before, after) from the last dimension on."""
    if op["mode"] not in (None, "constant"):
        raise Stuck(f"padding by {op['mode']}")
    sizes = lifter.sizes.shape(op["x"]) or []
    shifted, inside = list(index), []
    for dim, before in zip(reversed(range(len(sizes))), op["pad"][::2], strict=False):
        count = lifter.sizes.integer(before)
        if count is None:
            raise Stuck("padding by a run-time count")
        shifted[dim] = index[dim] - count
        inside += [ge(shifted[dim]), ge(sizes[dim] - 1 - shifted[dim])]
    dtype = dialect.value(node).dtype
    around = cast(lifter.scalar(op["value"] or 0), dtype)
    return choose(all_of(inside), lifter.lift(op["x"], tuple(shifted)), around)


def _fill_diagonal(lifter: Lifter, node: fx.Node, op: Op, index: Index) -> Value:
    if op["wrap"] or len(index) != 2:
        raise Stuck("a diagonal that wraps")
    value = cast(lifter.scalar(op["value"]), dialect.value(node).dtype)
    return choose(eq(index[0] - index[1]), value, lifter.lift(op["x"], index))


def _setitem(lifter: Lifter, node: fx.Node, op: Op, index: Index) -> Value:
    """``x[region] = value``: the value inside, what x held before elsewhere."""
    x, items = op["x"], op["index"]
    items = list(items) if isinstance(items, tuple) else [items]
    before = lifter.lift(x, index)
    dtype = dialect.value(x).dtype
    if len(items) == 1 and _is_mask(items[0], x):
        test = condition(lifter.lift(items[0], index))
        value = cast(_single(lifter, op["value"]), dtype)
        return choose(test, value, before)
    if any(_is_tensor(item) or item is None or isinstance(item, bool) for item in items):
        raise Stuck("an assignment to elements that a tensor names")
    region = _Region(lifter, x, items, index)
    return choose(region.inside, cast(region.value(op["value"]), dtype), before)


class _Region:
    """The elements that integers and slices name, around the element ``index`` of ``x``."""

    def __init__(self, lifter: Lifter, x: fx.Node, items: list[Any], index: Index) -> None:
        self.lifter = lifter
        self.within: list[Affine] = []  # the index inside the region
        sizes = dialect.shape(x) or ()
        parts: list[Condition] = []
        for item, size, at in zip(without_ellipsis(items, len(sizes)), sizes, index, strict=True):
            if not isinstance(item, slice):
                parts.append(eq(at - picked(item, size, lifter.sizes)))
                continue
            if item.step not in (None, 1):
                raise Stuck("an assignment to every second element")
            first = start(item.start, item.stop, size, lifter.sizes)
            parts.append(ge(at - first))
            if item.stop is not None:
                parts.append(ge(start(item.stop, None, size, lifter.sizes) - 1 - at))
            self.within.append(at - first)
        self.inside = all_of(parts)

    def value(self, assigned: Any) -> Value:
        """What is assigned to the element."""
        sizes = dialect.shape(assigned) if isinstance(assigned, fx.Node) else None
        if sizes is None:
            return self.lifter.scalar(assigned)
        lead = len(self.within) - len(sizes)
        if lead < 0:
            raise Stuck("an assignment of more dimensions than there are")
        at = zip(sizes, self.within[lead:], strict=True)
        return self.lifter.lift(assigned, tuple(Affine() if s == 1 else a for s, a in at))


def _single(lifter: Lifter, assigned: Any) -> Value:
    sizes = dialect.shape(assigned) if isinstance(assigned, fx.Node) else None
    if sizes is None:
        return lifter.scalar(assigned)
    if any(size != 1 for size in sizes):
        raise Stuck("an assignment of many values to what a mask names")
    return lifter.lift(assigned, (Affine(),) * len(sizes))


def _is_tensor(item: Any) -> bool:
    return isinstance(item, fx.Node) and dialect.shape(item) is not None


def _is_mask(item: Any, x: fx.Node) -> bool:
    return (
        _is_tensor(item)
        and dialect.value(item).dtype == torch.bool
        and dialect.shape(item) == dialect.shape(x)
    )


RULES: dict[str, Rule] = {
    "flip": _flip,
    "index_select": _index_select,
    "pad": _pad,
    "constant_pad_nd": _pad,
    "fill_diagonal": _fill_diagonal,
    "setitem": _setitem,
}
