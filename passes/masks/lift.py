"""Lift one element of a mask tensor's program to a value over indices: the pull-based core.

``lift(node, index)`` asks what ``node[index]`` is, where the index entries are affine in the
positions b, h, i, j, and answers by asking the inputs. An element nobody understands becomes a
``Load`` of the node that could not be seen through; what does not matter never stops a proof.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from nsa_compile.passes import dialect
from nsa_compile.passes.dialect import Op
from nsa_compile.passes.masks import views
from nsa_compile.passes.masks.affine import Affine, Load, affine, lower, upper
from nsa_compile.passes.masks.cast import cast
from nsa_compile.passes.masks.conditions import FALSE, TRUE, ne
from nsa_compile.passes.masks.constants import Patterns
from nsa_compile.passes.masks.mutation import Mutations
from nsa_compile.passes.masks.rows import Rows, runs_over
from nsa_compile.passes.masks.sizes import Sizes
from nsa_compile.passes.masks.values import (
    Stuck,
    Unknown,
    Value,
    Weighted,
    as_number,
    by_cases,
    leaves,
    map_leaves,
    size,
)
from nsa_compile.passes.masks.views import Index

Rule = Callable[["Lifter", fx.Node, Op, Index], Value]

_EXACT_INTEGERS = {torch.int32, torch.int64, torch.float32, torch.float64}
# A mask is a handful of terms; an expression past this size is not one, and must not cost time.
_LARGEST = 200
# Times any position this stays far from the largest float32; float16 is looked at by its bounds.
_LARGE = 2**40


class Lifter:
    """Lifts elements of one graph's tensors; every (node, index) is lifted once.

    Args:
        gm: the graph, read only.
        values: real tensors of placeholders and attributes whose content a proof may read.
        binary: graph inputs that are taken to hold 0 and 1 only.

    Attributes:
        inputs: the graph inputs read for one number a query or key that is no boolean.
        refuted: what is compared with a number that it cannot be, if it is as taken: padding is
            compared with 0 and 1, token ids are with others.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        values: Mapping[fx.Node, torch.Tensor],
        binary: frozenset[fx.Node] = frozenset(),
    ) -> None:
        self.binary = binary
        self.inputs: set[fx.Node] = set()
        self.refuted: set[fx.Node] = set()
        self.sizes = Sizes(gm.graph)
        self.patterns = Patterns(gm, values)
        self.mutations = Mutations(gm.graph)
        self.rows = Rows()
        self._lifted: dict[tuple[fx.Node, Index], Value] = {}
        self._reader: fx.Node | None = None

    def read(self, node: fx.Node, index: Index, reader: fx.Node) -> Value:
        """What ``reader`` sees in ``node[index]``: earlier in-place writes, and no later ones."""
        self._reader = reader
        return self.lift(node, index)

    def lift(self, node: fx.Node, index: Index) -> Value:
        """What ``node[index]`` is.

        Raises:
            Stuck: which value ``node`` has when it is read here is unclear (in-place writes).
        """
        version = self.mutations.version(node, self._reader)
        if isinstance(version, str):
            raise Stuck(f"{dialect.describe(node)} is {version}")
        key = (version, index)
        if key not in self._lifted:
            reader, self._reader = self._reader, version
            try:
                self._lifted[key] = self._lift(version, index)
            finally:
                self._reader = reader
        return self._lifted[key]

    def operand(self, node: fx.Node, argument: Any, index: Index) -> Value:
        """An operand of the elementwise ``node`` at ``index`` of its result."""
        if not isinstance(argument, fx.Node):
            return self.scalar(argument)
        shape, out = dialect.shape(argument), dialect.shape(node)
        if shape is None or out is None:
            return self.scalar(argument)
        return self.lift(argument, views.broadcast(shape, out, index))

    def scalar(self, argument: Any) -> Value:
        """A Python number, SymInt or node that holds one."""
        fake = dialect.value(argument) if isinstance(argument, fx.Node) else argument
        if isinstance(fake, bool):
            return TRUE if fake else FALSE
        if isinstance(fake, torch.SymFloat) and fake.node.expr.is_number:
            fake = float(fake.node.expr)
        if isinstance(fake, float):
            return Affine(int(fake)) if fake.is_integer() else fake
        integer = self.sizes.integer(argument)
        if integer is None:
            shown = dialect.describe(argument) if isinstance(argument, fx.Node) else argument
            raise Stuck(f"the scalar {shown}")
        return integer

    def index_value(self, node: fx.Node, index: Index) -> Affine:
        """The element of an index tensor."""
        found = as_number(self.lift(node, index))
        if not isinstance(found, Affine):
            raise Stuck(f"an index computed by {dialect.describe(node)}")
        return found

    def _lift(self, node: fx.Node, index: Index) -> Value:
        if dialect.value(node) is None:  # an assignment answers nothing: what it wrote to
            return self._rule_of(node, index)
        found = self._understood(node, index)
        self.rows.remember(node, index, self.sizes.shape(node) or (), found)
        return found

    def _understood(self, node: fx.Node, index: Index) -> Value:
        try:
            found = self._rule(node, index)
            if dialect.value(node).dtype == torch.bool:
                found = cast(found, torch.bool)
            found = _ranged(found, node)
            if not _fits(found, node) or size(found) > _LARGEST:
                raise Stuck("values that its dtype may not hold exactly")
            found = self._of_head(_rounded(found, node), node, index)
        except Stuck as stuck:
            return self._by_value(node, index, str(stuck))
        except Exception as error:
            # An argument form that no rule foresaw: one mask stays unproven, not the whole graph.
            return self._by_value(node, index, f"{type(error).__name__}: {error}")
        return found

    def _of_head(self, found: Value, node: fx.Node, index: Index) -> Value:
        """One fraction a head (an ALiBi slope) is an element of ``node``, whatever computes it."""
        if not _is_of_head(node, index) or isinstance(found, (Affine, float)):
            return found
        if isinstance(found, Unknown) and self._holds_heads(found.load):
            return found
        return self._opaque(node, index, "")

    def _holds_heads(self, load: Load) -> bool:
        """Whether the tensor of ``load`` holds one number a head and no more."""
        sizes = self.sizes.shape(load.node) or []
        wide = [(at, s) for at, s in zip(load.index, sizes, strict=True) if s.constant != 1]
        return len(wide) == 1 and wide[0] in ((affine(v), v.size) for v in wide[0][0].variables())

    def _by_value(self, node: fx.Node, index: Index, why: str) -> Value:
        if _is_of_head(node, index):
            return self._opaque(node, index, "")
        pattern = self.patterns.evaluated(node)
        return self._opaque(node, index, why) if pattern is None else pattern.element(index)

    def _rule(self, node: fx.Node, index: Index) -> Value:
        if node.op in ("placeholder", "get_attr"):
            pattern = self.patterns.given(node)
            if pattern is not None:
                return pattern.element(index)
            known = node in self.patterns.values
            return self._opaque(node, index, "its values follow no known rule" if known else "")
        op = dialect.view(node)
        if op is None or dialect.shape(node) is None:
            raise Stuck("an operator that mask proofs do not know")
        element = views.source(node, op, index, self.sizes, self.index_value)
        if element is not None:
            return self.lift(element.node, element.at)
        return self._rule_of(node, index)

    def _rule_of(self, node: fx.Node, index: Index) -> Value:
        op = dialect.view(node)
        from nsa_compile.passes.masks.rules import RULES

        rule = None if op is None else RULES.get(op.name)
        if op is None or rule is None:
            raise Stuck("an operator that mask proofs do not know")
        return rule(self, node, op, index)

    def _opaque(self, node: fx.Node, index: Index, why: str) -> Value:
        fake = dialect.value(node)
        if node.op == "placeholder" and fake.dtype != torch.bool and not fake.dtype.is_complex:
            if runs_over(index, self.sizes.shape(node) or ()) in ("i", "j"):
                self.inputs.add(node)
            if node in self.binary:
                return affine(Load(node, index, 0, 1))
        if fake.dtype.is_floating_point or fake.dtype.is_complex:
            return Unknown(Load(node, index, why=why))
        low, high = _limits(fake.dtype)
        load = affine(Load(node, index, low, high, why))
        return ne(load) if fake.dtype == torch.bool else load


