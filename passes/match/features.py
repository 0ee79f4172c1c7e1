"""Tells attention over channels from attention over positions, by the projection it comes from."""

from __future__ import annotations

from torch import fx

from nsa_compile.passes import dialect
from nsa_compile.passes.masks import views
from nsa_compile.passes.masks.affine import Affine
from nsa_compile.passes.masks.lift import Lifter
from nsa_compile.passes.masks.values import Stuck
from nsa_compile.passes.masks.views import Element
from nsa_compile.passes.match.weights import no_tensor_index

_LONGEST = 24
_PROJECTIONS = ("linear", "matmul", "addmm")


def are_rows(query: Element, channel: Affine, lifter: Lifter) -> bool:
    """Whether the rows of ``query`` are features of a projection and its channels are positions.

    Cross-covariance attention multiplies ``[D, T] @ [T, D]``: the same products, but of channels.
    Normalisations in between are passed, whatever they compute: they keep the shape.
    """
    element: Element | None = query
    for _ in range(_LONGEST):
        assert element is not None
        node, at = element
        op = dialect.view(node)
        if op is not None and op.name in _PROJECTIONS:
            last = at[-1].variables()
            return bool(last) and not last & channel.variables()
        try:
            above = (
                None if op is None else views.source(node, op, at, lifter.sizes, no_tensor_index)
            )
        except Stuck:
            return False
        element = above or _same_shape(node, element)
        if element is None:
            return False
    return False


def _same_shape(node: fx.Node, element: Element) -> Element | None:
    """An input of the same shape, or the tensor that ``node`` is a chunk of."""
    shape = dialect.shape(node)
    for each in node.all_input_nodes:
        if shape is not None and dialect.shape(each) == shape:
            return Element(each, element.at)
        if isinstance(dialect.value(each), (tuple, list)):  # chunk, split: where does not matter
            rank = len(element.at)
            wholes = (x for x in each.all_input_nodes if len(dialect.shape(x) or ()) == rank)
            return next((Element(whole, element.at) for whole in wholes), None)
    return None
