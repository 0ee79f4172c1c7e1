"""Why a mask is only known at run time: it comes from outside, from activations, or neither."""

from __future__ import annotations

from torch import fx

from nsa_compile.passes import dialect
from nsa_compile.passes.masks.affine import Load, affine
from nsa_compile.passes.reasons import Reason, Refusal

# Operators that mix activations and weights: what they compute is no mask by position. Not so an
# embedding, which may be one of distances.
_OF_ACTIVATIONS = {
    "linear", "matmul", "bmm", "mm", "einsum", "baddbmm", "addmm", "addbmm", "softmax", "topk",
    "scaled_dot_product_attention", "layer_norm", "rms_norm", "conv1d", "conv2d",
}  # fmt: skip


def refusal(load: Load, otherwise: str) -> Refusal:
    """Why a mask whose element is ``load`` is not proven; ``otherwise`` where nothing is known."""
    node = dialect.describe(load.node)
    if load.node.op == "placeholder" and not load.why:
        positions = {v.name for v in affine(load).variables()}
        floating = dialect.value(load.node).dtype.is_floating_point
        if {"i", "j"} <= positions or (floating and "j" in positions):
            return Refusal(Reason.MASK_FROM_OUTSIDE, f"node {node}")
    what = f"node {node}: {load.why or otherwise}"
    return of_activations(load) or Refusal(Reason.MASK_NOT_UNDERSTOOD, what)


def of_activations(load: Load) -> Refusal | None:
    """The refusal of what is computed from activations, None for anything else."""
    maker = _maker(load.node)
    if maker is None:
        return None
    detail = f"node {dialect.describe(load.node)} depends on {dialect.describe(maker)}"
    return Refusal(Reason.DATA_DEPENDENT_MASK, detail)


def _maker(node: fx.Node) -> fx.Node | None:
    """The nearest operator on activations that ``node`` depends on."""
    seen: set[fx.Node] = set()
    queue = [node]
    for each in queue:
        if each.op.startswith("call") and _operator(each) in _OF_ACTIVATIONS:
            return each
        fresh = [n for n in each.all_input_nodes if n not in seen]
        seen.update(fresh)
        queue += fresh
    return None


def _operator(node: fx.Node) -> str:
    op = dialect.view(node)
    return dialect.name(node).removeprefix("aten.").split(".")[0] if op is None else op.name
