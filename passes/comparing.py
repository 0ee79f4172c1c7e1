"""A rewriter that replaces nothing: each site runs dense, and sparse beside it, on one input."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from nsa_compile.passes.rewrite import Rewriter
from nsa_compile.passes.site import Decision

# Told for each site that runs: module path and ordinal, dense and sparse output, and the arguments
# and log-sum-exp of nsa::selected_attention (None where there is no such call).
Observer = Callable[..., None]


class Comparer(Rewriter):
    """Computes what a site would become next to what it is, and shows both to an observer.

    Before::

        %out = scaled_dot_product_attention(%q, %k, %v)

    After::

        %attention = nsa.selected_attention(...)
        %out = scaled_dot_product_attention(%q, %k, %v)
        observe(module, ordinal, %out, %attention[0], %attention[1], arguments)

    The model goes on with the dense output: every layer is looked at with the inputs that it has in
    the dense model, and errors do not add up.
    """

    def __init__(self, gm: fx.GraphModule, observe: Observer) -> None:
        super().__init__(gm)
        self.observe = observe

    def _replace(self, decision: Decision) -> list[fx.Node]:
        site, graph = decision.site, self.gm.graph
        before = site.output.prev
        with graph.inserting_before(site.output):
            out, _ = self._subgraph(decision)
            attention = _selected(before, site.output)
            lse = attention and graph.call_function(operator.getitem, (attention, 1))
        arguments = attention and attention.args
        shown: Any = (site.module, site.ordinal, site.output, out, lse, arguments)
        with graph.inserting_after(site.output):
            graph.call_function(self.observe, shown)
        return []


def _selected(before: fx.Node, stop: fx.Node) -> fx.Node | None:
    """The call of nsa::selected_attention among the nodes between two."""
    node = before.next
    while node is not stop:
        if node.target is torch.ops.nsa.selected_attention.default:
            return node
        node = node.next
    return None
