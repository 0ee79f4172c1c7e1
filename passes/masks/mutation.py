"""Which value a tensor has when it is read, in graphs that write to tensors in place."""

from __future__ import annotations

from nsa_compile.passes import dialect
from torch import fx

# Results of these share memory with their first argument (or may: reshape, contiguous, to).
_ALIASES = {
    "expand", "expand_as", "view", "view_as", "flatten", "unflatten", "unsqueeze", "squeeze",
    "transpose", "t", "permute", "select", "slice", "narrow", "getitem", "contiguous", "detach",
    "alias", "to", "type", "type_as", "bool", "int", "long", "float", "half", "bfloat16", "double",
}  # fmt: skip


class Mutations:
    """The in-place writes of a graph, by the tensor they write to."""

    def __init__(self, graph: fx.Graph) -> None:
        self._writes: dict[fx.Node, list[fx.Node]] = {}
        self._order: dict[fx.Node, int] = {}
        for position, node in enumerate(graph.nodes):
            self._order[node] = position
            target = _written(node)
            if target is not None:
                self._writes.setdefault(_base(target), []).append(node)

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
        writes = self._writes.get(_base(node))
        if writes is None:
            return node
        now = len(self._order) if reader is None else self._order[reader]
        past = [w for w in writes if self._order[w] < now]
        if not past:
            return node
        last = past[-1]
        if node is last or (node is _written(last) and node is _base(node)):
            return last
        return f"written to in place by {dialect.describe(last)}"


def _written(node: fx.Node) -> fx.Node | None:
    """The tensor that ``node`` writes to, if it does."""
    op = dialect.view(node)
    inplace = op.inplace if op is not None else _unknown_inplace(node)
    first = node.args[0] if node.args else None
    return first if inplace and isinstance(first, fx.Node) else None


def _unknown_inplace(node: fx.Node) -> bool:
    """In-place forms that the dialect has no row for are still told by their name."""
    target = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if node.op not in ("call_method", "call_function") or name.startswith("_"):
        return False
    return name.endswith("_") and not name.endswith("__")


def _base(node: fx.Node) -> fx.Node:
    """The tensor whose memory ``node`` may share."""
    while True:
        op = dialect.view(node)
        first = node.args[0] if node.args else None
        if op is None or not isinstance(first, fx.Node):
            return node
        if not (op.inplace or op.name in _ALIASES):
            return node
        node = first
