"""The dialect: every spelling of an operator is one canonical form, and nothing else is."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from nsa_compile.passes import dialect

aten = torch.ops.aten
F = torch.nn.functional


def node(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A node of a fresh graph; the string "x" in ``args`` stands for a tensor."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    args = tuple(x if isinstance(a, str) else a for a in args)
    kwargs = {k: x if isinstance(a, str) else a for k, a in kwargs.items()}
    if isinstance(target, str):
        return graph.call_method(target, args, kwargs)
    return graph.call_function(target, args, kwargs)


SPELLINGS: dict[tuple[str, tuple[tuple[str, Any], ...]], list[fx.Node]] = {
    ("transpose", (("dim0", 1), ("dim1", 2))): [
        node(torch.transpose, "x", 1, 2),
        node("transpose", "x", 1, 2),
        node(torch.Tensor.transpose, "x", 1, 2),
        node("swapaxes", "x", axis0=1, axis1=2),
        node(torch.transpose, input="x", dim0=1, dim1=2),
        node(aten.transpose.int, "x", 1, 2),
    ],
    ("permute", (("dims", (0, 2, 1)),)): [
        node("permute", "x", 0, 2, 1),
        node("permute", "x", (0, 2, 1)),
        node(torch.permute, "x", (0, 2, 1)),
        node(torch.permute, "x", dims=(0, 2, 1)),
        node(aten.permute.default, "x", [0, 2, 1]),
    ],
    ("view", (("sizes", (2, -1)),)): [
        node("view", "x", 2, -1),
        node("view", "x", (2, -1)),
        node("reshape", "x", 2, -1),
        node(torch.reshape, "x", (2, -1)),
        node(torch.reshape, "x", shape=(2, -1)),
        node(aten.view.default, "x", [2, -1]),
        node(aten._unsafe_view.default, "x", [2, -1]),
    ],
    ("full", (("sizes", (2, 3)), ("fill_value", 1.0))): [
        node(torch.full, (2, 3), 1.0),
        node(torch.full, (2, 3), fill_value=1.0),
        node(torch.full, size=(2, 3), fill_value=1.0),
        node(aten.full.default, [2, 3], 1.0),
    ],
    ("le", (("y", 3),)): [
        node(operator.le, "x", 3),
        node(torch.le, "x", 3),
        node(torch.less_equal, "x", 3),
        node("le", "x", 3),
        node("__le__", "x", 3),
        node("le", "x", other=3),
        node(aten.le.Scalar, "x", 3),
    ],
    ("and", (("y", True),)): [
        node(operator.and_, "x", True),
        node("__and__", "x", True),
        node(torch.bitwise_and, "x", True),
        node("bitwise_and", "x", other=True),
        node(aten.bitwise_and.Scalar, "x", True),
        node(aten.__and__.Scalar, "x", True),
    ],
    ("clamp", (("min", 0),)): [
        node(torch.clamp, "x", 0),
        node("clamp", "x", min=0),
        node("clip", "x", 0),
        node(aten.clamp.default, "x", 0),
    ],
    ("masked_fill", (("mask", True), ("value", 0.0))): [
        node("masked_fill", "x", True, 0.0),
        node(torch.masked_fill, "x", True, value=0.0),
        node(aten.masked_fill.Scalar, "x", True, 0.0),
    ],
    ("slice", (("dim", 1), ("start", 2), ("end", 5))): [node(aten.slice.Tensor, "x", 1, 2, 5)],
    ("cat", (("dim", 1),)): [node(torch.cat, "x", 1), node(torch.concat, "x", dim=1)],
}


@pytest.mark.parametrize(
    ("canonical", "spelled"),
    [(canonical, n) for canonical, nodes in SPELLINGS.items() for n in nodes],
)
def test_spellings(canonical: tuple[str, tuple[tuple[str, Any], ...]], spelled: fx.Node) -> None:
    name, args = canonical
    op = dialect.view(spelled)
    assert op is not None
    assert op.name == name
    assert not op.inplace
    bound = {k: tuple(v) if isinstance(v, list) else v for k, v in op.args.items()}
    assert {k: v for k, v in bound.items() if k not in ("x", "tensors")} == dict(args)


@pytest.mark.parametrize(
    ("spelled", "name"),
    [
        (node("masked_fill_", "x", True, 0.0), "masked_fill"),
        (node(operator.iadd, "x", 1), "add"),
        (node(operator.itruediv, "x", 2), "div"),
        (node("add_", "x", 1), "add"),
        (node(torch.Tensor.mul_, "x", 2), "mul"),
        (node(aten.masked_fill_.Scalar, "x", True, 0.0), "masked_fill"),
        (node(operator.setitem, "x", 0, 1), "setitem"),
    ],
)
def test_in_place_forms(spelled: fx.Node, name: str) -> None:
    op = dialect.view(spelled)
    assert op is not None
    assert (op.name, op.inplace) == (name, True)
    assert dialect.written(spelled) == [spelled.args[0]]


def test_writes_that_have_no_row() -> None:
    add = node(torch.add, "x", 1, out="x")
    assert dialect.written(add) == [add.args[0]]
    dropout = node(torch.dropout_, "x", 0.5, True)
    assert dialect.written(dropout) == [dropout.args[0]]
    for target in ("__iadd__", "__setitem__", operator.ilshift, operator.delitem):
        written = node(target, "x", 1)
        assert dialect.written(written) == [written.args[0]]
    assert dialect.written(node("__and__", "x", 1)) == []
    assert dialect.written(node(operator.and_, "x", 1)) == []
    assert dialect.written(node(aten.add.Tensor, "x", "x")) == []


@pytest.mark.parametrize(
    "target", [torch.cumprod, "conv2d", F.gelu, torch.ops.prims.iota.default, max]
)
def test_operators_without_a_row(target: Callable[..., Any] | str) -> None:
    assert dialect.view(node(target, "x")) is None


def test_where_in_both_orders() -> None:
    for spelled in (node(torch.where, "x", 1, 0), node(aten.where.ScalarSelf, "x", 1, 0)):
        op = dialect.view(spelled)
        assert op is not None
        assert (op["x"], op["y"]) == (1, 0)
    method = dialect.view(node("where", "x", True, 0))
    assert method is not None
    assert (method["condition"], method["y"]) == (True, 0)


def test_only_upper_bound_of_clamp() -> None:
    op = dialect.view(node(torch.clamp_max, "x", 3))
    assert op is not None
    assert (op["min"], op["max"]) == (None, 3)


def test_default_arguments_are_absent() -> None:
    op = dialect.view(node(F.scaled_dot_product_attention, "x", "x", "x"))
    assert op is not None
    assert op["attn_mask"] is None
    assert op["scale"] is None


def test_reading_changes_nothing() -> None:
    spelled = node("view", "x", 2, -1)
    before = (spelled.args, dict(spelled.kwargs), dict(spelled.meta))
    dialect.view(spelled)
    assert (spelled.args, dict(spelled.kwargs), dict(spelled.meta)) == before
