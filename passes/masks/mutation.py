"""Which value a tensor has when it is read, in graphs that write to tensors in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from nsa_compile.passes import dialect

# Results of these share memory with their first argument (or may: reshape, contiguous, to).
_ALIASES = {
    "expand", "expand_as", "view", "view_as", "flatten", "unflatten", "unsqueeze", "squeeze",
    "transpose", "t", "permute", "select", "slice", "narrow", "getitem", "contiguous", "detach",
    "alias", "to", "type", "type_as", "bool", "int", "long", "float", "half", "bfloat16", "double",
}  # fmt: skip
# Further views, by their spelled name: masks are not proven through them.
_OTHER_ALIASES = {
    "chunk", "split", "tensor_split", "unsafe_chunk", "unsafe_split", "hsplit", "vsplit", "dsplit",
    "unbind", "movedim", "moveaxis", "diagonal", "unfold", "as_strided", "ravel", "adjoint",
    "getattr", "view_as_real", "view_as_complex", "cpu", "cuda",
}  # fmt: skip


class Mutations:
    """The in-place writes of a graph, by the tensor they write to."""

    def __init__(self, graph: fx.Graph) -> None:
        self._writes: dict[fx.Node, list[fx.Node]] = {}
        self._order: dict[fx.Node, int] = {}
        for position, node in enumerate(graph.nodes):
            self._order[node] = position
            for target in dialect.written(node):
                self._writes.setdefault(base(target), []).append(node)

    @property
    def any(self) -> bool:
        """Whether the graph writes to any tensor in place."""
        return bool(self._writes)

    def version(self, node: fx.Node, reader: fx.Node | None) -> fx.Node | str:
        """The node whose functional form ``reader`` sees in ``node`` (None reads at the end).

        Returns a text saying why when in-place writes through views make that unclear.
        """
        if not self._writes:
            return node
        writes = self._writes.get(base(node))
        if writes is None:
            return node
        now = len(self._order) if reader is None else self._order[reader]
        past = [w for w in writes if self._order[w] < now]
        if not past:
            return node
        last = past[-1]
        if self._order[node] > self._order[last]:
            return node  # made after the last write: what it is made of has its own version
        op = dialect.view(last)
        # An in-place view (unsqueeze_) changes the shape that ``node`` was recorded with.
        same_shape = dialect.shape(last) is not None and dialect.shape(last) == dialect.shape(node)
        assigns = op is not None and op.name == "setitem"
        functional = op is not None and op.inplace and (same_shape or assigns)
        if functional and (node is last or _whole(node) is _whole(last.args[0]) is base(node)):
            return last
        return f"written to in place by {dialect.describe(last)}"


def _whole(node: Any) -> Any:
    """The tensor that ``node`` is as a whole: what in-place operators answer is their operand."""
    while isinstance(node, fx.Node):
        op = dialect.view(node)
        if op is None or not op.inplace or not node.args:
            break
        first = node.args[0]
        if not isinstance(first, fx.Node) or dialect.shape(first) != dialect.shape(node):
            break
        node = first
    return node


def base(node: fx.Node) -> fx.Node:
    """The tensor whose memory ``node`` may share."""
    while True:
        first = node.args[0] if node.args else None
        if not isinstance(first, fx.Node) or not _shares(node):
            return node
        node = first


def _shares(node: fx.Node) -> bool:
    op = dialect.view(node)
    if isinstance(node.target, torch._ops.OpOverload):
        arguments = node.target._schema.arguments
        return bool(arguments) and arguments[0].alias_info is not None
    if op is None:
        return dialect.name(node) in _OTHER_ALIASES or bool(dialect.written(node))
    return op.inplace or op.name in _ALIASES
