"""scaled_dot_product_attention: every argument form, any number of leading dimensions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from nsa_compile.passes import dialect
from nsa_compile.passes.dialect import Op
from nsa_compile.passes.masks import views
from nsa_compile.passes.masks.affine import floor_div
from nsa_compile.passes.masks.lift import Lifter
from nsa_compile.passes.masks.sizes import Size
from nsa_compile.passes.masks.term import Term
from nsa_compile.passes.masks.values import Stuck
from nsa_compile.passes.masks.views import Element, Index
from nsa_compile.passes.match.chains import chain
from nsa_compile.passes.match.facts import Facts
from nsa_compile.passes.match.numbers import number
from nsa_compile.passes.match.products import variables
from nsa_compile.passes.match.roots import Root, Unparsed
from nsa_compile.passes.reasons import Reason, Refusal

_SCALED = "scaled_dot_product"
_SDPA = "scaled_dot_product_attention"


def find(graph: fx.Graph, lifter: Lifter) -> Iterator[Root | Unparsed]:
    """Every call of SDPA in ``graph``."""
    facts = Facts(graph)
    for node in graph.nodes:
        if _SCALED in dialect.name(node):
            op = dialect.view(node)
            if op is not None and _SCALED in op.name and (op.name == _SDPA or facts.is_live(node)):
                root = read(node, op, lifter) if op.name == _SDPA else _inside(node, op, lifter)
                if not (isinstance(root, Root) and _pools(root, facts, lifter)):
                    yield root


def read(node: fx.Node, op: Op, lifter: Lifter, call: fx.Node | None = None) -> Root | Unparsed:
    """The attention whose result is ``node``; ``call`` computes it, where that is another node."""
    q, k, v, mask = op["query"], op["key"], op["value"], op["attn_mask"]
    unparsed = Unparsed(node, _unknown_shape(q, k, v), "sdpa", q, k, v, mask)
    shapes = [dialect.shape(each) if isinstance(each, fx.Node) else None for each in (q, k, v)]
    out = dialect.shape(node)
    query, key, value = shapes
    if query is None or key is None or value is None or out is None:
        return unparsed
    if min(len(query), len(key), len(value)) < 2:
        return unparsed
    index = variables("o", out, lifter.sizes)
    key_at, channel = variables("k", (key[-2], query[-1]), lifter.sizes)
    lead, row = index[:-2], index[-2]
    try:
        return Root(
            output=node,
            out=index,
            query=Element(q, (*_leading(query, out, lead), row, channel)),
            key=Element(k, (*_leading(key, out, lead), key_at, channel)),
            value=Element(v, (*_leading(value, out, lead), key_at, index[-1])),
            key_at=key_at,
            channel=channel,
            value_channel=index[-1],
            reader=call or node,
            scale=_scale(op["scale"], query[-1]),
            dtype=_dtype(node, q),
            spelling="sdpa",
            terms=_terms(node, mask, key[-2], (*index[:-1], key_at)),
            is_causal=op["is_causal"] or False,
            dropout=number(op["dropout_p"] or 0.0),
            mask=mask,
        )
    except Stuck:
        return unparsed


def _inside(node: fx.Node, op: Op, lifter: Lifter) -> Root | Unparsed:
    """An operator that SDPA decomposes into: output 0 is the result, others are for backward."""
    outputs = [u for u in node.users if dialect.name(u) == "getitem" and u.args[1] == 0]
    if len(outputs) != 1 or op["dropout_mask"] is not None:
        why = f"{dialect.describe(node)}: an answer that is not taken apart"
        refusal = Refusal(Reason.UNRECOGNISED_ATTENTION, why)
        return Unparsed(node, refusal, "sdpa", op["query"], op["key"], op["value"])
    root = read(outputs[0], op, lifter, call=node)
    more = next((u for u in node.users if u is not outputs[0] and u.users), None)
    if more is None or isinstance(root, Unparsed):
        return root
    escapes = f"{dialect.describe(more)} is used too"
    return replace(root, refusal=Refusal(Reason.WEIGHTS_ESCAPE, escapes))


def _pools(root: Root, facts: Facts, lifter: Lifter) -> bool:
    """Whether each position pools keys of its own with one learned query.

    Attention mixes positions. A mixture of what a position has (the outputs of several layers) has
    the positions where heads would be, and a query that is the same for all of them; heads differ.
    """
    if not facts.is_parameter(root.query.node):
        return False
    lead = {var for at in root.out[:-2] for var in at.variables()}
    heads = {var for at in root.out[1:-2] for var in at.variables()}
    learned = chain(root.query, root.reader, root.output, lifter)[-1:]
    return bool(heads and learned) and not any(
        at.variables() & lead for element in learned for at in element.at
    )


def _leading(shape: tuple[Size, ...], out: tuple[Size, ...], index: Index) -> Index:
    """The leading part of an operand's index; ``enable_gqa`` repeats its heads in a row."""
    lead, wide = shape[:-2], out[:-2]
    if not lead or lead[-1] == wide[-1] or lead[-1] == 1:
        return views.broadcast(lead, wide, index)
    heads, kv_heads = wide[-1], lead[-1]
    if not isinstance(heads, int) or not isinstance(kv_heads, int) or heads % kv_heads:
        raise Stuck("heads that do not fit")
    group = heads // kv_heads
    return (*views.broadcast(lead[:-1], wide[:-1], index[:-1]), floor_div(index[-1], group))


def _terms(node: fx.Node, mask: Any, keys: Size, index: Index) -> tuple[Term, ...]:
    if not isinstance(mask, fx.Node):
        return ()
    shape, out = dialect.shape(mask), dialect.shape(node)
    if shape is None or out is None or len(shape) > len(out):
        raise Stuck("a mask of unknown shape")
    kind = "keep" if dialect.value(mask).dtype == torch.bool else "add"
    return (Term(mask, kind, node, views.broadcast(shape, (*out[:-1], keys), index)),)


def _unknown_shape(*operands: Any) -> Refusal:
    shown = []
    for name, node in zip("qkv", operands, strict=True):
        shape = dialect.shape(node) if isinstance(node, fx.Node) else None
        shown.append(f"{name} " + ("?" if shape is None else f"[{', '.join(map(str, shape))}]"))
    return Refusal(Reason.UNSUPPORTED_SHAPE, f"operands do not fit together: {', '.join(shown)}")


def _scale(scale: Any, width: Size) -> float | fx.Node:
    """``scale``, or its default ``1 / sqrt(D)``; the node where only that knows the number."""
    if scale is None:
        return 1 / math.sqrt(width) if isinstance(width, int) and width > 0 else math.nan
    found = number(scale)
    return scale if isinstance(scale, fx.Node) and math.isnan(found) else found


def _dtype(node: fx.Node, query: fx.Node) -> torch.dtype:
    """That of the result: autocast changes it on the way in."""
    fake = dialect.value(node)
    fake = fake if isinstance(fake, torch.Tensor) else dialect.value(query)
    return fake.dtype
