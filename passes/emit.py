"""Append call nodes to a graph: each carries its origin's metadata and a fake value."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from nsa_compile.passes import dialect
from nsa_compile.passes.site import Steps

_METADATA = ("nn_module_stack", "stack_trace", "source_fn_stack")


class Caller:
    """Appends calls at the graph's insertion point, on behalf of the node ``origin``.

    ``owner`` is the module whose attributes ``origin`` names, where that is of interest.
    """

    def __init__(
        self, graph: fx.Graph, origin: fx.Node, owner: fx.GraphModule | None = None
    ) -> None:
        self.graph = graph
        self.owner = owner
        self.metadata = {key: origin.meta[key] for key in _METADATA if key in origin.meta}
        self.mode = _fake_mode(origin)

    def __call__(self, target: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> fx.Node:
        """A node that calls ``target``: a function, or the name of a tensor's method."""
        append = self.graph.call_method if isinstance(target, str) else self.graph.call_function
        node: fx.Node = append(target, args, kwargs)
        node.meta.update(self.metadata)
        node.meta["example_value"] = self._fake_value(target, args, kwargs)
        return node

    def steps(self, node: fx.Node, steps: Steps) -> fx.Node:
        """``node`` after a site's steps."""
        for target, args in steps:
            node = self(target, node, *args)
        return node

    def cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """``node`` in ``dtype``; itself where it has that dtype."""
        return node if dialect.value(node).dtype == dtype else self("to", node, dtype)

    def _fake_value(
        self, target: Callable[..., Any] | str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """What the call returns on the fake values of its arguments: shapes and dtypes, no data."""
        values, named = fx.node.map_arg((args, kwargs), dialect.value)
        call = getattr(torch.Tensor, target) if isinstance(target, str) else target
        with self.mode or nullcontext(), torch.no_grad():
            return call(*values, **named)


def _fake_mode(node: fx.Node) -> FakeTensorMode | None:
    """The mode of the graph's fake tensors, by ``node`` and its inputs; None where all are real."""
    for each in (node, *node.all_input_nodes):
        for value in tree_leaves(dialect.value(each)):
            if isinstance(value, FakeTensor):
                return value.fake_mode
    return None
