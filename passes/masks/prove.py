"""Prove what a site's mask means: lift it at (b, h, i, j), simplify, name the normal form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import fx

from nsa_compile.passes import dialect
from nsa_compile.passes.masks import conditions, views
from nsa_compile.passes.masks.affine import Affine, Var, affine
from nsa_compile.passes.masks.alibi import Alibi, resolve, split
from nsa_compile.passes.masks.conditions import FALSE, TRUE, Condition, ge
from nsa_compile.passes.masks.kept import ABSORBS, Kept, kept, ones_of, refusal, unknown
from nsa_compile.passes.masks.lift import Lifter
from nsa_compile.passes.masks.logic import all_of, negation
from nsa_compile.passes.masks.normal_form import classify
from nsa_compile.passes.masks.sizes import Size
from nsa_compile.passes.masks.term import Term, of_mask
from nsa_compile.passes.masks.usable import every_row_sees_a_key, overwritten
from nsa_compile.passes.masks.values import (
    Stuck,
    Value,
    truth,
)
from nsa_compile.passes.reasons import Reason, Refusal
from nsa_compile.passes.site import Mask

# Refusals of what may be a proof once an input is known to hold 0 and 1, and how many are tried.
_MAY_BE_PADDING = (Reason.MASK_NOT_UNDERSTOOD, Reason.MASK_FROM_OUTSIDE)
_MOST_INPUTS = 3

Terms: TypeAlias = tuple[Term, ...]


@dataclass(frozen=True)
class Geometry:
    """Sizes of the score matrix ``[B, Hq, Tq, Tk]``, as ints or sympy expressions."""

    batch: Size
    q_heads: Size
    q_len: Size
    kv_len: Size


@dataclass(frozen=True)
class Proof:
    """What was proven of everything that a site adds to its logits."""

    mask: Mask | Refusal
    alibi: Alibi | None = None


class Prover:
    """Proves the masks of one graph. A mask that serves many layers is lifted once."""

    def __init__(self, gm: fx.GraphModule, values: Mapping[fx.Node, torch.Tensor]) -> None:
        self._gm = gm
        self._values = values
        self._known: dict[Any, Proof] = {}
        self._lifters: dict[frozenset[fx.Node], Lifter] = {}
        self._binary: frozenset[fx.Node] = frozenset()
        self._integers: dict[Affine, fx.Node] | None = None

    @property
    def lifter(self) -> Lifter:
        """Built at the first mask: a graph without attention pays nothing."""
        if self._binary not in self._lifters:
            lifter = Lifter(self._gm, self._values, self._binary)
            self._lifters[self._binary] = lifter
        return self._lifters[self._binary]

    def prove(
        self, geometry: Geometry, mask: fx.Node | Terms | None, is_causal: bool, reader: fx.Node
    ) -> Mask | Refusal:
        """The normal form of ``mask`` and ``is_causal`` together, or why there is none.

        An additive bias is none of a mask's: see :meth:`proof`.
        """
        proof = self.proof(geometry, mask, is_causal, reader)
        if proof.alibi is not None:
            slopes = dialect.describe(proof.alibi.slopes)
            return Refusal(Reason.ADDITIVE_BIAS, f"node {slopes}: ALiBi")
        return proof.mask

    def proof(
        self,
        geometry: Geometry,
        mask: fx.Node | Terms | None,
        is_causal: bool,
        reader: fx.Node,
        dtype: torch.dtype = torch.float32,
    ) -> Proof:
        """The mask and the ALiBi bias that ``mask`` and ``is_causal`` are together.

        ``mask`` is the operand of SDPA, or everything that was done to the logits. ``is_causal`` is
        aligned to the top left, offset 0 even when Tq != Tk, as in SDPA. ``reader`` is the node
        that attends; the reader of a term decides which in-place writes to its tensor count.
        ``dtype`` is that of the scores.
        """
        terms = mask if isinstance(mask, tuple) else of_mask(mask, reader)
        if terms and not self.lifter.mutations.any:
            # Who reads does not matter: layers that share a mask share its proof.
            terms = tuple(replace(term, reader=term.node) for term in terms)
        late = reader if terms and self.lifter.mutations.any else None
        key = (geometry, terms, is_causal, late, dtype)
        if key not in self._known:
            self._known[key] = self._proven(geometry, terms, is_causal, reader, dtype)
        return self._known[key]

    def _proven(
        self,
        geometry: Geometry,
        terms: Terms,
        is_causal: bool,
        reader: fx.Node,
        dtype: torch.dtype,
    ) -> Proof:
        """The proof without assumptions, else one that takes graph inputs to hold 0 and 1 only.

        Padding is such an input wherever a model does arithmetic on it; each is assumed alone
        first, so that no input is taken for padding without need. It is checked at run time.
        """
        plain = self._prove(geometry, terms, is_causal, reader, dtype)
        if not isinstance(plain.mask, Refusal) or plain.mask.reason not in _MAY_BE_PADDING:
            return plain
        read = _ancestors([term.node for term in terms])
        inputs = sorted(self.lifter.inputs & read)
        assumptions = [frozenset([node]) for node in inputs[:_MOST_INPUTS]]
        if len(inputs) > 1:
            assumptions.append(frozenset(inputs))
        for assumed in assumptions:
            self._binary = assumed
            try:
                found = self._prove(geometry, terms, is_causal, reader, dtype)
                refuted = assumed & self.lifter.refuted
            finally:
                self._binary = frozenset()
            if isinstance(found.mask, Mask) and not refuted:
                return found
        return plain

    def _prove(
        self,
        geometry: Geometry,
        terms: Terms,
        is_causal: bool,
        reader: fx.Node,
        dtype: torch.dtype,
    ) -> Proof:
        index = self.positions(geometry)
        parts = [Kept(ge(index[2] - index[3]) if is_causal else TRUE)]
        for term in terms:
            lifted = self._term(geometry, term, index)
            if isinstance(lifted, Refusal):
                return Proof(lifted)
            parts.append(lifted)
        keep = all_of([each.condition for each in parts])
        mask = terms[0].node if terms else None
        ones = all_of([each.ones for each in parts])
        if all_of([keep, ones]) != keep:
            return Proof(refusal(mask, "it multiplies scores by 0 where no term hides them"))
        if not self._binary <= {load.node for load in conditions.loads(keep)}:
            # What 0 and 1 decide wholly was no padding: token ids, say, that are compared.
            return Proof(refusal(mask, "an input is no padding"))
        found = classify(
            keep,
            mask,
            buffers=self.lifter.patterns.read & _ancestors([term.node for term in terms]),
            lifter=self.lifter,
            find_integer=lambda at: self._holder(at, reader),
        )
        if isinstance(found, Refusal) or mask is None:
            return Proof(found)
        penalty = next((each.penalty for each in parts if each.penalty is not None), None)
        bias = self._bias(parts[1:], terms, keep, geometry, dtype)
        if isinstance(bias, Refusal):
            return Proof(bias)
        padded = found.valid is not None or found.hidden is not None
        found = replace(
            found,
            binary=tuple(sorted(self._binary)),
            averages=padded and penalty is not None and penalty <= ABSORBS,
        )
        return Proof(self._unusable(found, bias, penalty, geometry, mask, reader) or found, bias)

    def _bias(
        self,
        parts: Sequence[Kept],
        terms: Terms,
        keep: Condition,
        geometry: Geometry,
        dtype: torch.dtype,
    ) -> Alibi | Refusal | None:
        """The one bias that the terms add."""
        heads = self.lifter.sizes.affine(geometry.q_heads)
        found: Alibi | None = None
        for each, term in zip(parts, terms, strict=True):
            if not each.biases:
                continue
            bias = resolve(each.biases, keep, term.factor, heads, dtype, self.lifter)
            if isinstance(bias, Refusal):
                return bias
            if found is not None and bias is not None:
                where = dialect.describe(term.node)
                return Refusal(Reason.ADDITIVE_BIAS, f"node {where}: a second bias")
            found = bias or found
        return found

    def _unusable(
        self,
        found: Mask,
        bias: Alibi | None,
        penalty: float | None,
        geometry: Geometry,
        mask: fx.Node,
        reader: fx.Node,
    ) -> Refusal | None:
        """Why a proven mask cannot stand for ``mask`` at ``reader`` all the same."""
        changed = overwritten(found, bias, reader, self.lifter)
        if changed is not None:
            return refusal(changed, "it is written to in place before it is used")
        if penalty is not None and not every_row_sees_a_key(found, geometry, self.lifter):
            # Softmax over equal finite penalties averages over the keys that they should hide.
            return refusal(mask, f"it adds {penalty} to whole rows: they hide nothing")
        return None

    def positions(self, geometry: Geometry) -> views.Index:
        """The index (b, h, i, j) of one score; 0 where a dimension has one element."""
        sizes = (geometry.batch, geometry.q_heads, geometry.q_len, geometry.kv_len)
        return tuple(
            Affine() if size == 1 else affine(Var(name, self.lifter.sizes.affine(size)))
            for name, size in zip("bhij", sizes, strict=True)
        )

    def _term(self, geometry: Geometry, term: Term, index: views.Index) -> Kept | Refusal:
        """Where ``term`` lets a key through."""
        shape = dialect.shape(term.node)
        if shape is None or (len(shape) > 4 and term.at is None):
            return refusal(term.node, "it is no tensor of at most 4 dimensions")
        out = (geometry.batch, geometry.q_heads, geometry.q_len, geometry.kv_len)
        try:
            at = views.broadcast(shape, out, index) if term.at is None else term.at
            lifted = self.lifter.read(term.node, at, term.reader)
            if term.kind == "add":
                mask, biases = split(lifted)
                found = kept(mask, term)
                return found if isinstance(found, Refusal) else replace(found, biases=biases)
            if term.kind == "times":
                return ones_of(lifted, term)
            condition = truth(lifted)
            if condition is None:
                return unknown(lifted, term.node)
            hidden = self._fill(term, index)
        except Stuck as stuck:
            return refusal(term.node, str(stuck))
        if isinstance(hidden, Refusal):
            return hidden
        keep = condition if term.kind == "keep" else negation(condition)
        return Kept(keep, hidden.penalty)

    def _fill(self, term: Term, index: views.Index) -> Kept | Refusal:
        """What a filled logit is; it must hide its key."""
        value: Value
        if isinstance(term.fill, fx.Node):
            shape = dialect.shape(term.fill)
            if shape:
                return refusal(term.fill, "it fills scores with a tensor")
            value = self.lifter.scalar(term.fill)
            if shape == ():
                value = self.lifter.read(term.fill, (), term.reader)
        else:
            value = float(term.fill)
        filled = kept(value, term)
        if isinstance(filled, Kept) and filled.condition != FALSE:
            return refusal(term.node, f"it fills scores with {term.fill}, which hides no key")
        return filled

    def _holder(self, integer: Affine, reader: fx.Node) -> fx.Node | None:
        """A node before ``reader`` that holds ``integer``, for offsets known at run time only."""
        if self._integers is None:
            self._integers = {}
            for node in self._gm.graph.nodes:
                if isinstance(dialect.value(node), torch.SymInt):
                    held = self.lifter.sizes.integer(node)
                    if held is not None:
                        self._integers.setdefault(held, node)
        node = self._integers.get(integer)
        return node if node is not None and node < reader else None


def _ancestors(nodes: list[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        each = stack.pop()
        if each not in found:
            found.add(each)
            stack.extend(each.all_input_nodes)
    return found
