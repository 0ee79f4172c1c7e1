"""Find the calls that hide an attention and spell them out, first in a copy of the graph."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from nsa_compile.passes import dialect
from nsa_compile.passes.emit import Caller
from nsa_compile.passes.inline import Inlined
from nsa_compile.passes.lower.blocks import Blocks, claimed
from nsa_compile.passes.lower.calls import Unsupported, encoder_layer, multi_head, native_multi_head
from nsa_compile.passes.lower.flex import flex
from nsa_compile.passes.match import origin
from nsa_compile.passes.reasons import Reason, Refusal
from nsa_compile.passes.site import AttentionSite, Decision

_FLEX = torch.ops.higher_order.flex_attention
_SDPA = torch.nn.functional.scaled_dot_product_attention

# What each call is spelled out as: its results by output position. A lowering adds nodes only.
_CALLS: dict[Any, tuple[str, Callable[[fx.Node, Caller], dict[int, fx.Node]]]] = {
    torch.nn.functional.multi_head_attention_forward: ("multi_head_attention_forward", multi_head),
    torch._transformer_encoder_layer_fwd: ("transformer_encoder_layer", encoder_layer),
    torch._native_multi_head_attention: ("native_multi_head_attention", native_multi_head),
    _FLEX: ("flex_attention", flex),
}


@dataclass
class _Form:
    """One call spelled out: its attention, all new nodes, and what replaces its outputs."""

    call: fx.Node
    attention: fx.Node
    new: list[fx.Node]
    results: dict[int, fx.Node]
    blocks: Blocks | None = None


@dataclass
class Lowering:
    """The attention calls of a copy of a graph, each spelled out beside its original.

    Attributes:
        refused: sites of the calls that cannot be spelled out.
    """

    inlined: Inlined
    refused: list[AttentionSite] = field(default_factory=list)
    # By the call in the given graph, which stands in the copy once for each call of its body.
    _forms: dict[fx.Node, list[_Form]] = field(default_factory=dict)

    def add(self, call: fx.Node) -> None:
        """Spell out ``call``, or remember why not."""
        body, original = self.inlined.origin[call]
        before = call.prev
        try:
            _check_weights(original)
            form = _spell_out(call, self.inlined.owner(call))
            forms = self._forms.setdefault(original, [])
            first = next(iter(forms), form)
            _check_same(form, first)
            if call.target is _FLEX:
                form.blocks = claimed(call, self.inlined.owner(call))
        except Unsupported as refusal:
            for node in reversed(_between(before, call)):
                call.graph.erase_node(node)
            self.refused.append(_site(call, _CALLS[call.target][0], refusal.refusal))
            return
        forms.append(form)
        self.inlined.replaces[form.attention] = call
        # The calls of one body share what they are spelled out as: the first one's nodes.
        for node, shared in zip(form.new, first.new, strict=True):
            self.inlined.origin[node] = (body, shared)

    def claims(self, decisions: Iterable[Decision]) -> list[Blocks]:
        """What converted forms take for granted of their BlockMasks, each BlockMask once."""
        converted = {d.site.output for d in decisions if d.converted}
        found: dict[Any, Blocks] = {}
        for form in (form for forms in self._forms.values() for form in forms):
            if form.blocks is not None and form.attention in converted:
                key = (*form.blocks.inputs(), form.blocks.lengths, form.blocks.mask_mod.code)
                found[key] = form.blocks
        return list(found.values())

    def settle(self, decisions: Iterable[Decision]) -> None:
        """Spell out the calls of converted forms in the graphs where they stand."""
        converted = {d.site.output for d in decisions if d.converted}
        real: dict[fx.Node, fx.Node] = {}
        for original, forms in self._forms.items():
            if any(form.attention in converted for form in forms):
                form = _spell_out(original, self.inlined.owner(forms[0].call))
                real.update(zip(forms[0].new, form.new, strict=True))
                real.update(_connect(form))
        for node, (body, known) in self.inlined.origin.items():
            if known in real:
                self.inlined.origin[node] = (body, real[known])


def hides(gm: fx.GraphModule) -> bool:
    """Whether the graph of ``gm`` has calls that hide an attention."""
    return any(node.target in _CALLS for node in gm.graph.nodes if node.op == "call_function")


def lower(inlined: Inlined) -> Lowering:
    """Spell out the attention calls of ``inlined``, which is a copy and may be written to."""
    lowering = Lowering(inlined)
    for node in list(inlined.module.graph.nodes):
        if node.op == "call_function" and node.target in _CALLS:
            lowering.add(node)
    return lowering


def _spell_out(call: fx.Node, owner: fx.GraphModule) -> _Form:
    """New nodes before ``call`` that compute what it computes; ``owner`` holds what it names."""
    spelling, build = _CALLS[call.target]
    before = call.prev
    with call.graph.inserting_before(call):
        results = build(call, Caller(call.graph, call, owner))
    new = _between(before, call)
    # Spelled out in full, the attention is the last node; else it is one call among others.
    attention = next((n for n in new if n.target is _SDPA), new[-1])
    attention.meta["nsa_spelling"] = spelling
    return _Form(call, attention, new, results)


def _check_same(form: _Form, first: _Form) -> None:
    """A body that several calls share is rewritten once: they must be spelled out alike."""
    if [node.target for node in form.new] != [node.target for node in first.new]:
        why = f"node {dialect.describe(form.call)}: another call of the same body differs"
        raise Unsupported(Refusal(Reason.UNRECOGNISED_ATTENTION, why))


def _between(before: fx.Node, call: fx.Node) -> list[fx.Node]:
    found, node = [], before.next
    while node is not call:
        found.append(node)
        node = node.next
    return found


def _connect(form: _Form) -> dict[fx.Node, fx.Node]:
    """Point the users of the call at the spelled-out results; returns what its outputs became."""
    became = {}
    for user in list(form.call.users):
        if user.target is operator.getitem:
            # Weights have no users here, and no result.
            if user.args[1] in form.results:
                became[user] = form.results[user.args[1]]
                user.replace_all_uses_with(became[user])
            user.graph.erase_node(user)
    if form.call.users:
        became[form.call] = form.results[-1]
        form.call.replace_all_uses_with(form.results[-1])
    form.call.graph.erase_node(form.call)
    return became


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
    given = [x for x in call.args[:3] if isinstance(x, fx.Node) and _is_split(x)]
    if len(given) == 3:
        shapes = [dialect.value(x).shape for x in given]
    else:
        heads = next((a for a in call.args[4:5] or call.args[2:3] if isinstance(a, int)), 0)
        shapes = [(1, heads, 0, 0)] * 3
    (batch, heads, q_len, width), (_, kv_heads, kv_len, _), (*_, value_width) = shapes
    return AttentionSite(
        output=call, query=query, key=query, value=query, scale=float("nan"), dropout=0.0,
        mask_node=None, mask=refusal, spelling=spelling, module=path, module_class=cls,
        source=origin.source(call), ordinal=0, q_heads=_static(heads), kv_heads=_static(kv_heads),
        head_dim=_static(width), value_dim=_static(value_width), batch=batch, q_len=q_len,
        kv_len=kv_len, dtype=value.dtype,
    )  # fmt: skip


def _is_split(x: fx.Node) -> bool:
    """Whether ``x`` is [B, H, T, D]."""
    return len(dialect.shape(x) or ()) == 4


def _static(size: Any) -> int:
    return size if isinstance(size, int) else 0
