"""Each call that hides an attention, spelled out: projections, heads, masks, one attention."""

from __future__ import annotations

import inspect
import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from nsa_compile.passes import dialect
from nsa_compile.passes.emit import Caller
from nsa_compile.passes.reasons import Reason, Refusal

_MULTI_HEAD = inspect.signature(F.multi_head_attention_forward)
_ENCODER_LAYER = (
    "src embed_dim num_heads qkv_weight qkv_bias proj_weight proj_bias use_gelu norm_first eps "
    "norm_weight_1 norm_bias_1 norm_weight_2 norm_bias_2 ffn_weight_1 ffn_bias_1 ffn_weight_2 "
    "ffn_bias_2 mask mask_type"
).split()
_NATIVE = (
    "query key value embed_dim num_head qkv_weight qkv_bias proj_weight proj_bias mask "
    "need_weights average_attn_weights mask_type"
).split()


class Unsupported(Exception):
    """A call that is left as it is; ``refusal`` says why."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.text)
        self.refusal = refusal


def multi_head(node: fx.Node, call: Caller) -> dict[int, fx.Node]:
    """``F.multi_head_attention_forward``: q [T, B, E] or [T, E]; output 0 is the result."""
    given = _MULTI_HEAD.bind(*node.args, **node.kwargs)
    given.apply_defaults()
    a = given.arguments
    for name in ("bias_k", "bias_v", "add_zero_attn", "static_k", "static_v"):
        if a[name] is not None and a[name] is not False:
            _refuse(node, f"it is called with {name}")
    inputs = a["query"], a["key"], a["value"]
    padding = a["key_padding_mask"]
    batched = len(dialect.shape(inputs[0]) or ()) == 3
    if not batched:
        # One node for one tensor: self-attention projects it once.
        added = {x: call("unsqueeze", x, 1) for x in inputs}
        inputs = tuple(added[x] for x in inputs)
        padding = None if padding is None else call("unsqueeze", padding, 0)
    heads = a["num_heads"]
    q, k, v = (_split(x, heads, (1, 2, 0, 3), call) for x in _projected(inputs, a, call))
    hint = a["is_causal"] and padding is None and not a["need_weights"]
    mask = None if hint else _mask(a["attn_mask"], padding, heads, call)
    dropout = a["dropout_p"] if a["training"] else 0.0
    out = call(F.scaled_dot_product_attention, q, k, v, mask, dropout, bool(hint))
    out = call("flatten", call("permute", out, 2, 0, 1, 3), 2)
    out = call(F.linear, out, a["out_proj_weight"], a["out_proj_bias"])
    return {0: out if batched else call("squeeze", out, 1)}


def encoder_layer(node: fx.Node, call: Caller) -> dict[int, fx.Node]:
    """``torch._transformer_encoder_layer_fwd``: one whole layer, [B, T, E] -> [B, T, E]."""
    a = _bound(node, _ENCODER_LAYER)
    shape = (a["embed_dim"],)

    def norm(x: fx.Node, which: int) -> fx.Node:
        weights = a[f"norm_weight_{which}"], a[f"norm_bias_{which}"]
        return call(F.layer_norm, x, shape, *weights, a["eps"])

    def feed_forward(x: fx.Node) -> fx.Node:
        x = call(F.linear, x, a["ffn_weight_1"], a["ffn_bias_1"])
        x = call(F.gelu if a["use_gelu"] else F.relu, x)
        return call(F.linear, x, a["ffn_weight_2"], a["ffn_bias_2"])

    def attend(x: fx.Node) -> fx.Node:
        return _native(node, (x, x, x), a, a["num_heads"], call)

    src = a["src"]
    if a["norm_first"]:
        x = call(operator.add, src, attend(norm(src, 1)))
        return {-1: call(operator.add, x, feed_forward(norm(x, 2)))}
    x = norm(call(operator.add, src, attend(src)), 1)
    return {-1: norm(call(operator.add, x, feed_forward(x)), 2)}


def native_multi_head(node: fx.Node, call: Caller) -> dict[int, fx.Node]:
    """``torch._native_multi_head_attention``: [B, T, E]; output 0 is the result."""
    a = _bound(node, _NATIVE)
    return {0: _native(node, (a["query"], a["key"], a["value"]), a, a["num_head"], call)}


def _native(
    node: fx.Node, inputs: tuple[Any, ...], a: dict[str, Any], heads: int, call: Caller
) -> fx.Node:
    """Attention of the fused inference calls: packed projection, a mask that hides where set."""
    if any(len(dialect.shape(x) or ()) != 3 for x in inputs):
        _refuse(node, "its input is not [B, T, E]")
    packed = {"in_proj_weight": a["qkv_weight"], "in_proj_bias": a["qkv_bias"]}
    q, k, v = (_split(x, heads, (0, 2, 1, 3), call) for x in _projected(inputs, packed, call))
    mask = a.get("mask")
    if mask is not None:
        keep = call("logical_not", mask)
        if len(dialect.shape(mask) or ()) == 2 and a.get("mask_type") == 1:
            keep = call("unsqueeze", call("unsqueeze", keep, 1), 1)
        mask = keep
    out = call(F.scaled_dot_product_attention, q, k, v, mask)
    out = call("flatten", call("transpose", out, 1, 2), 2)
    return call(F.linear, out, a["proj_weight"], a["proj_bias"])


def _projected(inputs: tuple[Any, ...], a: dict[str, Any], call: Caller) -> list[fx.Node]:
    """q, k, v after the input projection: packed in one weight, or three weights."""
    bias = a["in_proj_bias"]
    if not a.get("use_separate_proj_weight") and inputs[0] is inputs[1] is inputs[2]:
        packed = call(F.linear, inputs[0], a["in_proj_weight"], bias)
        return _three(packed, call)
    if a.get("use_separate_proj_weight"):
        weights = [a["q_proj_weight"], a["k_proj_weight"], a["v_proj_weight"]]
    else:
        weights = _three(a["in_proj_weight"], call, dim=0)
    biases = [None] * 3 if bias is None else _three(bias, call)
    return [call(F.linear, *given) for given in zip(inputs, weights, biases, strict=True)]


def _three(packed: fx.Node, call: Caller, dim: int = -1) -> list[fx.Node]:
    parts = call("chunk", packed, 3, dim)
    return [call(operator.getitem, parts, n) for n in range(3)]


def _split(x: fx.Node, heads: int, order: tuple[int, ...], call: Caller) -> fx.Node:
    """[*, *, E] -> [B, H, T, E / H]."""
    return call("permute", call("unflatten", x, 2, (heads, -1)), *order)


def _mask(mask: Any, padding: Any, heads: int, call: Caller) -> fx.Node | None:
    """One mask for SDPA of ``attn_mask`` [T, S] or [B * H, T, S] and ``key_padding_mask`` [B, S].

    In both True hides a key and a float is added; SDPA keeps where True.
    """
    terms = []
    if mask is not None:
        if len(dialect.shape(mask) or ()) == 3:
            mask = call("unflatten", mask, 0, (-1, heads))
        terms.append(mask)
    if padding is not None:
        terms.append(call("unsqueeze", call("unsqueeze", padding, 1), 1))
    if not terms:
        return None
    if all(dialect.value(term).dtype == torch.bool for term in terms):
        kept = [call("logical_not", term) for term in terms]
        return kept[0] if len(kept) == 1 else call(operator.and_, *kept)
    added = [_additive(term, terms, call) for term in terms]
    return added[0] if len(added) == 1 else call(operator.add, *added)


def _additive(term: fx.Node, terms: list[fx.Node], call: Caller) -> fx.Node:
    if dialect.value(term).dtype != torch.bool:
        return term
    dtype = next(dialect.value(t).dtype for t in terms if dialect.value(t).dtype != torch.bool)
    zeros = call(torch.zeros_like, term, dtype=dtype)
    return call("masked_fill", zeros, term, -math.inf)


def _bound(node: fx.Node, names: list[str]) -> dict[str, Any]:
    return {**dict.fromkeys(names), **dict(zip(names, node.args, strict=False)), **node.kwargs}


def _refuse(node: fx.Node, why: str) -> None:
    raise Unsupported(
        Refusal(Reason.MODIFIER_NOT_SUPPORTED, f"node {dialect.describe(node)}: {why}")
    )
