"""Softmaxes in any spelling: by name, as the exponential of a log-softmax, or written out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from nsa_compile.passes import dialect
from nsa_compile.passes.dialect import Op
from nsa_compile.passes.match.facts import Facts

# A graph without any of these names holds no softmax.
NAMES = ("softmax", "softmin", "exp")


@dataclass(frozen=True)
class Normaliser:
    """``weights = softmax(sign * scores, dim)``.

    ``reader`` is the node that reads the scores; ``nodes`` are all that take part.
    """

    weights: fx.Node
    scores: fx.Node
    reader: fx.Node
    dim: Any
    sign: float = 1.0
    nodes: tuple[fx.Node, ...] = ()


def find(graph: fx.Graph, facts: Facts) -> Iterator[Normaliser]:
    """Every live softmax of ``graph`` that the dialect can read."""
    for node in graph.nodes:
        if node.op.startswith("call") and facts.is_live(node):
            found = read(node)
            if found is not None and isinstance(found.scores, fx.Node):
                yield found


def read(node: fx.Node) -> Normaliser | None:
    """``node`` as the weights of a softmax."""
    op = dialect.view(node)
    rule = None if op is None else _RULES.get(op.name)
    return None if op is None or rule is None else rule(node, op)


def _softmax(node: fx.Node, op: Op) -> Normaliser | None:
    return Normaliser(node, op["x"], node, op["dim"], nodes=(node,))


def _softmin(node: fx.Node, op: Op) -> Normaliser | None:
    return Normaliser(node, op["x"], node, op["dim"], -1.0, nodes=(node,))


def _exp(node: fx.Node, op: Op) -> Normaliser | None:
    """``exp(log_softmax(x))`` and ``exp(x - logsumexp(x))``."""
    inner = _view(op["x"])
    if inner.name == "log_softmax":
        return Normaliser(node, inner["x"], op["x"], inner["dim"], nodes=(node, op["x"]))
    lse = _view(inner["y"]) if inner.name == "sub" and inner["alpha"] in (None, 1) else Op("", {})
    dim = _only(lse["dim"])
    if lse.name != "logsumexp" or not lse["keepdim"] or dim is None or lse["x"] is not inner["x"]:
        return None
    if _is_written(inner["x"]) or _is_written(op["x"]):
        return None
    return Normaliser(node, inner["x"], op["x"], dim, nodes=(node, op["x"]))


def _div(node: fx.Node, op: Op) -> Normaliser | None:
    """``e / e.sum(dim, keepdim=True)`` with ``e = exp(x)`` or ``exp(x - m)``.

    ``m`` may be anything that is the same for the whole row: it cancels, gradient and all.
    """
    exp, total = _view(op["x"]), _view(op["y"])
    dim = _only(total["dim"])
    if exp.name != "exp" or total.name != "sum" or total["x"] is not op["x"] or dim is None:
        return None
    rank = len(dialect.shape(op["x"]) or ())
    if not total["keepdim"] or total["dtype"] is not None or op["rounding_mode"] is not None:
        return None
    nodes = (node, op["x"], op["y"])
    if exp.inplace or any(_is_written(each) for each in nodes[2:]):
        return None
    if _is_written(op["x"], but=node):
        return None
    shifted = _view(exp["x"])
    if shifted.name == "sub" and shifted["alpha"] in (None, 1) and not _is_written(exp["x"]):
        shape = dialect.shape(shifted["y"]) if isinstance(shifted["y"], fx.Node) else None
        if shape is not None and len(shape) == rank and shape[dim % rank] == 1:
            return Normaliser(node, shifted["x"], exp["x"], dim, nodes=(*nodes, exp["x"]))
    return Normaliser(node, exp["x"], op["x"], dim, nodes=nodes)


def _only(dim: Any) -> int | None:
    """The one dimension that a reduction names."""
    dims = dim if isinstance(dim, (list, tuple)) else (dim,)
    return dims[0] if len(dims) == 1 and isinstance(dims[0], int) else None


def _view(node: Any) -> Op:
    op = dialect.view(node) if isinstance(node, fx.Node) else None
    return op or Op("", {})


def _is_written(node: fx.Node, but: fx.Node | None = None) -> bool:
    written = (user for user in (node, *node.users) if user is not but)
    return any(dialect.written(each) for each in written)


_RULES = {"softmax": _softmax, "softmin": _softmin, "exp": _exp, "div": _div}
