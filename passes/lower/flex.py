"""flex_attention spelled out: scores, score_mod and mask_mod over index tensors, softmax, values.

The result is never run as it is: it is converted, or the call stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import fx

from nsa_compile.passes import dialect
from nsa_compile.passes.emit import Caller
from nsa_compile.passes.lower.blocks import is_given
from nsa_compile.passes.lower.calls import Unsupported
from nsa_compile.passes.reasons import Reason, Refusal


def flex(node: fx.Node, call: Caller) -> dict[int, fx.Node]:
    """``flex_attention`` as Dynamo calls it: output 0 is the result ``[B, Hq, Tq, Dv]``."""
    q, k, v, score_mod, block_mask, scale = node.args[:6]
    score_buffers, mask_buffers = (*node.args[7:9], (), ())[:2]
    k, v = (_repeated(x, q, call) for x in (k, v))
    positions = _positions(node, q, k, call)
    scores = call(torch.mul, call(torch.matmul, q, call("transpose", k, -2, -1)), scale)
    scores = _inlined(node, score_mod, (scores, *positions), score_buffers, call)
    keep = _inlined(node, block_mask[-1], positions, mask_buffers, call)
    _check_blocks(node, block_mask, keep)
    if dialect.shape(keep) != ():
        scores = call(torch.where, keep, scores, float("-inf"))
    weights = call(torch.softmax, scores, -1)
    return {0: call(torch.matmul, weights, v)}


def _repeated(x: Any, q: Any, call: Caller) -> fx.Node:
    """Keys or values with the heads of the queries (``enable_gqa``)."""
    heads, own = (dialect.shape(each)[1] for each in (q, x))  # type: ignore[index]
    if heads == own:
        node: fx.Node = x
        return node
    if not isinstance(heads, int) or not isinstance(own, int):
        _refuse(x, "its number of heads is no constant")
    return call("repeat_interleave", x, heads // own, 1)


def _positions(node: fx.Node, q: Any, k: Any, call: Caller) -> tuple[fx.Node, ...]:
    """The indices b, h, i, j, each along its dimension of ``[B, H, Tq, Tk]``."""
    device = dialect.value(q).device
    found = []
    for dim, (of, size) in enumerate(((q, 0), (q, 1), (q, 2), (k, 2))):
        extent = dialect.shape(of)[size]  # type: ignore[index]
        length = extent if isinstance(extent, int) else call("size", of, size)
        shape = [1, 1, 1, 1]
        shape[dim] = -1
        found.append(call("view", call(torch.arange, length, device=device), *shape))
    return tuple(found)


def _inlined(
    node: fx.Node, body: Any, inputs: Sequence[fx.Node], buffers: Any, call: Caller
) -> fx.Node:
    """The result of a mod's program, which is written for one score, on all of them at once."""
    module = getattr(call.owner, str(body.target), None) if isinstance(body, fx.Node) else None
    if not isinstance(module, fx.GraphModule):
        _refuse(node, "a mod whose program is not in the graph")
    known: dict[fx.Node, Any] = {}
    given = iter((*inputs, *buffers))
    for each in module.graph.nodes:
        if each.op == "placeholder":
            known[each] = next(given)
        elif each.op == "output":
            result = fx.map_arg(each.args[0], known.__getitem__)
            found = result[0] if isinstance(result, (tuple, list)) else result
            if isinstance(found, fx.Node):
                return found
        elif each.op in ("call_function", "call_method") and dialect.shape(each) == ():
            args, kwargs = fx.map_arg((each.args, dict(each.kwargs)), known.__getitem__)
            known[each] = call(each.target, *args, **kwargs)
        else:
            break
    _refuse(node, "a mod that is no arithmetic of one score and its position")


def _check_blocks(node: fx.Node, block_mask: Sequence[Any], keep: fx.Node) -> None:
    """A BlockMask without mask_mod hides blocks all the same."""
    if is_given(block_mask) and dialect.shape(keep) == ():
        why = f"node {dialect.describe(node)}: a BlockMask without mask_mod"
        raise Unsupported(Refusal(Reason.MASK_FROM_OUTSIDE, why))


def _refuse(node: fx.Node, why: str) -> NoReturn:
    refusal = Refusal(Reason.MODIFIER_NOT_SUPPORTED, f"node {dialect.describe(node)}: {why}")
    raise Unsupported(refusal)
