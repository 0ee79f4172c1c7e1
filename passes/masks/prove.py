"""Prove what a site's mask means: lift it at (b, h, i, j), simplify, name the normal form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from nsa_compile.passes import dialect
from nsa_compile.passes.masks import views
from nsa_compile.passes.masks.affine import Affine, Load, Var, affine, lower
from nsa_compile.passes.masks.conditions import CONDITIONS, FALSE, TRUE, Condition, ge, ne
from nsa_compile.passes.masks.lift import Lifter
from nsa_compile.passes.masks.logic import all_of
from nsa_compile.passes.masks.normal_form import classify
from nsa_compile.passes.masks.sizes import Size
from nsa_compile.passes.masks.values import Choice, Stuck, Unknown, Value, choose
from nsa_compile.passes.reasons import Reason, Refusal
from nsa_compile.passes.site import Mask

# An additive mask hides a key when it adds at most this. exp(score - maximum) is then 0 in float32
# unless the scores of one row span more than 9,000, so dropping the key changes nothing. finfo.min,
# -inf, -1e9 and the -1e4 of older models all count; a smaller penalty is a bias, not a mask.
MASKED = -1e4


@dataclass(frozen=True)
class Geometry:
    """Sizes of the score matrix ``[B, Hq, Tq, Tk]``, as ints or sympy expressions."""

    batch: Size
    q_heads: Size
    q_len: Size
    kv_len: Size


class Prover:
    """Proves the masks of one graph. A mask that serves many layers is lifted once."""

    def __init__(self, gm: fx.GraphModule, values: Mapping[fx.Node, torch.Tensor]) -> None:
        self._gm = gm
        self._values = values
        self._known: dict[
            tuple[Geometry, fx.Node | None, bool, fx.Node | None], Mask | Refusal
        ] = {}
        self._lifter: Lifter | None = None
        self._integers: dict[Affine, fx.Node] | None = None

    @property
    def lifter(self) -> Lifter:
        """Built at the first mask: a graph without attention pays nothing."""
        if self._lifter is None:
            self._lifter = Lifter(self._gm, self._values)
        return self._lifter

    def prove(
        self, geometry: Geometry, mask: fx.Node | None, is_causal: bool, reader: fx.Node
    ) -> Mask | Refusal:
        """The normal form of ``mask`` and ``is_causal`` together, or why there is none.

        ``is_causal`` is aligned to the top left, offset 0 even when Tq != Tk, as in SDPA.
        ``reader`` is the node that uses the mask; it decides which in-place writes it sees.
        """
        version = reader if mask is not None and self.lifter.mutations.any else None
        key = (geometry, mask, is_causal, version)
        if key not in self._known:
            self._known[key] = self._prove(geometry, mask, is_causal, reader)
        return self._known[key]

    def _prove(
        self, geometry: Geometry, mask: fx.Node | None, is_causal: bool, reader: fx.Node
    ) -> Mask | Refusal:
        index = self._positions(geometry)
        keep: Condition = ge(index[2] - index[3]) if is_causal else TRUE
        kept, buffers = _Kept(TRUE), set[fx.Node]()
        if mask is not None:
            lifted = self._lift(geometry, mask, index, reader)
            if isinstance(lifted, Refusal):
                return lifted
            kept = lifted
            buffers = self.lifter.patterns.read & _ancestors(mask)
        found = classify(
            all_of([keep, kept.condition]),
            mask,
            buffers=buffers,
            rows=self.lifter.rows,
            find_integer=lambda at: self._holder(at, reader),
        )
        if isinstance(found, Mask) and mask is not None:
            return self._unusable(found, kept, geometry, mask, reader) or found
        return found

    def _unusable(
        self, found: Mask, kept: _Kept, geometry: Geometry, mask: fx.Node, reader: fx.Node
    ) -> Refusal | None:
        """Why a proven mask cannot stand for ``mask`` at ``reader`` all the same."""
        if found.valid is not None:
            # The rewritten graph reads the padding where the attention stands.
            if self.lifter.mutations.version(found.valid, reader) is not found.valid:
                return _refusal(found.valid, "it is written to in place before it is used")
        if kept.penalty is not None and not self._every_row_sees_a_key(found, geometry):
            # Softmax over equal finite penalties averages over the keys that they should hide.
            return _refusal(mask, f"it adds {kept.penalty} to whole rows: they hide nothing")
        return None

    def _every_row_sees_a_key(self, mask: Mask, geometry: Geometry) -> bool:
        """Whether every query sees a key, padding aside: rows of padding may hold anything."""
        sizes = self.lifter.sizes
        offset = sizes.integer(mask.offset) if mask.causal else Affine()
        assert offset is not None
        if mask.causal and not _at_least_zero(offset):
            return False
        if mask.window is None:
            return True
        # The last query stands at Tq - 1 + offset; its window must reach back to key Tk - 1.
        last = sizes.affine(geometry.q_len) + offset - 1
        return _at_least_zero(sizes.affine(geometry.kv_len) - 1 - last + (mask.window - 1))

    def _positions(self, geometry: Geometry) -> views.Index:
        """The index (b, h, i, j) of one score; 0 where a dimension has one element."""
        sizes = (geometry.batch, geometry.q_heads, geometry.q_len, geometry.kv_len)
        return tuple(
            Affine() if size == 1 else affine(Var(name, self.lifter.sizes.affine(size)))
            for name, size in zip("bhij", sizes, strict=True)
        )

    def _lift(
        self, geometry: Geometry, mask: fx.Node, index: views.Index, reader: fx.Node
    ) -> _Kept | Refusal:
        shape = dialect.shape(mask)
        if shape is None or len(shape) > 4:
            return _refusal(mask, "it is no tensor of at most 4 dimensions")
        out = (geometry.batch, geometry.q_heads, geometry.q_len, geometry.kv_len)
        try:
            lifted = self.lifter.read(mask, views.broadcast(shape, out, index), reader)
        except Stuck as stuck:
            return _refusal(mask, str(stuck))
        return _kept(lifted, mask)

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


@dataclass(frozen=True)
class _Kept:
    """Where a mask lets a key through; ``penalty`` is the finite number that it adds elsewhere."""

    condition: Condition
    penalty: float | None = None


def _kept(value: Value, mask: fx.Node) -> _Kept | Refusal:
    """Where ``value`` lets a key through: true, or an additive 0."""
    if isinstance(value, CONDITIONS):
        return _Kept(value)
    if isinstance(value, Choice):
        return _kept_choice(value, mask)
    if isinstance(value, Unknown):
        load = value.load
        return _refusal(load.node, load.why or "its values are only known at run time")
    if isinstance(value, Affine):
        return _kept_integer(value, mask)
    return _kept_constant(value, mask)


def _kept_choice(value: Choice, mask: fx.Node) -> _Kept | Refusal:
    then, otherwise = _kept(value.then, mask), _kept(value.otherwise, mask)
    if isinstance(then, Refusal):
        return then
    if isinstance(otherwise, Refusal):
        return otherwise
    decided = choose(value.condition, then.condition, otherwise.condition)
    assert isinstance(decided, CONDITIONS)
    return _Kept(decided, otherwise.penalty if then.penalty is None else then.penalty)


def _kept_integer(value: Affine, mask: fx.Node) -> _Kept | Refusal:
    if value.constant is not None:
        return _kept_constant(value.constant, mask)
    ((atom, step), *more) = value.terms.items()
    if more or not isinstance(atom, Load) or (atom.low, atom.high) != (0, 1):
        return _refusal(mask, f"it adds {value!r} to the scores")
    return _kept(choose(ne(affine(atom)), affine(value.const + step), affine(value.const)), mask)


def _kept_constant(value: float, mask: fx.Node) -> _Kept | Refusal:
    if value == 0:
        return _Kept(TRUE)
    if value <= MASKED:
        return _Kept(FALSE, None if value == -math.inf else value)
    return _refusal(mask, f"it adds {value} to scores, which neither keeps nor hides a key")


def _at_least_zero(integer: Affine) -> bool:
    low = lower(integer)
    return low is not None and low >= 0


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        each = stack.pop()
        if each not in found:
            found.add(each)
            stack.extend(each.all_input_nodes)
    return found


def _refusal(node: fx.Node, what: str) -> Refusal:
    return Refusal(Reason.MASK_NOT_UNDERSTOOD, f"node {dialect.describe(node)}: {what}")