def _is_of_head(node: fx.Node, index: Index) -> bool:
    """Whether a fraction is read at an index that depends on the head alone."""
    used = {v.name for at in index for v in at.variables()}
    return used == {"h"} and dialect.value(node).dtype.is_floating_point


def _rounded(value: Value, node: fx.Node) -> Value:
    """``value`` with the dtype of ``node`` noted where that rounds what is weighted."""
    dtype = dialect.value(node).dtype
    if not dtype.is_floating_point or dtype.itemsize >= 4:
        return value
    return map_leaves(value, lambda v: replace(v, dtype=dtype) if isinstance(v, Weighted) else v)


def _ranged(value: Value, node: fx.Node) -> Value:
    """``value`` with what overflows the floating-point dtype of ``node`` as an infinity."""
    dtype = dialect.value(node).dtype
    if not dtype.is_floating_point:
        return value
    top = torch.finfo(dtype).max

    def leaf(found: Value) -> Value:
        constant = found.constant if isinstance(found, Affine) else found
        if isinstance(constant, (int, float)):
            return math.copysign(math.inf, constant) if abs(constant) > top else found
        if not isinstance(found, Affine) or _largest(found) <= _LARGE:
            return found
        cases = by_cases(found)
        if isinstance(cases, Affine):
            raise Stuck("a position times a number so large that it may overflow")
        return map_leaves(cases, leaf)

    return map_leaves(value, leaf)


def _largest(found: Affine) -> int:
    return max(abs(number) for number in (found.const, *found.terms.values()))


def _limits(dtype: torch.dtype) -> tuple[int | None, int | None]:
    """What an element of a narrow integer dtype can be; nothing is said of wide ones."""
    if dtype == torch.bool:
        return 0, 1
    if dtype in _EXACT_INTEGERS:
        return None, None
    return torch.iinfo(dtype).min, torch.iinfo(dtype).max


def _fits(value: Value, node: fx.Node) -> bool:
    """Whether the dtype of ``node`` holds ``value`` exactly: then the mathematics is the program.

    float32 holds positions up to 2**24, int32 up to 2**31: longer than any sequence.
    """
    dtype = dialect.value(node).dtype
    if dtype in _EXACT_INTEGERS or dtype == torch.bool:
        return True
    return all(_leaf_fits(leaf, dtype) for leaf in leaves(value))


def _leaf_fits(leaf: Value, dtype: torch.dtype) -> bool:
    if not isinstance(leaf, Affine):
        return True
    low, high = lower(leaf), upper(leaf)
    if dtype.is_floating_point:  # constants may round: a mask's are 0, 1 and very negative ones
        return leaf.constant is not None or (
            low is not None and high is not None and -256 <= low and high <= 256
        )
    limits = torch.iinfo(dtype)
    return low is not None and high is not None and limits.min <= low and high <= limits.max
