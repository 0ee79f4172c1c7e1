"""Attention where no rewriting reaches: in bodies run conditionally, repeatedly or by their own
rules for gradients, and under the transformations of torch.func."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import fx

from nsa_compile.passes import dialect
from nsa_compile.passes.inline import Inlined, attends, inline
from nsa_compile.passes.lower import lower
from nsa_compile.passes.match import find_sites
from nsa_compile.passes.reasons import Reason, Refusal
from nsa_compile.passes.site import AttentionSite


def enclosed(gm: fx.GraphModule, inlined: Inlined | None) -> list[AttentionSite]:
    """The attention in bodies that are not inlined, each refused by the operator that runs it."""
    found = []
    read = gm if inlined is None else inlined.module
    for node in read.graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            owner = gm if inlined is None else inlined.owner(node)
            for body in _bodies(node, owner):
                refusal = _refusal(node, node.target.name())
                found += [_refused(site, refusal) for site in _sites(body)]
    return found


def transformed(graph: fx.Graph) -> dict[fx.Node, Refusal]:
    """The nodes that run under ``vmap``, ``grad`` or ``jvp`` of torch.func, whose tensors are not
    what their shapes say, and why that refuses them."""
    found: dict[fx.Node, Refusal] = {}
    open_: list[Refusal] = []
    for node in graph.nodes:
        name = dialect.name(node)
        if name.endswith("_increment_nesting"):
            open_.append(_refusal(node, f"torch.func.{name.strip('_').partition('_')[0]}"))
        elif name.endswith("_decrement_nesting") and open_:
            open_.pop()
        elif open_:
            found[node] = open_[-1]
    return found


def under(sites: Iterable[AttentionSite], graph: fx.Graph) -> list[AttentionSite]:
    """``sites``, with those refused that stand under a transformation of torch.func."""
    refused = transformed(graph)
    return [_refused(s, refused[s.output]) if s.output in refused else s for s in sites]


def _bodies(node: fx.Node, owner: fx.GraphModule) -> Iterator[fx.GraphModule]:
    for argument in node.all_input_nodes:
        if argument.op == "get_attr":
            held = getattr(owner, str(argument.target), None)
            if isinstance(held, fx.GraphModule) and attends(held):
                yield held


def _sites(body: fx.GraphModule) -> list[AttentionSite]:
    inlined = inline(body, always=True)
    assert inlined is not None
    refused = lower(inlined).refused
    return find_sites(inlined.module) + refused + enclosed(body, inlined)


def _refused(site: AttentionSite, refusal: Refusal) -> AttentionSite:
    site.mask = refusal
    return site


def _refusal(node: fx.Node, operator: str) -> Refusal:
    return Refusal(Reason.INSIDE_OPERATOR, f"{operator}, node {dialect.describe(node)}")
