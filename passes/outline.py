"""Bring verdicts on an inlined graph back into the bodies of higher-order operators."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import fx

from nsa_compile.passes import dialect
from nsa_compile.passes.erase import erase_unused
from nsa_compile.passes.inline import Body, Inlined
from nsa_compile.passes.reasons import Reason, Refusal
from nsa_compile.passes.rewrite import Rewriter
from nsa_compile.passes.site import Decision, Mask


def agreed(decisions: Iterable[Decision], inlined: Inlined) -> tuple[Decision, ...]:
    """``decisions``, with those withdrawn whose body is also called where they do not hold.

    A body that several calls share is rewritten once, for all of them.
    """
    decisions = tuple(decisions)
    elsewhere = inlined.shared()
    shapes: dict[fx.Node, set[Any]] = {}
    for decision in decisions:
        body, node = inlined.site(decision.site.output)
        lse = decision.site.lse
        if lse is not None and inlined.origin[lse][0] is not body:
            shapes[node] = {None, ()}  # what is replaced stands in two graphs
        elif body is not None:
            found = shapes.setdefault(node, set())
            found.add(_shape(decision, body, inlined))
            reachable = all(_reachable(n, body, inlined) for n in _reads(decision))
            if body.module in elsewhere or not reachable:
                found |= {None, ()}
    return tuple(
        _withdrawn(each) if len(shapes.get(inlined.site(each.site.output)[1], ())) > 1 else each
        for each in decisions
    )


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
    named = ("output", "lse", "query", "key", "value", "scale", "mask", "modifiers", "mark")
    steps = ("query_steps", "key_steps", "value_steps", "output_steps", "lse_steps")
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
    """Rewrites converted sites where they stand: in the graph itself, or in a body, in place.

    What a rewritten site reads from outside its body becomes one more operand of every call.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        inlined: Inlined,
        rewriter: Callable[[fx.GraphModule], Rewriter] = Rewriter,
    ) -> None:
        self.gm = gm
        self.inlined = inlined
        self.rewriter = rewriter
        # Every call of each body, and the bodies that change.
        self._calls: dict[fx.GraphModule, list[Body]] = {}
        self._changed: set[fx.GraphModule] = set()
        for body in inlined.bodies():
            self._calls.setdefault(body.module, []).append(body)

    def apply(self, decisions: Iterable[Decision]) -> None:
        """Rewrite every converted site."""
        sites: dict[fx.Node, list[tuple[Body | None, Decision]]] = {}
        for decision in decisions:
            if decision.converted:
                body, node = self.inlined.origin[decision.site.output]
                sites.setdefault(node, []).append((body, decision))
        local: dict[fx.GraphModule, list[Decision]] = {}
        used = self._used()
        for calls in sites.values():
            body = calls[0][0]
            module = self.gm if body is None else body.module
            local.setdefault(module, []).append(self._localised(calls))
            for each, _ in calls:
                self._touch(each)
        for module, inside in local.items():
            self.rewriter(module).apply(inside)
        changed = [bodies for module, bodies in self._calls.items() if module in self._changed]
        for bodies in sorted(changed, key=lambda each: -_depth(each[0])):
            self._drop_unused(bodies, used)
        for module in (*self._changed, self.gm):
            module.recompile()

    def _used(self) -> set[fx.Node]:
        """The placeholders of bodies that something reads as long as nothing is rewritten."""
        calls = self._calls.values()
        return {p for body, *_ in calls for p in body.placeholders() if p.users}

    def _touch(self, body: Body | None) -> None:
        """Note that ``body`` changes, and with it those around it, whose operands may change."""
        while body is not None:
            self._changed.add(body.module)
            body = body.parent

    def _drop_unused(self, calls: list[Body], used: set[fx.Node]) -> None:
        """Take away operands that nothing reads any more: a mask that is now computed in place."""
        placeholders = calls[0].placeholders()
        unused = {at for at, p in enumerate(placeholders) if p in used and not p.users}
        for call, first in {body.call: body.first for body in calls}.items():
            operands = call.args[first:]
            kept = [o for at, o in enumerate(operands) if at not in unused]
            call.args = (*call.args[:first], *kept)
            erase_unused(call.graph, [o for o in operands if isinstance(o, fx.Node)])
        for at in unused:
            placeholders[at].graph.erase_node(placeholders[at])

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
        if found is not None:
            return found
        assert body is not None
        done: set[fx.Node] = set()
        for each, outside in calls:
            assert each is not None
            if each.call not in done:
                done.add(each.call)
                held = self._bring(outside, each.parent, [(each.parent, outside)])
                each.call.args = (*each.call.args, held)
        return _placeholder(body.module, node)


def _depth(body: Body | None) -> int:
    return 0 if body is None else 1 + _depth(body.parent)


def _placeholder(module: fx.GraphModule, node: fx.Node) -> fx.Node:
    """One more input of ``module``, for ``node`` from outside."""
    last = list(module.graph.find_nodes(op="placeholder"))[-1]
    with module.graph.inserting_after(last):
        placeholder = module.graph.placeholder(f"nsa_{node.name}")
    placeholder.meta = {"example_value": dialect.value(node)}
    return placeholder
