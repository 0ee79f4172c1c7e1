"""The ordered list of passes over one graph: match, prove masks, decide, rewrite."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from nsa_compile.passes.config import NSAConfig
from nsa_compile.passes.decide import decide
from nsa_compile.passes.inline import Inlined, inline
from nsa_compile.passes.lower import lower, not_spelled_out
from nsa_compile.passes.match import find_sites
from nsa_compile.passes.outline import Outliner, agreed, outermost
from nsa_compile.passes.rewrite import Rewriter
from nsa_compile.passes.site import Decision, Mask


@dataclass(frozen=True)
class Conversion:
    """What the passes decided about one graph.

    Attributes:
        decisions: one verdict per attention site, in graph order.
        guarded: placeholders of the analysed graph whose values a proof read; the conversion holds
            while they keep them.
        binary: placeholders that a proof takes to hold 0 and 1 only; checked at every call.
        lowered: a copy of the graph, on whose nodes the decisions stand, where attention calls
            that hide inside one node are spelled out; None when there are none.
        inlined: a copy of the graph without higher-order operators, on whose nodes the decisions
            stand in place of the graph's own; None when there are none.
    """

    decisions: tuple[Decision, ...]
    guarded: tuple[fx.Node, ...]
    binary: tuple[fx.Node, ...] = ()
    lowered: fx.Graph | None = None
    inlined: Inlined | None = None

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
    known = dict(values or {})
    lowering = lower(gm)
    if lowering is not None:
        known = {lowering.nodes[node]: tensor for node, tensor in known.items()}
        gm = fx.GraphModule(gm, lowering.graph)
    inlined = inline(gm)
    if inlined is not None:
        copies = inlined.copies()
        known = {copies[node]: tensor for node, tensor in known.items()}
        gm = inlined.module
    sites = find_sites(gm, values=known) + (lowering.refused if lowering is not None else [])
    if inlined is not None:
        sites += not_spelled_out(inlined.in_bodies())
    decisions = tuple(decide(site, config) for site in sites)
    if inlined is not None:
        decisions = agreed(decisions, inlined)
    if lowering is not None:
        lowering.settle(decisions if inlined is None else outermost(decisions, inlined))

    def inputs(nodes: Iterable[fx.Node]) -> tuple[fx.Node, ...]:
        """The placeholders of the given graph that ``nodes`` are copies of."""
        originals = list(dict.fromkeys(nodes))
        if inlined is not None:
            originals = [inlined.origin[n][1] for n in originals]
        if lowering is not None:
            given = {copy: node for node, copy in lowering.nodes.items()}
            originals = [given[n] for n in originals]
        return tuple(originals)

    masks = [d.site.mask for d in decisions if d.converted and isinstance(d.site.mask, Mask)]
    return Conversion(
        decisions,
        guarded=inputs(n for mask in masks for n in mask.buffers),
        binary=inputs(n for mask in masks for n in mask.binary),
        lowered=None if lowering is None else lowering.graph,
        inlined=inlined,
    )


def rewrite(gm: fx.GraphModule, conversion: Conversion) -> None:
    """Rewrite the converted sites of ``gm``, which ``conversion`` was made from, in place."""
    if conversion.lowered is not None:
        gm.graph = conversion.lowered
    if conversion.inlined is not None:
        Outliner(gm, conversion.inlined).apply(conversion.decisions)
    else:
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
