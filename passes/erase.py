"""Erase what only fed a replaced attention: the mask's program, repeated heads, in-place scores."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from nsa_compile.passes import dialect
from nsa_compile.passes.masks.mutation import base

# Results of these are memory that nothing else shares, so only what reads them sees a write.
_NEW_MEMORY = {
    "matmul", "baddbmm", "addmm", "linear", "softmax", "add", "sub", "rsub", "mul", "div", "neg",
    "where", "masked_fill", "tril", "triu", "clone", "arange", "full", "ones", "zeros", "new_full",
    "new_ones", "new_zeros", "full_like", "ones_like", "zeros_like", "eq", "ne", "lt", "le", "gt",
    "ge", "and", "or", "not", "logical_and", "logical_or", "logical_not",
}  # fmt: skip
# Far more nodes than stand between the product of an attention's scores and its softmax.
_MOST = 64


def erase_unused(graph: fx.Graph, candidates: Iterable[fx.Node]) -> None:
    """Erase ``candidates`` whose results nothing sees any more, and then their inputs likewise.

    Skips placeholders and impure nodes: those have effects without users. A node that writes in
    place goes too if nothing but nodes that go sees the memory that it writes to.
    """
    pending = list(candidates)
    while pending:
        node = pending.pop()
        if node.graph is not graph or node._erased:
            continue
        for each in reversed(_unseen(node)):
            pending += each.all_input_nodes
            graph.erase_node(each)


def _unseen(node: fx.Node) -> list[fx.Node]:
    """``node`` and all that follows from it, in order, if nothing of it is seen; else nothing."""
    written = dialect.written(node)
    if not written and not node.users:
        return [node] if _is_pure(node) else []
    first = base(written[0]) if written else base(node)
    if not _is_new(first):
        return []
    found = {first: None}
    pending = [first]
    while pending:
        for user in pending.pop().users:
            if user not in found:
                found[user] = None
                pending.append(user)
        if len(found) > _MOST:
            return []
    if all(_computes(each) or _writes_within(each, found) for each in found):
        return sorted(found)
    return []


def _computes(node: fx.Node) -> bool:
    """Whether ``node`` is known to do nothing but compute its result."""
    return _is_pure(node) and dialect.view(node) is not None


def _writes_within(node: fx.Node, region: dict[fx.Node, None]) -> bool:
    """Whether all that ``node`` does is to write to memory that was made in ``region``."""
    written = dialect.written(node)
    if not written or node.op not in ("call_method", "call_function"):
        return False
    sources = [base(target) for target in written]
    return all(source in region and _is_new(source) for source in sources)


def _is_new(node: fx.Node) -> bool:
    op = dialect.view(node)
    return op is not None and not op.inplace and op.name in _NEW_MEMORY and not _has_out(node)


def _has_out(node: fx.Node) -> bool:
    return node.kwargs.get("out") is not None


def _is_pure(node: fx.Node) -> bool:
    if node.op == "get_attr":
        return True
    if node.op not in ("call_method", "call_function"):
        return False
    return not node.is_impure() and not dialect.written(node)
