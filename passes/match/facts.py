"""What attention is told from: which nodes anybody needs, and which hold activations."""

from __future__ import annotations

import torch
from torch import fx

from nsa_compile.passes import dialect


class Facts:
    """Facts of one graph, read in one pass each and only when asked for."""

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._live: set[fx.Node] | None = None
        self._activations: set[fx.Node] | None = None

    def is_live(self, node: fx.Node) -> bool:
        """Whether an output or an in-place write depends on ``node``; Dynamo keeps dead nodes."""
        if self._live is None:
            self._live = _live(self._graph)
        return node in self._live

    def is_activation(self, node: fx.Node) -> bool:
        """Whether ``node`` depends on data, not on parameters and sizes alone."""
        if self._activations is None:
            self._activations = _activations(self._graph)
        return node in self._activations

    def is_parameter(self, node: fx.Node) -> bool:
        """Whether ``node`` is module state through views, casts and arithmetic, but no product."""
        if self.is_activation(node):
            return False
        stack, seen = [node], {node}
        while stack and len(seen) < 32:
            each = stack.pop()
            op = dialect.view(each)
            if op is not None and op.name in PRODUCTS:
                return False
            new = [x for x in each.all_input_nodes if x not in seen]
            seen.update(new)
            stack += new
        return True


# Operators that contract: a search for the product behind a softmax does not go past them.
PRODUCTS = (
    "matmul", "baddbmm", "addmm", "einsum", "tensordot", "inner", "linear",
    "scaled_dot_product_attention",
)  # fmt: skip


def _live(graph: fx.Graph) -> set[fx.Node]:
    live: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        # A call spelled out beside its original has no users yet.
        spelled_out = "nsa_spelling" in node.meta
        if node in live or spelled_out or node.op == "output" or dialect.written(node):
            live.add(node)
            live.update(node.all_input_nodes)
    return live


def _activations(graph: fx.Graph) -> set[fx.Node]:
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            if _is_data(node):
                found.add(node)
        elif any(each in found for each in node.all_input_nodes):
            # A size of an activation is none.
            if not isinstance(dialect.value(node), (int, float, torch.SymInt, torch.SymFloat)):
                found.add(node)
                # A cache that is written to in place holds activations from then on.
                found.update(dialect.written(node))
    return found


def _is_data(node: fx.Node) -> bool:
    fake = dialect.value(node)
    if not isinstance(fake, torch.Tensor) or isinstance(fake, torch.nn.Parameter):
        return False
    return "_dynamo_static_input_type" not in (node.meta.get("tensor_dict") or {})
