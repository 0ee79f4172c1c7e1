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


def _addmm(node: fx.Node, op: Op) -> Product | None:
    alpha, beta = op["alpha"], op["beta"]
    return _batched(
        node, op["mat1"], op["mat2"],
        alpha=1.0 if alpha is None else alpha, beta=1.0 if beta is None else beta, addend=op["x"],
    )  # fmt: skip


def _inner(node: fx.Node, op: Op) -> Product | None:
    """The last dimensions are summed over; the others stand side by side."""
    ranks = _ranks(op["x"], op["y"])
    return None if ranks is None else _contracted(node, op, ranks[0] - 1, ranks[1] - 1)


def _tensordot(node: fx.Node, op: Op) -> Product | None:
    ranks, dims = _ranks(op["x"], op["y"]), op["dims"]
    if op["dims_other"] is not None:
        dims = (dims, op["dims_other"])
    if ranks is None or dims == 0 or not isinstance(dims, (int, list, tuple)):
        return None
    if isinstance(dims, int):
        dims = ([-1], [0]) if dims == 1 else ()
    one = [each[0] for each in dims if isinstance(each, (list, tuple)) and len(each) == 1]
    if len(dims) != 2 or len(one) != 2 or not all(isinstance(each, int) for each in one):
        return None
    return _contracted(node, op, one[0], one[1])


def _contracted(node: fx.Node, op: Op, of_x: int, of_y: int) -> Product | None:
    ranks = _ranks(op["x"], op["y"])
    if ranks is None or min(ranks) < 1:
        return None
    left: list[Label] = [f"left{position}" for position in range(ranks[0])]
    right: list[Label] = [f"right{position}" for position in range(ranks[1])]
    left[of_x] = right[of_y] = "sum"
    out = tuple(label for label in (*left, *right) if label != "sum")
    return Product(node, op["x"], op["y"], tuple(left), tuple(right), out, "sum")


def _sum(node: fx.Node, op: Op) -> Product | None:
    """``(x * y).sum(dim)``, where each operand has a dimension that the other broadcasts."""
    plain = not op["keepdim"] and not op["dtype"]
    return _summed(node, op) if plain and not _writes_between(op["x"], node) else None


def _summed(node: fx.Node, op: Op) -> Product | None:
    multiply = op["x"]
    inner = dialect.view(multiply) if isinstance(multiply, fx.Node) else None
    dims = op["dim"] if isinstance(op["dim"], (list, tuple)) else [op["dim"]]
    if inner is None or inner.name != "mul" or len(dims) != 1 or not isinstance(dims[0], int):
        return None
    x, y = inner["x"], inner["y"]
    shapes = [dialect.shape(each) if isinstance(each, fx.Node) else None for each in (x, y)]
    out = dialect.shape(multiply)
    if out is None or any(s is None or len(s) != len(out) for s in shapes):
        return None
    summed = dims[0] % len(out)
    left, right = (
        tuple(
            "sum" if p == summed else f"{side}{p}" if size == 1 and wide != 1 else p
            for p, (size, wide) in enumerate(zip(shape or (), out, strict=True))
        )
        for side, shape in zip(("left", "right"), shapes, strict=True)
    )
    result: tuple[Label, ...] = tuple(p for p in range(len(out)) if p != summed)
    found = Product(node, x, y, left, right, result, "sum")
    return found if found.has_rows(x) and found.has_rows(y) else None


def _writes_between(first: fx.Node, last: fx.Node) -> bool:
    """Whether anything is written to between two nodes that stand close together."""
    node = first
    for _ in range(8):
        if node is last:
            return False
        if dialect.written(node):
            return True
        node = node.next
    return True


def opaque_operands(node: fx.Node) -> list[fx.Node]:
    """What ``node`` contracts in a way that :func:`product` does not read; else nothing."""
    if not _is_opaque(node):
        return []
    multiply = node.args[0] if dialect.name(node).startswith("sum") else node
    return list((multiply if isinstance(multiply, fx.Node) else node).all_input_nodes)


def _is_opaque(node: fx.Node) -> bool:
    name = dialect.name(node).split(".")[0] if node.op.startswith("call") else ""
    op = dialect.view(node)
    if op is None:
        return name in _OPAQUE
    if op.name == "sum":
        return _sum(node, op) is None and _summed(node, op) is not None
    return op.name in ("einsum", "tensordot", "inner") and product(node) is None


def _interleaved(node: fx.Node) -> tuple[str, tuple[Any, ...]] | None:
    """``einsum(x, [0, 1], y, [1, 2], [0, 2])`` as an equation."""
    args = list(node.args)
    out = args.pop() if len(args) % 2 else None
    lists = [*args[1::2], *([] if out is None else [out])]
    plain = all(isinstance(each, (list, tuple)) for each in lists)
    if not plain or not all(each is Ellipsis or isinstance(each, int) for x in lists for each in x):
        return None
    terms = ["".join("..." if e is Ellipsis else chr(ord("A") + e) for e in x) for x in lists]
    inputs = ",".join(terms[: len(args) // 2])
    return (inputs if out is None else f"{inputs}->{terms[-1]}"), tuple(args[::2])


def _einsum(node: fx.Node, op: Op) -> Product | None:
    operands: tuple[Any, ...] = op["operands"] or ()
    equation = op["equation"]
    if isinstance(equation, fx.Node):
        equation, operands = _interleaved(node) or ("", ())
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


_OPAQUE = (
    "multi_dot",
    "linalg_multi_dot",
    "chain_matmul",
    "addbmm",
    "bilinear",
    "mv",
    "addmv",
    "cosine_similarity",
)
_RULES = {
    "matmul": _matmul,
    "baddbmm": _baddbmm,
    "addmm": _addmm,
    "linear": _linear,
    "einsum": _einsum,
    "tensordot": _tensordot,
    "inner": _inner,
    "sum": _sum,
}
