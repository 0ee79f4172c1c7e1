"""Products of two tensors in any spelling: which dimensions they share, contract and keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from nsa_compile.passes import dialect
from nsa_compile.passes.dialect import Op
from nsa_compile.passes.masks.affine import Affine, Var, affine
from nsa_compile.passes.masks.sizes import Size, Sizes
from nsa_compile.passes.masks.views import Element, Index

# A dimension's name within one product: a letter of einsum, or its position for matmul.
Label = str | int


@dataclass(frozen=True)
class Product:
    """``out[labels] = alpha * sum(left * right) + beta * addend`` over one contracted label.

    Each operand has one label a dimension; a dimension of size 1 is broadcast.
    """

    node: fx.Node
    left: fx.Node
    right: fx.Node
    left_labels: tuple[Label, ...]
    right_labels: tuple[Label, ...]
    out_labels: tuple[Label, ...]
    contracted: Label
    alpha: Any = 1.0
    beta: Any = 0.0
    addend: fx.Node | None = None

    def operands(self, out: Index, channel: Affine) -> tuple[Element, Element]:
        """The elements of left and right that meet in ``node[out]`` at ``channel``."""
        at = dict(zip(self.out_labels, out, strict=True)) | {self.contracted: channel}
        return (
            Element(self.left, _index(self.left, self.left_labels, at)),
            Element(self.right, _index(self.right, self.right_labels, at)),
        )

    def size(self, label: Label) -> Size:
        """Extent of ``label``: that of the operand that does not broadcast it."""
        found: Size = 1
        for node, labels in ((self.left, self.left_labels), (self.right, self.right_labels)):
            shape = dialect.shape(node)
            assert shape is not None
            sizes = [s for s, each in zip(shape, labels, strict=True) if each == label]
            found = next((s for s in sizes if s != 1), found)
        return found

    def has_rows(self, of: fx.Node) -> bool:
        """Whether ``of`` has a dimension that the other operand lacks, and that is kept."""
        mine, other = self.left_labels, self.right_labels
        if of is self.right:
            mine, other = other, mine
        return any(label in self.out_labels for label in set(mine) - set(other))


def product(node: fx.Node) -> Product | None:
    """``node`` as a product of two tensors with one contracted dimension, or None."""
    op = dialect.view(node)
    if op is None or op.name not in _RULES:
        return None
    return _RULES[op.name](node, op)


def variables(prefix: str, sizes: Sequence[Size], known: Sizes) -> tuple[Affine, ...]:
    """One index variable a size; 0 where there is only one element."""
    return tuple(
        Affine() if size == 1 else affine(Var(f"{prefix}{position}", known.affine(size)))
        for position, size in enumerate(sizes)
    )


def _index(node: fx.Node, labels: Sequence[Label], at: dict[Label, Affine]) -> Index:
    shape = dialect.shape(node)
    assert shape is not None
    return tuple(
        Affine() if size == 1 else at[label] for size, label in zip(shape, labels, strict=True)
    )


def _ranks(*nodes: Any) -> tuple[int, ...] | None:
    shapes = [dialect.shape(node) if isinstance(node, fx.Node) else None for node in nodes]
    return (
        None if any(s is None for s in shapes) else tuple(len(s) for s in shapes if s is not None)
    )


def _matmul(node: fx.Node, op: Op) -> Product | None:
    return _batched(node, op["x"], op["y"])


def _batched(node: fx.Node, x: Any, y: Any, **more: Any) -> Product | None:
    """Leading dimensions are aligned from the right and broadcast."""
    ranks = _ranks(x, y, node)
    if ranks is None or min(ranks) < 2:
        return None
    lead: tuple[Label, ...] = tuple(range(ranks[2] - 2))
    left = (*lead[len(lead) - (ranks[0] - 2) :], "row", "sum")
    right = (*lead[len(lead) - (ranks[1] - 2) :], "sum", "column")
    return Product(node, x, y, left, right, (*lead, "row", "column"), "sum", **more)


def _baddbmm(node: fx.Node, op: Op) -> Product | None:
    alpha, beta = op["alpha"], op["beta"]
    return _batched(
        node, op["batch1"], op["batch2"],
        alpha=1.0 if alpha is None else alpha, beta=1.0 if beta is None else beta, addend=op["x"],
    )  # fmt: skip


def _linear(node: fx.Node, op: Op) -> Product | None:
    """``x @ weight.T``: two activations may meet in it."""
    ranks = _ranks(op["x"], op["weight"])
    if ranks is None or op["bias"] is not None or ranks[1] != 2 or ranks[0] < 2:
        return None
    lead: tuple[Label, ...] = tuple(range(ranks[0] - 1))
    return Product(
        node, op["x"], op["weight"], (*lead, "sum"), ("column", "sum"), (*lead, "column"), "sum"
    )


def _einsum(node: fx.Node, op: Op) -> Product | None:
    operands: tuple[Any, ...] = op["operands"] or ()
    equation = op["equation"]
    if not isinstance(equation, str) or len(operands) != 2:
        return None
    ranks = _ranks(*operands, node)
    if ranks is None:
        return None
    terms, arrow, out = equation.replace(" ", "").partition("->")
    inputs = terms.split(",")
    if len(inputs) != 2:
        return None
    if not arrow:
        letters = terms.replace(",", "").replace(".", "")
        out = ("..." if "..." in terms else "") + "".join(
            sorted(c for c in set(letters) if letters.count(c) == 1)
        )
    labels = [_labels(t, rank) for t, rank in zip((*inputs, out), ranks, strict=True)]
    if any(each is None or len(set(each)) != len(each) for each in labels):
        return None
    left, right, result = (tuple(each or ()) for each in labels)
    summed = (set(left) | set(right)) - set(result)
    if len(summed) != 1 or not summed <= set(left) & set(right):
        return None
    x, y = operands
    return Product(node, x, y, left, right, result, summed.pop())


def _labels(term: str, rank: int) -> tuple[Label, ...] | None:
    """Letters as they are; the dimensions of an ellipsis counted from its right end."""
    before, ellipsis, after = term.partition("...")
    hidden = rank - len(before) - len(after)
    if hidden < 0 or (hidden and not ellipsis):
        return None
    return (*before, *(position - hidden for position in range(hidden)), *after)


_RULES = {"matmul": _matmul, "baddbmm": _baddbmm, "linear": _linear, "einsum": _einsum}
