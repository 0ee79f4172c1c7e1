"""The log-sum-exp of a site's scores where the model reads it: one more output of the operators."""

from __future__ import annotations

from torch import fx

from nsa_compile.passes import dialect
from nsa_compile.passes.dialect import Op
from nsa_compile.passes.masks.affine import Affine
from nsa_compile.passes.masks.views import Element, Index
from nsa_compile.passes.match.grammar import Grammar
from nsa_compile.passes.match.normalisers import Normaliser
from nsa_compile.passes.match.weights import CASTS


def find(softmax: Normaliser, at: Index, output: fx.Node, grammar: Grammar) -> Element | None:
    """The element of a ``logsumexp`` that belongs to row ``at`` of ``softmax``.

    Attention sinks may be spelled with it: ``out * sigmoid(lse - sink)``. None where there is no
    such node, or where what reads it cannot wait for ``output``, which the operators answer with.
    """
    rank, dim = len(at), softmax.dim
    scores, seen = _uncast(softmax.scores, softmax.reader, grammar)
    if softmax.sign != 1:
        return None
    for node in seen:
        for user in node.users:
            found = dialect.view(user)
            if found is None or found.name != "logsumexp" or not grammar.facts.is_live(user):
                continue
            if _dim(found, rank) != dim % rank or _uncast(found["x"], user, grammar)[0] != scores:
                continue
            if _can_wait(user, output, grammar):
                column = (Affine(),) if found["keepdim"] else ()
                return Element(user, (*at[: dim % rank], *column, *at[dim % rank + 1 :]))
    return None


def _dim(op: Op, rank: int) -> int | None:
    dims = op["dim"] if isinstance(op["dim"], (list, tuple)) else [op["dim"]]
    return dims[0] % rank if len(dims) == 1 and isinstance(dims[0], int) else None


def _uncast(node: fx.Node, reader: fx.Node, grammar: Grammar) -> tuple[fx.Node, list[fx.Node]]:
    """``node`` as ``reader`` sees it before its casts, and what was passed on the way."""
    seen = []
    while True:
        seen.append(node)
        node = grammar.current(node, reader)
        seen.append(node)
        op = dialect.view(node)
        if op is None or op.name not in CASTS or not isinstance(op["x"], fx.Node):
            return node, seen
        if not dialect.value(node).dtype.is_floating_point:
            return node, seen
        reader, node = node, op["x"]


def _can_wait(lse: fx.Node, output: fx.Node, grammar: Grammar) -> bool:
    """Whether everything between ``lse`` and ``output`` that depends on it may run after both."""
    late, node = {lse}, lse.next
    while node.op != "root" and node is not output:
        written = dialect.written(node)
        if node.is_impure() and not written:
            return False  # a change of mode (autocast, gradients) must not be crossed
        if late & set(node.all_input_nodes):
            if written or not _same_inputs(node, output, grammar):
                return False
            late.add(node)
        node = node.next
    return not late & set(output.all_input_nodes)


def _same_inputs(node: fx.Node, output: fx.Node, grammar: Grammar) -> bool:
    version = grammar.lifter.mutations.version
    return all(version(each, node) == version(each, output) for each in node.all_input_nodes)
