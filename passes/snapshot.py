"""A graph as it was before a rewrite: cheap to take, built anew only if it is asked for."""

from __future__ import annotations

from typing import Any

from torch import fx


class Snapshot:
    """Remembers the nodes of ``gm`` and of the bodies that its higher-order operators call.

    Arguments of nodes are immutable, so remembering them costs a tuple a node; whatever is done to
    the graph afterwards, :meth:`module` builds the one that was.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        graph = gm.graph
        self._nodes = [
            (n, n.op, n.target, n.args, n.kwargs, n.name, n.type, dict(n.meta)) for n in graph.nodes
        ]
        self._codegen = graph._codegen
        self._meta = dict(gm.meta)
        self._attributes: dict[str, Any] = {}
        for _, op, target, *_ in self._nodes:
            if op in ("get_attr", "call_module"):
                held = _attribute(gm, str(target))
                self._attributes[str(target)] = (
                    Snapshot(held) if isinstance(held, fx.GraphModule) else held
                )

    def module(self) -> fx.GraphModule:
        """A new module with the remembered graph; parameters and buffers are the same tensors."""
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for node, op, target, args, kwargs, name, kind, meta in self._nodes:
            given, named = fx.map_arg((args, kwargs), copies.__getitem__)
            copy = copies[node] = graph.create_node(op, target, given, named, name, kind)
            copy.meta = dict(meta)
            source = getattr(node, "_dynamo_source", None)
            if source is not None:
                copy._dynamo_source = source
        graph.set_codegen(self._codegen)
        root = {
            target: held.module() if isinstance(held, Snapshot) else held
            for target, held in self._attributes.items()
        }
        module = fx.GraphModule(root, graph)
        module.meta.update(self._meta)
        return module


def _attribute(gm: fx.GraphModule, target: str) -> Any:
    held: Any = gm
    for name in target.split("."):
        held = getattr(held, name)
    return held
