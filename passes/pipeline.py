"""The ordered list of passes over one graph: match, prove masks, decide, rewrite."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from nsa_compile.passes.config import NSAConfig
from nsa_compile.passes.decide import decide
from nsa_compile.passes.match import find_sites
from nsa_compile.passes.rewrite import Rewriter
from nsa_compile.passes.site import Decision, Mask


@dataclass(frozen=True)
class Conversion:
    """What the passes decided about one graph.

    Attributes:
        decisions: one verdict per attention site, in graph order.
        guarded: placeholders whose values a proof read; the conversion holds while they keep them.
    """

    decisions: tuple[Decision, ...]
    guarded: tuple[fx.Node, ...]

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
    decisions = tuple(decide(site, config) for site in find_sites(gm, values=values or {}))
    masks = [d.site.mask for d in decisions if d.converted]
    buffers = [node for mask in masks if isinstance(mask, Mask) for node in mask.buffers]
    return Conversion(decisions, tuple(dict.fromkeys(buffers)))


def convert(
    gm: fx.GraphModule, config: NSAConfig, *, values: Mapping[fx.Node, torch.Tensor] | None = None
) -> Conversion:
    """:func:`analyse`, then rewrite the converted sites of ``gm`` in place.

    Skips the rewrite altogether when nothing converts, so that ``gm`` stays the identical graph.
    """
    conversion = analyse(gm, config, values=values)
    if conversion.converts:
        Rewriter(gm).apply(conversion.decisions)
    return conversion
