"""What a site does to its logits besides the mask: softcap, sinks, ALiBi, factors."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import fx

from nsa_compile.passes import dialect
from nsa_compile.passes.masks import Prover
from nsa_compile.passes.masks.affine import Affine
from nsa_compile.passes.masks.prove import Proof
from nsa_compile.passes.masks.term import Term
from nsa_compile.passes.masks.views import Element, Index
from nsa_compile.passes.match.chains import chain
from nsa_compile.passes.match.layout import Layout, canonical_index
from nsa_compile.passes.match.logits import Factor
from nsa_compile.passes.match.numbers import is_number
from nsa_compile.passes.match.roots import Root
from nsa_compile.passes.reasons import Reason, Refusal
from nsa_compile.passes.site import Modifiers, Steps


@dataclass(frozen=True)
class Found:
    """Modifiers of a site, the mask terms that are left, and factors as steps of the query."""

    modifiers: Modifiers = field(default_factory=Modifiers)
    terms: tuple[Term, ...] = ()
    query_steps: Steps = ()
    scale: float | fx.Node = 1.0
    refusal: Refusal | None = None


def read(root: Root, layout: Layout, prover: Prover) -> Found:
    """What ``root`` does to its logits, over the positions of ``layout``."""
    positions = prover.positions(layout.geometry)
    terms = []
    for term in root.terms:
        assert term.at is not None
        at = canonical_index(layout, term.at, positions, root.key_at)
        if at is None:
            return _refused(term.node, "a mask over axes that are not understood")
        terms.append(replace(term, at=at))
    steps: list[tuple[str, tuple[object, ...]]] = []
    for factor in root.factors:
        if not _multiplies_queries(factor, root, layout, positions, prover):
            return _refused(factor.element.node, "it multiplies scores")
        steps.append(("div" if factor.divides else "mul", (factor.element.node,)))
    sinks = None
    if root.sinks is not None:
        sinks = _sinks(root.sinks, root, layout, positions, prover)
        if sinks is None:
            return _refused(root.sinks.node, "it is no sink of one number a head")
    modifiers = Modifiers(softcap=root.softcap, sinks=sinks)
    if root.scale == 1.0 and len(steps) == 1 and _is_scale(root.factors[0]):
        return Found(modifiers, tuple(terms), (), root.factors[0].element.node)
    return Found(modifiers, tuple(terms), tuple(steps), root.scale)


def biased(modifiers: Modifiers, proof: Proof) -> Modifiers:
    """``modifiers`` and the ALiBi that was proven beside the mask."""
    if proof.alibi is None:
        return modifiers
    slopes, positions, factor = proof.alibi.slopes, proof.alibi.positions, proof.alibi.factor
    return replace(modifiers, slopes=slopes, positions=positions, slope_factor=factor)


def _is_scale(factor: Factor) -> bool:
    return not factor.divides and is_number(factor.element.node)


def _refused(node: fx.Node, why: str) -> Found:
    refusal = Refusal(Reason.MODIFIER_NOT_SUPPORTED, f"{dialect.describe(node)}: {why}")
    return Found(refusal=refusal)


def _multiplies_queries(
    factor: Factor, root: Root, layout: Layout, positions: Index, prover: Prover
) -> bool:
    """Whether the tensor broadcasts to ``[B, H, Tq, 1]``, so that queries can be multiplied."""
    node, at = factor.element
    if is_number(node):
        return True
    if prover.lifter.mutations.version(node, root.output) is not node:
        return False
    index = canonical_index(layout, at, positions, root.key_at)
    if index is None or len(index) > 4:
        return False
    aligned = (*positions[:3], Affine())[4 - len(index) :]
    return all(
        each == wanted or (each.constant == 0 and size == 1)
        for each, wanted, size in zip(index, aligned, dialect.shape(node) or (), strict=True)
    )


def _sinks(
    sinks: Element, root: Root, layout: Layout, positions: Index, prover: Prover
) -> fx.Node | None:
    """The tensor ``[Hq]`` whose element h is the sink of head h."""
    for node, at in chain(sinks, root.output, root.output, prover.lifter):
        index = canonical_index(layout, at, positions, root.key_at)
        shape = prover.lifter.sizes.shape(node)
        if index is None or shape is None:
            return None
        used = [p for p, size in enumerate(shape) if size.constant != 1]
        heads = prover.lifter.sizes.affine(layout.geometry.q_heads)
        if [index[p] for p in used] == [positions[1]] and shape[used[0]] == heads:
            return node
    return None
