"""Bring verdicts on an inlined graph back into the bodies of higher-order operators."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import fx

from nsa_compile.passes import dialect
from nsa_compile.passes.inline import Body, Inlined
from nsa_compile.passes.reasons import Reason, Refusal
from nsa_compile.passes.rewrite import Rewriter, erase_unused
from nsa_compile.passes.site import Decision, Mask


def agreed(decisions: Iterable[Decision], inlined: Inlined) -> tuple[Decision, ...]:
    """``decisions``, with those withdrawn whose body is also called where they do not hold.

    A body that several calls share is rewritten once, for all of them.
    """
    decisions = tuple(decisions)
    shapes: dict[fx.Node, set[Any]] = {}
    for decision in decisions:
        body, node = inlined.origin[decision.site.output]
        if body is not None:
            found = shapes.setdefault(node, set())
            found.add(_shape(decision, body, inlined))
            if not all(_reachable(n, body, inlined) for n in _reads(decision)):
                found.add(None)
    return tuple(
        _withdrawn(each) if _differs(shapes.get(inlined.origin[each.site.output][1])) else each
        for each in decisions
    )


def outermost(decisions: Iterable[Decision], inlined: Inlined) -> tuple[Decision, ...]:
    """The decisions on sites of the outermost graph, by their outputs there."""
    found = []
    for decision in decisions:
        body, node = inlined.origin[decision.site.output]
        if body is None:
            found.append(replace(decision, site=replace(decision.site, output=node)))
    return tuple(found)


def _differs(shapes: set[Any] | None) -> bool:
    return shapes is not None and len(shapes) > 1


def _withdrawn(decision: Decision) -> Decision:
    if not decision.converted:
        return decision
    why = f"node {dialect.describe(decision.site.output)}: another call of the same body differs"
    return replace(decision, refusal=Refusal(Reason.MASK_NOT_UNDERSTOOD, why))


def _shape(decision: Decision, body: Body, inlined: Inlined) -> Any:
    """What the rewritten body would be: equal for calls that can share it."""
    if not decision.converted:
        return None
    externals: list[fx.Node] = []

    def local(node: fx.Node) -> object:
        found = inlined.inside(node, body)
        if found is None and node not in externals:
            externals.append(node)
        return ("outside", externals.index(node)) if found is None else found

    site = _mapped(_bare(decision), local)
    named = ("output", "query", "key", "value", "scale", "mask", "modifiers")
    steps = ("query_steps", "key_steps", "value_steps", "output_steps")
    return repr(([getattr(site, name) for name in (*named, *steps)], decision.config))


def _reachable(node: fx.Node, body: Body | None, inlined: Inlined) -> bool:
    """Whether ``node`` stands in ``body`` or around it, not in another body."""
    while inlined.inside(node, body) is None:
        if body is None:
            return False
        body = body.parent
    return True


def _bare(decision: Decision) -> Any:
    """The site without what rewriting does not read."""
    site = decision.site
    assert isinstance(site.mask, Mask)
    return replace(site, mask_node=None, mask=replace(site.mask, buffers=(), binary=()))


def _mapped(value: Any, change: Callable[[fx.Node], Any]) -> Any:
    """``value`` with every node in it replaced."""
    if isinstance(value, fx.Node):
        return change(value)
    if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        return type(value)(_mapped(each, change) for each in value)
    if is_dataclass(value) and not isinstance(value, type):
        changed = {f.name: _mapped(getattr(value, f.name), change) for f in fields(value)}
        return replace(value, **changed)
    return value


def _reads(decision: Decision) -> list[fx.Node]:
    """The nodes that a converted decision names, in a fixed order."""
    found: list[fx.Node] = []
    if decision.converted:
        _mapped(_bare(decision), found.append)
    return found


class Outliner:
    """Rewrites converted sites where they stand: in the graph itself, or in a copy of a body.

    Bodies are copied, since the untouched graph must stay usable. What a rewritten site reads from
    outside its body becomes one more operand of every call.
    """

    def __init__(self, gm: fx.GraphModule, inlined: Inlined) -> None:
        self.gm = gm
        self.inlined = inlined
        self._copies: dict[fx.GraphModule, tuple[fx.GraphModule, dict[fx.Node, fx.Node]]] = {}

    def apply(self, decisions: Iterable[Decision]) -> None:
        """Rewrite every converted site."""
        sites: dict[tuple[Any, fx.Node], list[tuple[Body | None, Decision]]] = {}
        for decision in decisions:
            if decision.converted:
                body, node = self.inlined.origin[decision.site.output]
                sites.setdefault((body and body.module, node), []).append((body, decision))
        local: dict[fx.GraphModule, list[Decision]] = {}
        for calls in sites.values():
            bodies = [body for body, _ in calls if body is not None]
            module = self._module(bodies[0]) if bodies else self.gm
            local.setdefault(module, []).append(self._localised(calls))
        for module, inside in local.items():
            Rewriter(module).apply(inside)
        for body, calls in self._bodies():
            self._drop_unused(body, calls)
        for module, _ in self._copies.values():
            module.recompile()
        self.gm.recompile()

    def _bodies(self) -> list[tuple[Body, list[fx.Node]]]:
        """The rewritten bodies, inner ones first, and the calls of each."""
        calls: dict[fx.GraphModule, tuple[Body, list[fx.Node]]] = {}
        for body in {b: None for b, _ in self.inlined.origin.values() if b is not None}:
            if body.module in self._copies:
                _, found = calls.setdefault(body.module, (body, []))
                if self._call(body) not in found:
                    found.append(self._call(body))
        return sorted(calls.values(), key=lambda each: -_depth(each[0]))

    def _drop_unused(self, body: Body, calls: list[fx.Node]) -> None:
        """Take away operands that nothing reads any more: a mask that is now computed in place."""
        module, copies = self._copies[body.module]
        placeholders = list(module.graph.find_nodes(op="placeholder"))
        before = {copies[p] for p in body.placeholders() if p.users}
        unused = {at for at, p in enumerate(placeholders) if p in before and not p.users}
        for call in calls:
            operands = call.args[body.first :]
            kept = [o for at, o in enumerate(operands) if at not in unused]
            call.args = (*call.args[: body.first], *kept)
            erase_unused(call.graph, [o for o in operands if isinstance(o, fx.Node)])
        for at in unused:
            module.graph.erase_node(placeholders[at])

    def _localised(self, calls: list[tuple[Body | None, Decision]]) -> Decision:
        """The decision in terms of the graph that is rewritten, for all ``calls`` of it."""
        reads = [_reads(decision) for _, decision in calls]
        (body, decision), *_ = calls
        nodes: dict[fx.Node, fx.Node] = {}
        for at, node in enumerate(reads[0]):
            if node not in nodes:
                every = [(b, read[at]) for (b, _), read in zip(calls, reads, strict=True)]
                nodes[node] = self._bring(node, body, every)
        site = _mapped(_bare(decision), lambda n: nodes[n])
        return replace(decision, site=site)

    def _bring(
        self, node: fx.Node, body: Body | None, calls: list[tuple[Body | None, fx.Node]]
    ) -> fx.Node:
        """``node`` in the graph of ``body``; one more operand of ``calls`` if it is outside."""
        found = self.inlined.inside(node, body)
        if body is None:
            assert found is not None
            return found
        module, copies = self._copied(body)
        if found is not None:
            return copies[found]
        done: set[fx.Node] = set()
        for each, outside in calls:
            assert each is not None
            call = self._call(each)
            if call not in done:
                done.add(call)
                held = self._bring(outside, each.parent, [(each.parent, outside)])
                call.args = (*call.args, held)
        return _placeholder(module, node)

    def _module(self, body: Body) -> fx.GraphModule:
        return self._copied(body)[0]

    def _copied(self, body: Body) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
        """The copy of ``body`` that is rewritten, put in the place of the original."""
        if body.module not in self._copies:
            graph = fx.Graph()
            copies: dict[fx.Node, fx.Node] = {}
            graph.output(graph.graph_copy(body.module.graph, copies))
            module = fx.GraphModule(body.module, graph)
            module.meta.update(body.module.meta)
            self._copies[body.module] = module, copies
        module, copies = self._copies[body.module]
        self._redirect(body, module)
        return module, copies

    def _redirect(self, body: Body, module: fx.GraphModule) -> None:
        """Let the call of ``body`` call ``module``."""
        owner = self.gm if body.parent is None else self._module(body.parent)
        call = self._call(body)
        holder = next(a for a in call.args if isinstance(a, fx.Node) and a.op == "get_attr")
        if getattr(owner, str(holder.target)) is not module:
            name = f"nsa_{holder.target}"
            owner.add_module(name, module)
            holder.target = name

    def _call(self, body: Body) -> fx.Node:
        """The call of ``body`` in the graph that is rewritten."""
        if body.parent is None:
            return body.call
        return self._copied(body.parent)[1][body.call]


def _depth(body: Body | None) -> int:
    return 0 if body is None else 1 + _depth(body.parent)


def _placeholder(module: fx.GraphModule, node: fx.Node) -> fx.Node:
    """One more input of ``module``, for ``node`` from outside."""
    last = list(module.graph.find_nodes(op="placeholder"))[-1]
    with module.graph.inserting_after(last):
        placeholder = module.graph.placeholder(f"nsa_{node.name}")
    placeholder.meta = {"example_value": dialect.value(node)}
    return placeholder
