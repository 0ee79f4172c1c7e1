"""The ordered list of passes over one graph: match, prove masks, decide, rewrite."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from nsa_compile.passes.config import NSAConfig
from nsa_compile.passes.decide import decide
from nsa_compile.passes.lower import lower
from nsa_compile.passes.match import find_sites
from nsa_compile.passes.rewrite import Rewriter
from nsa_compile.passes.site import Decision, Mask


@dataclass(frozen=True)
class Conversion:
    """What the passes decided about one graph.

    Attributes:
        decisions: one verdict per attention site, in graph order.
        guarded: placeholders of the analysed graph whose values a proof read; the conversion holds
            while they keep them.
        lowered: a copy of the graph, on whose nodes the decisions stand, where attention calls
            that hide inside one node are spelled out; None when there are none.
    """

    decisions: tuple[Decision, ...]
    guarded: tuple[fx.Node, ...]
    lowered: fx.Graph | None = None

    @property
    def converts(self) -> bool:
        return any(decision.converted for decision in self.decisions)


def analyse(
    gm: fx.GraphModule, config: NSAConfig, *, values: Mapping[fx.Node, torch.Tensor] | None = None
) -> Conversion:
    """Find every attention in ``gm``, prove its mask and decide on it. Changes nothing.

    Args:
        gm: a Dynamo graph (or ``torch.export`` program's graph module).
        config: the user's options.
        values: real tensors of placeholders whose value may be read (buffers, constants).
    """
    lowering = lower(gm)
    if lowering is None:
        sites = find_sites(gm, values=values or {})
    else:
        copied = {lowering.nodes[node]: tensor for node, tensor in (values or {}).items()}
        sites = find_sites(fx.GraphModule(gm, lowering.graph), values=copied) + lowering.refused
    decisions = tuple(decide(site, config) for site in sites)
    masks = [d.site.mask for d in decisions if d.converted]
    buffers = dict.fromkeys(n for mask in masks if isinstance(mask, Mask) for n in mask.buffers)
    if lowering is None:
        return Conversion(decisions, tuple(buffers))
    lowering.settle(decisions)
    originals = {copy: node for node, copy in lowering.nodes.items()}
    return Conversion(decisions, tuple(originals[n] for n in buffers), lowering.graph)


def rewrite(gm: fx.GraphModule, conversion: Conversion) -> None:
    """Rewrite the converted sites of ``gm``, which ``conversion`` was made from, in place."""
    if conversion.lowered is not None:
        gm.graph = conversion.lowered
    Rewriter(gm).apply(conversion.decisions)


def convert(
    gm: fx.GraphModule, config: NSAConfig, *, values: Mapping[fx.Node, torch.Tensor] | None = None
) -> Conversion:
    """:func:`analyse`, then rewrite the converted sites of ``gm`` in place.

    Skips the rewrite altogether when nothing converts, so that ``gm`` stays the identical graph.
    """
    conversion = analyse(gm, config, values=values)
    if conversion.converts:
        rewrite(gm, conversion)
    return conversion
