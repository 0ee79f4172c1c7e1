"""Find the calls that hide an attention and spell them out in a copy of the graph."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from nsa_compile.passes import dialect
from nsa_compile.passes.emit import Caller
from nsa_compile.passes.lower.calls import Unsupported, encoder_layer, multi_head, native_multi_head
from nsa_compile.passes.lower.flex import flex
from nsa_compile.passes.match import origin
from nsa_compile.passes.reasons import Reason, Refusal
from nsa_compile.passes.site import AttentionSite, Decision

_SDPA = torch.nn.functional.scaled_dot_product_attention

# What each call is spelled out as: its results by output position. A lowering adds nodes only.
_CALLS: dict[Any, tuple[str, Callable[[fx.Node, Caller], dict[int, fx.Node]]]] = {
    torch.nn.functional.multi_head_attention_forward: ("multi_head_attention_forward", multi_head),
    torch._transformer_encoder_layer_fwd: ("transformer_encoder_layer", encoder_layer),
    torch._native_multi_head_attention: ("native_multi_head_attention", native_multi_head),
    torch.ops.higher_order.flex_attention: ("flex_attention", flex),
}


@dataclass
class _Form:
    """One call spelled out: its attention, all new nodes, and what replaces its outputs."""

    call: fx.Node
    attention: fx.Node
    new: list[fx.Node]
    results: dict[int, fx.Node]


@dataclass
class Lowering:
    """A copy of a graph in which attention calls are spelled out, each beside its original.

    Attributes:
        graph: the copy; equal to the original once every form is taken back.
        nodes: original nodes to their copies.
        refused: sites of the calls that cannot be spelled out.
    """

    graph: fx.Graph
    nodes: dict[fx.Node, fx.Node]
    refused: list[AttentionSite] = field(default_factory=list)
    _forms: list[_Form] = field(default_factory=list)

    def settle(self, decisions: tuple[Decision, ...]) -> None:
        """Let converted forms replace their calls; take the others out again."""
        converted = {d.site.output for d in decisions if d.converted}
        for form in self._forms:
            if form.attention in converted:
                _connect(form)
            else:
                for node in reversed(form.new):
                    self.graph.erase_node(node)

    def add(self, call: fx.Node) -> None:
        """Spell out ``call``, or remember why not."""
        spelling, build = _CALLS[call.target]
        before = call.prev
        try:
            _check_weights(call)
            with self.graph.inserting_before(call):
                results = build(call, Caller(self.graph, call))
        except Unsupported as refusal:
            self._erase_between(before, call)
            self.refused.append(_site(call, spelling, refusal.refusal))
            return
        new = _between(before, call)
        # Spelled out in full, the attention is the last node; else it is one call among others.
        attention = next((n for n in new if n.target is _SDPA), new[-1])
        attention.meta["nsa_spelling"] = spelling
        self._forms.append(_Form(call, attention, new, results))

    def _erase_between(self, before: fx.Node, call: fx.Node) -> None:
        for node in reversed(_between(before, call)):
            self.graph.erase_node(node)


def lower(gm: fx.GraphModule) -> Lowering | None:
    """A copy of the graph of ``gm`` with its attention calls spelled out; None when it has none."""
    if not any(node.target in _CALLS for node in gm.graph.nodes if node.op == "call_function"):
        return None
    graph, nodes = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in gm.graph.nodes:
        nodes[node] = graph.node_copy(node, nodes.__getitem__)
        held = getattr(gm, str(node.target), None) if node.op == "get_attr" else None
        if isinstance(held, fx.GraphModule):
            nodes[node].meta["nsa_body"] = held
    lowering = Lowering(graph, nodes)
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in _CALLS:
            lowering.add(node)
    return lowering


def not_spelled_out(calls: Iterable[fx.Node]) -> list[AttentionSite]:
    """The sites of those ``calls`` that hide an attention, where they cannot be spelled out."""
    return [
        _site(call, _CALLS[call.target][0], Refusal(Reason.UNRECOGNISED_ATTENTION, _within(call)))
        for call in calls
        if call.op == "call_function" and call.target in _CALLS
    ]


def _within(call: fx.Node) -> str:
    return f"node {dialect.describe(call)} inside a higher-order operator (a checkpointed layer)"


def _between(before: fx.Node, call: fx.Node) -> list[fx.Node]:
    found, node = [], before.next
    while node is not call:
        found.append(node)
        node = node.next
    return found


def _connect(form: _Form) -> None:
    """Point the users of the call at the spelled-out results."""
    for user in list(form.call.users):
        if user.target is operator.getitem and user.args[1] in form.results:
            user.replace_all_uses_with(form.results[user.args[1]])
            user.graph.erase_node(user)
        elif user.target is operator.getitem:
            user.graph.erase_node(user)  # weights that nobody reads
    if form.call.users:
        form.call.replace_all_uses_with(form.results[-1])
    form.call.graph.erase_node(form.call)


def _check_weights(call: fx.Node) -> None:
    """Attention weights that something reads exist in dense attention only."""
    if isinstance(dialect.value(call), torch.Tensor):
        return
    for user in call.users:
        if user.target is not operator.getitem or (user.args[1] != 0 and user.users):
            raise Unsupported(Refusal(Reason.WEIGHTS_ESCAPE, f"node {dialect.describe(user)}"))


def _site(call: fx.Node, spelling: str, refusal: Refusal) -> AttentionSite:
    """The record of a call that was not spelled out; sizes as far as its arguments tell them."""
    path, cls = origin.module(call)
    query = next(n for n in call.all_input_nodes)
    value = dialect.value(query)
    heads = next((a for a in call.args[4:5] or call.args[2:3] if isinstance(a, int)), 0)
    return AttentionSite(
        output=call, query=query, key=query, value=query, scale=float("nan"), dropout=0.0,
        mask_node=None, mask=refusal, spelling=spelling, module=path, module_class=cls,
        source=origin.source(call), ordinal=0, q_heads=heads, kv_heads=heads,
        head_dim=0, value_dim=0, batch=1, q_len=0, kv_len=0, dtype=value.dtype,
    )  # fmt: skip
