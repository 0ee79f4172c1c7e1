"""Bodies of higher-order operators (checkpointed layers) inlined in a copy of a graph, to read it.

Activation checkpointing puts a layer into a graph of its own, whose mask, positions and sizes come
in as operands. Proofs need the whole program, so they are made on a copy without such borders.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from nsa_compile.passes import dialect

# Operators that call a body once with their operands: where the body and the operands stand.
_CALLS = {
    "tag_activation_checkpoint": (0, 1),
    "wrap_activation_checkpoint": (0, 1),
    "wrap": (0, 1),
    "invoke_subgraph": (0, 2),
    "wrap_with_set_grad_enabled": (1, 2),
    "wrap_with_autocast": (4, 5),
}
_ATTENTION = ("softmax", "attention", "encoder_layer")


@dataclass(frozen=True, eq=False)
class Body:
    """One call of a body.

    Attributes:
        call: the node that calls it, in the graph of ``parent`` (None: the outermost graph).
        module: the body; several calls may share it.
        first: position of the first operand in the arguments of ``call``.
    """

    call: fx.Node
    module: fx.GraphModule
    first: int
    parent: Body | None

    def operands(self) -> list[Any]:
        return list(self.call.args[self.first :])

    def placeholders(self) -> list[fx.Node]:
        return list(self.module.graph.find_nodes(op="placeholder"))


@dataclass
class Inlined:
    """A copy of a graph without borders, and where each of its nodes comes from.

    Attributes:
        given: the graph that was copied.
        origin: the body in which a node stands (None: the outermost graph), and the node there.
        held: what holds a node in another body: a placeholder, or the result of a call.
        replaces: nodes of this copy that are to stand in place of another one, in its terms.
    """

    given: fx.GraphModule
    module: fx.GraphModule
    origin: dict[fx.Node, tuple[Body | None, fx.Node]] = field(default_factory=dict)
    held: dict[tuple[Body | None, fx.Node], fx.Node] = field(default_factory=dict)
    replaces: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def inside(self, node: fx.Node, body: Body | None) -> fx.Node | None:
        """The node of ``body`` that holds ``node``; None when it comes from outside."""
        owner, origin = self.origin[node]
        return origin if owner is body else self.held.get((body, node))

    def site(self, output: fx.Node) -> tuple[Body | None, fx.Node]:
        """The body where the attention ``output`` stands, and the node there that computes it."""
        return self.origin[self.replaces.get(output, output)]

    def owner(self, node: fx.Node) -> fx.GraphModule:
        """The module in whose graph ``node`` stands."""
        body = self.origin[node][0]
        return self.given if body is None else body.module

    def copies(self) -> dict[fx.Node, fx.Node]:
        """Nodes of the outermost graph to their copies."""
        return {node: copy for copy, (body, node) in self.origin.items() if body is None}

    def bodies(self) -> list[Body]:
        """Every call of a body that was inlined."""
        return list({body: None for body, _ in self.origin.values() if body is not None})

    def shared(self) -> set[fx.GraphModule]:
        """The inlined bodies that something besides the inlined calls uses too."""
        calls: dict[fx.GraphModule, set[fx.Node]] = {}
        for body in self.bodies():
            calls.setdefault(body.module, set()).add(body.call)
        users: dict[fx.GraphModule, set[fx.Node]] = {}
        for owner in dict.fromkeys((self.given, *_graphs(self.given))):
            for node in owner.graph.find_nodes(op="get_attr"):
                held = getattr(owner, str(node.target), None)
                if held in calls:
                    users.setdefault(held, set()).update(node.users)
        return {module for module, known in calls.items() if users.get(module) != known}


def inline(gm: fx.GraphModule, *, always: bool = False) -> Inlined | None:
    """A copy of ``gm`` with the bodies inlined that hold an attention.

    None when there are none, unless a copy is wanted ``always``.
    """
    if not always and not any(_body(gm, node, None) for node in gm.graph.nodes):
        return None
    module = fx.GraphModule(nn.Module(), fx.Graph())
    inlined = Inlined(gm, module)
    graph = fx.Graph()
    _copy(gm, None, {}, graph, inlined)
    # Assigned past the setter: this graph is read, never run, and need not be compiled.
    module._graph = graph
    return inlined


def _copy(
    gm: fx.GraphModule,
    body: Body | None,
    values: Mapping[fx.Node, Any],
    graph: fx.Graph,
    inlined: Inlined,
) -> Any:
    """Copy the nodes of ``gm`` into ``graph``; returns what its output is there."""
    known: dict[fx.Node, Any] = dict(values)
    results: dict[fx.Node, Any] = {}
    for node in gm.graph.nodes:
        inner = _body(gm, node, body)
        if node.op == "output" and body is not None:
            return fx.node.map_arg(node.args[0], lambda n: known[n])
        if inner is not None:
            operands = fx.node.map_arg(tuple(inner.operands()), lambda n: known[n])
            inputs = dict(zip(inner.placeholders(), operands, strict=True))
            for placeholder, operand in inputs.items():
                if isinstance(operand, fx.Node):
                    inlined.held.setdefault((inner, operand), placeholder)
            results[node] = _copy(inner.module, inner, inputs, graph, inlined)
        elif node.target is operator.getitem and node.args[0] in results:
            known[node] = results[node.args[0]][node.args[1]]
            if isinstance(known[node], fx.Node):
                inlined.held.setdefault((body, known[node]), node)
        elif node not in known:
            known[node] = graph.node_copy(node, lambda n: known[n])
            inlined.origin[known[node]] = (body, node)
    return None


def _body(gm: fx.GraphModule, node: fx.Node, parent: Body | None) -> Body | None:
    """The body that ``node`` calls, when its results are taken one by one and it may attend."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.HigherOrderOperator):
        return None
    at = _CALLS.get(node.target.name())
    if at is None or len(node.args) < at[1]:
        return None
    where, first = at
    holder = node.args[where]
    if not isinstance(holder, fx.Node) or holder.op != "get_attr":
        return None
    module = getattr(gm, str(holder.target), None)
    if not isinstance(module, fx.GraphModule) or not attends(module):
        return None
    for user in node.users:
        if user.target is not operator.getitem or not isinstance(user.args[1], int):
            return None
    body = Body(node, module, first, parent)
    return body if len(body.operands()) == len(body.placeholders()) else None


def attends(module: fx.GraphModule) -> bool:
    """Whether ``module`` or a body in it may hold an attention."""
    return any(
        word in dialect.name(node)
        for each in (module, *_graphs(module))
        for node in each.graph.nodes
        if node.op.startswith("call")
        for word in _ATTENTION
    )


def _graphs(module: fx.GraphModule) -> list[fx.GraphModule]:
    return [m for m in module.modules() if isinstance(m, fx.GraphModule) and m is not module]
