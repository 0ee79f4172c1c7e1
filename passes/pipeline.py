"""The ordered list of passes over one graph: match, prove masks, decide, rewrite."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import fx

from nsa_compile.passes.config import NSAConfig
from nsa_compile.passes.decide import decide
from nsa_compile.passes.enclosed import enclosed, under
from nsa_compile.passes.inline import inline
from nsa_compile.passes.lower import Blocks, Lowering, hides, lower
from nsa_compile.passes.marks import attach, erase_marks, marks_of
from nsa_compile.passes.match import find_sites
from nsa_compile.passes.outline import Outliner, agreed
from nsa_compile.passes.reasons import Reason, Refusal
from nsa_compile.passes.rewrite import Rewriter
from nsa_compile.passes.site import AttentionSite, Decision, Mask


@dataclass(frozen=True)
class Conversion:
    """What the passes decided about one graph.

    Attributes:
        decisions: one verdict per attention site, in graph order.
        guarded: placeholders of the analysed graph whose values a proof read; the conversion holds
            while they keep them.
        binary: placeholders that a proof takes to hold 0 and 1 only; checked at every call.
        blocks: BlockMasks of flex_attention that have to agree with their mask_mod; checked when
            they change.
        reading: how the graph was read, where not as it is: with the bodies of higher-order
            operators inlined and hidden attention spelled out, in a copy on whose nodes the
            decisions stand.
        marked: whether the graph holds marks of prepared modules, which a rewrite takes out.
    """

    decisions: tuple[Decision, ...]
    guarded: tuple[fx.Node, ...]
    binary: tuple[fx.Node, ...] = ()
    blocks: tuple[Blocks, ...] = ()
    reading: Lowering | None = None
    marked: bool = False

    @property
    def changes(self) -> bool:
        """Whether there is anything to rewrite: a site, or the mark of a prepared one."""
        return self.converts or self.marked

    @property
    def converts(self) -> bool:
        return any(decision.converted for decision in self.decisions)


def analyse(
    gm: fx.GraphModule,
    config: NSAConfig,
    *,
    values: Mapping[fx.Node, torch.Tensor] | None = None,
    prepared: Collection[str] = (),
    checks_blocks: bool = True,
) -> Conversion:
    """Find every attention in ``gm``, prove its mask and decide on it. Changes nothing.

    Args:
        gm: a Dynamo graph (or ``torch.export`` program's graph module).
        config: the user's options.
        values: real tensors of placeholders whose value may be read (buffers, constants).
        prepared: paths of the attention that nsa_compile.prepare has seen: without a mark in the
            graph it stays dense, because it was not trained to become anything else.
        checks_blocks: whether somebody looks at BlockMasks at run time; else what depends on it
            stays dense.
    """
    given, known = gm, dict(values or {})
    inlined = inline(gm, always=hides(gm))
    reading = None if inlined is None else lower(inlined)
    refused: list[AttentionSite] = []
    if inlined is not None and reading is not None:
        copies = inlined.copies()
        known = {copies[node]: tensor for node, tensor in known.items()}
        gm = inlined.module
        refused = reading.refused
    sites = under(find_sites(gm, values=known) + refused, gm.graph)
    attach(sites, gm.graph, prepared)
    decisions = tuple(decide(site, config) for site in sites)
    if inlined is not None:
        decisions = agreed(decisions, inlined)
    decisions += tuple(decide(site, config) for site in enclosed(given, inlined))
    if reading is not None and not checks_blocks:
        decisions = tuple(_without_claims(each, reading) for each in decisions)
    masks = [d.site.mask for d in decisions if d.converted and isinstance(d.site.mask, Mask)]

    claims = [] if reading is None else reading.claims(decisions)

    def given_node(node: fx.Node) -> fx.Node:
        return node if inlined is None else inlined.origin[node][1]

    def inputs(nodes: Iterable[fx.Node]) -> tuple[fx.Node, ...]:
        """The placeholders of the given graph that ``nodes`` are copies of."""
        return tuple(map(given_node, dict.fromkeys(nodes)))

    return Conversion(
        decisions,
        guarded=inputs(n for mask in masks for n in mask.buffers),
        binary=inputs(n for mask in masks for n in mask.binary),
        blocks=tuple(claim.renamed(given_node) for claim in claims),
        reading=reading,
        marked=bool(marks_of(given)),
    )


def _without_claims(decision: Decision, reading: Lowering) -> Decision:
    """``decision``, kept where it rests on a BlockMask that nobody will look at."""
    if not decision.converted or not reading.claims([decision]):
        return decision
    why = "a BlockMask that is an input, which cannot be checked in this form"
    return replace(decision, refusal=Refusal(Reason.MASK_FROM_OUTSIDE, why))


def rewrite(
    gm: fx.GraphModule,
    conversion: Conversion,
    rewriter: Callable[[fx.GraphModule], Rewriter] = Rewriter,
) -> None:
    """Rewrite the converted sites of ``gm``, which ``conversion`` was made from, in place.

    ``rewriter`` is what rewrites the sites of one graph, of ``gm`` itself or of a body in it.
    A failure leaves ``gm`` half rewritten: :class:`~nsa_compile.passes.snapshot.Snapshot`
    remembers what it was.
    """
    reading = conversion.reading
    erase_marks(gm)
    if reading is None:
        rewriter(gm).apply(conversion.decisions)
        gm.recompile()
        return
    reading.settle(conversion.decisions)
    Outliner(gm, reading.inlined, rewriter).apply(conversion.decisions)


def convert(
    gm: fx.GraphModule, config: NSAConfig, *, values: Mapping[fx.Node, torch.Tensor] | None = None
) -> Conversion:
    """:func:`analyse`, then rewrite the converted sites of ``gm`` in place.

    Skips the rewrite altogether when nothing changes, so that ``gm`` stays the identical graph.
    """
    conversion = analyse(gm, config, values=values)
    if conversion.changes:
        rewrite(gm, conversion)
    return conversion
