"""The tensors that an operand is a view of, each with the element that it shows."""

from __future__ import annotations

import torch
from torch import fx

from nsa_compile.passes import dialect
from nsa_compile.passes.masks import views
from nsa_compile.passes.masks.lift import Lifter
from nsa_compile.passes.masks.values import Stuck
from nsa_compile.passes.masks.views import Element
from nsa_compile.passes.match.weights import CASTS, no_tensor_index

# Views between a projection and its product with another; longer chains are no layout.
_LONGEST = 12


def chain(start: Element, reader: fx.Node, output: fx.Node, lifter: Lifter) -> list[Element]:
    """``start`` and what it is a view of, nearest first.

    Ends before a tensor that is written to in place between ``reader``, which reads it, and
    ``output``, where the rewritten graph will.
    """
    found: list[Element] = []
    element: Element | None = start
    while element is not None and len(found) < _LONGEST:
        node = element.node
        at_reader, at_output = (lifter.mutations.version(node, each) for each in (reader, output))
        if at_reader != at_output:
            break
        found.append(element)
        if at_reader is not node:
            break
        element, reader = _above(element, lifter), node
    return found


def _above(element: Element, lifter: Lifter) -> Element | None:
    op = dialect.view(element.node)
    if op is None:
        return None
    try:
        return views.source(element.node, op, element.at, lifter.sizes, no_tensor_index)
    except Stuck:
        return None


def uncast(start: Element, lifter: Lifter) -> tuple[Element, torch.dtype | None]:
    """``start`` before it was cast to a wider dtype, with its dtype there; None: it was not."""
    element: Element | None = start
    for _ in range(_LONGEST):
        assert element is not None
        op = dialect.view(element.node)
        if op is not None and op.name in CASTS and isinstance(op["x"], fx.Node):
            before, after = (dialect.value(n) for n in (op["x"], element.node))
            if before.dtype.is_floating_point and before.dtype.itemsize < after.dtype.itemsize:
                return Element(op["x"], element.at), before.dtype
        above = _above(element, lifter)
        if above is None:
            return start, None
        element = above
    return start, None
