"""Bring a root to ``[B, H, T, D]``: tell its axes apart and find the steps for every operand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from nsa_compile.passes import dialect
from nsa_compile.passes.masks import Geometry
from nsa_compile.passes.masks.affine import Affine, Var
from nsa_compile.passes.masks.lift import Lifter
from nsa_compile.passes.masks.views import Element, Index
from nsa_compile.passes.match import axes, steps
from nsa_compile.passes.match.chains import chain, uncast
from nsa_compile.passes.match.roles import Roles, assign
from nsa_compile.passes.match.roots import Root
from nsa_compile.passes.reasons import Reason, Refusal
from nsa_compile.passes.site import Steps


@dataclass(frozen=True)
class Operand:
    """A tensor and the steps that lay it out as ``[B, H, T, D]``."""

    node: fx.Node
    steps: Steps
    at: Index


@dataclass(frozen=True)
class Layout:
    """A root whose axes are known.

    ``heads`` are in the order of the operators: the key heads first, then the queries that share
    one. ``kv_heads`` are those of them that keys and values have.
    """

    query: Operand
    key: Operand
    value: Operand
    output_steps: Steps
    lse_steps: Steps
    geometry: Geometry
    roles: Roles
    heads: tuple[Var, ...]
    kv_heads: tuple[Var, ...]
    splits: axes.Splits
    dtype: torch.dtype


def resolve(root: Root, lifter: Lifter) -> Layout | Refusal:
    """The layout of ``root``, or why the operators cannot be given its tensors."""
    return _Resolver(root, lifter).resolve()


class _Resolver:
    def __init__(self, root: Root, lifter: Lifter) -> None:
        self.root, self.lifter = root, lifter
        self.splits = axes.Splits(lifter.sizes)
        self.dtype = root.dtype
        self.elements = self._elements()
        self._known: tuple[int, list[list[Element]]] | None = None
        inner = (root.key_at, root.channel, root.value_channel)
        self.inner = {var for at in inner for var in at.variables()}

    def _elements(self) -> list[Element]:
        """Query, key and value; without casts to a wider dtype, which the operators do inside."""
        given = [self.root.query, self.root.key, self.root.value]
        low = uncast(given[0], self.lifter)[1]
        if low is None:
            return given
        bare = [uncast(element, self.lifter) for element in given]
        value = dialect.value(self.root.value.node)
        if bare[1][1] != low or low not in (value.dtype, bare[2][1]):
            return given
        if dialect.value(self.root.query.node).dtype != self.dtype:  # autocast has the last word
            return given
        self.dtype = low
        return [bare[0][0], bare[1][0], bare[2][0] if bare[2][1] == low else given[2]]

    def resolve(self) -> Layout | Refusal:
        self._split_own()
        self._split_heads()
        out = self.splits.apply(self.root.out)
        keys = self.splits.apply((self.root.key_at,))[0]
        masks = {
            self.splits.apply(term.at): term for term in self.root.terms if term.at is not None
        }
        q, k, v = self._chains()
        for (node, _), found in zip(self.elements, (q, k, v), strict=True):
            if not found:
                why = "it is written to in place before the attention's end"
                return Refusal(Reason.UNRECOGNISED_ATTENTION, f"{dialect.describe(node)}: {why}")
        # Batch stays batch, even where keys are the same for all of it.
        batch = set(axes.axes(out[:1])[:1])
        of_query, of_key, of_value = (
            {var for at in elements[0].at for var in at.variables()} - self.inner
            for elements in (q, k, v)
        )
        needed = (self._needed(k) | self._needed(v)) - self.inner
        of_key = (of_key | of_value) & (needed | batch)
        roles = assign(
            [var for var in axes.axes(out) if var not in self.inner],
            of_query,
            of_key,
            keys,
            list(masks),
            [at for at, term in masks.items() if term.kind != "add"],
            all(any(_is_one_sequence(node) for node, _ in elements) for elements in (q, k)),
        )
        if isinstance(roles, str):
            return self._refusal(roles)
        return self._laid_out(roles, out)

    def _needed(self, elements: list[Element]) -> set[Var]:
        """The axes of the tensor with the fewest: what repeats it drops out."""
        found = []
        for node, at in elements:
            shape = self.lifter.sizes.shape(node) or []
            if all(axes.digits(a, s) is not None for a, s in zip(at, shape, strict=True)):
                found.append({var for each in at for var in each.variables()})
        nearest = {var for each in elements[0].at for var in each.variables()}
        return min(found, key=len, default=nearest)

    def _nearest(self) -> list[Index]:
        return [self.splits.apply(element.at) for element in self.elements]

    def _split_own(self) -> None:
        """Take apart what the spelling itself divides (scores viewed as batch and heads)."""
        while True:
            masks = [self.splits.apply(term.at or ()) for term in self.root.terms]
            if self.root.lse is not None:
                masks.append(self.splits.apply(self.root.lse.at))
            at = [each for index in (*self._nearest(), *masks) for each in index]
            found = [(v, by) for v, by in axes.divisions(at) if v not in self.inner]
            if not any(self.splits.split(var, by) for var, by in found[:1]):
                return

    def _split_heads(self) -> None:
        """Take apart axes that queries and keys share, as the views above them do."""
        while True:
            q, k, _ = ({v for at in index for v in at.variables()} for index in self._nearest())
            shared = q & k
            found = [
                (var, by)
                for elements in self._chains()
                for element in elements
                for var, by in axes.divisions(element.at)
                if var in shared
            ]
            if not any(self.splits.split(var, by) for var, by in found[:1]):
                return

    def _chains(self) -> list[list[Element]]:
        """Query, key and value with what they are views of, after the splits so far."""
        if self._known is not None and self._known[0] == len(self.splits.replaced):
            return self._known[1]
        root = self.root
        readers = (root.reader, root.reader, root.output)
        found = [
            chain(Element(node, self.splits.apply(at)), reader, root.output, self.lifter)
            for (node, at), reader in zip(self.elements, readers, strict=True)
        ]
        self._known = len(self.splits.replaced), found
        return found

    def _laid_out(self, roles: Roles, out: Index) -> Layout | Refusal:
        root = self.root
        q_chain, k_chain, v_chain = self._chains()
        channel, value_channel = (
            axes.axes(self.splits.apply((at,))) for at in (root.channel, root.value_channel)
        )
        keys = axes.axes((root.key_at,))
        if any(var.size.constant is None for var in (*roles.heads, *channel, *value_channel)):
            return self._refusal("heads and head width must be constants")
        fewest = [
            self._fewest_heads(elements, roles, keys, last)
            for elements, last in ((k_chain, channel), (v_chain, value_channel))
        ]
        kv_heads = tuple(h for h in roles.heads if any(f is None or h in f for f in fewest))
        heads = (*kv_heads, *(h for h in roles.heads if h not in kv_heads))
        spelled = tuple(var for var in axes.axes(out) if var in heads)
        if heads != spelled and self._names_heads(set(heads)):
            # Slopes and sinks stand in the order of the spelling: keep it, repeated keys and all.
            heads = kv_heads = spelled
        q = self._best(q_chain, (roles.batch, heads, roles.rows, channel))
        k = self._best(k_chain, (roles.batch, kv_heads, keys, channel))
        v = self._best(v_chain, (roles.batch, kv_heads, keys, value_channel))
        if q is None or k is None or v is None:
            name = "query" if q is None else "key" if k is None else "value"
            return self._refusal(f"{name} has a layout that is not understood")
        shape = self.lifter.sizes.shape(root.output)
        canonical = (roles.batch, heads, roles.rows, value_channel)
        back = None if shape is None else steps.back(out, canonical, shape)
        geometry = _geometry(roles, heads, keys)
        if back is None or geometry is None:
            return self._refusal("the result has a layout that is not understood")
        lse = self._lse((roles.batch, heads, roles.rows, ()))
        if isinstance(lse, Refusal):
            return lse
        return Layout(q, k, v, back, lse, geometry, roles, heads, kv_heads, self.splits, self.dtype)

    def _lse(self, canonical: steps.Canonical) -> Steps | Refusal:
        """Steps from the operators' log-sum-exp to the one that the program reads."""
        if self.root.lse is None:
            return ()
        node, at = self.root.lse
        shape = self.lifter.sizes.shape(node)
        found = None if shape is None else steps.back(self.splits.apply(at), canonical, shape)
        if found is None:
            return Refusal(Reason.WEIGHTS_ESCAPE, f"{dialect.describe(node)} uses them too")
        return found

    def _names_heads(self, heads: set[Var]) -> bool:
        """Whether something that is added to the logits differs from head to head."""
        added = [term.at for term in self.root.terms if term.kind == "add" and term.at is not None]
        if self.root.sinks is not None:
            added.append(self.root.sinks.at)
        return any(at.variables() & heads for index in added for at in self.splits.apply(index))

    def _fewest_heads(
        self, elements: list[Element], roles: Roles, keys: list[Var], last: list[Var]
    ) -> set[Var] | None:
        """The head axes of the tensor with the fewest, None when no tensor of the chain will do."""
        best: tuple[int, set[Var]] | None = None
        for node, at in elements:
            own = {var for each in at for var in each.variables()} & set(roles.heads)
            heads = [var for var in roles.heads if var in own]
            laid_out = (roles.batch, heads, keys, last)
            if steps.towards(node, at, laid_out, self.lifter.sizes) is None:
                continue
            size = axes.extent(heads)
            count = size.const if size is not None and size.constant is not None else 1 << 30
            if best is None or count < best[0]:
                best = count, own
        return None if best is None else best[1]

    def _best(self, elements: list[Element], canonical: steps.Canonical) -> Operand | None:
        """The tensor of the chain that needs the fewest steps, the nearest of those."""
        found = [
            Operand(node, taken, at)
            for node, at in elements
            if (taken := steps.towards(node, at, canonical, self.lifter.sizes)) is not None
        ]
        return min(found, key=lambda operand: len(operand.steps), default=None)

    def _refusal(self, why: str) -> Refusal:
        shown = []
        for name, (node, _) in zip("qkv", self.elements, strict=True):
            shown.append(f"{name} [{', '.join(map(str, dialect.shape(node) or ('?',)))}]")
        return Refusal(Reason.UNSUPPORTED_SHAPE, f"{why}: {', '.join(shown)}")


def _is_one_sequence(node: fx.Node) -> bool:
    shape = dialect.shape(node)
    return shape is not None and len(shape) > 3 and shape[0] == 1


def _geometry(roles: Roles, heads: Sequence[Var], keys: Sequence[Var]) -> Geometry | None:
    sizes = []
    for vars_ in (roles.batch, heads, roles.rows, keys):
        extent = axes.extent(vars_)
        size = None if extent is None else axes.as_size(extent)
        if size is None:
            return None
        sizes.append(size)
    return Geometry(*sizes)


def canonical_index(layout: Layout, at: Index, positions: Index, key_at: Affine) -> Index | None:
    """``at`` over the positions (b, h, i, j) of ``[B, H, Tq, Tk]``; None when it has other axes."""
    known: dict[Var, Affine] = {}
    keys = axes.axes((key_at,))
    for vars_, position in zip(
        (layout.roles.batch, layout.heads, layout.roles.rows, keys), positions, strict=True
    ):
        found = axes.decoded(vars_, position)
        if found is None:
            return None
        known.update(found)
    result = []
    for each in layout.splits.apply(at):
        if not each.variables() <= set(known):
            return None
        for var, value in known.items():
            each = each.substitute(var, value)
        result.append(each)
    return tuple(result)
