"""Assemble attention sites: roots laid out, masks proven and origins named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from nsa_compile.passes import dialect
from nsa_compile.passes.masks import Geometry, Prover
from nsa_compile.passes.masks.affine import Var
from nsa_compile.passes.masks.prove import Proof
from nsa_compile.passes.masks.sizes import Size
from nsa_compile.passes.match import axes, layout, modifiers, origin
from nsa_compile.passes.match.layout import Layout, Operand
from nsa_compile.passes.match.normalisers import NAMES as SOFTMAXES
from nsa_compile.passes.match.roots import Root, Unparsed, find_roots
from nsa_compile.passes.reasons import Reason, Refusal
from nsa_compile.passes.site import AttentionSite, Mask


def find_sites(
    gm: fx.GraphModule, *, values: Mapping[fx.Node, torch.Tensor] | None = None
) -> list[AttentionSite]:
    """Every attention of ``gm`` in graph order; the graph is only read.

    Args:
        values: real tensors of placeholders and attributes that are buffers or constants. A mask
            proof may read them; it then names them in ``Mask.buffers``.

    Returns:
        One site an attention, also where it cannot be converted: then ``mask`` is the refusal.
    """
    if not any(part in name for name in _names(gm.graph) for part in ("attention", *SOFTMAXES)):
        return []
    prover = Prover(gm, values or {})
    ordinals: dict[str, int] = {}
    sites = []
    for root in find_roots(gm.graph, prover.lifter):
        site = _site(root, prover)
        site.ordinal = ordinals.get(site.module, 0)
        ordinals[site.module] = site.ordinal + 1
        sites.append(site)
    return sites


def _names(graph: fx.Graph) -> set[str]:
    return {dialect.name(node) for node in graph.nodes if node.op.startswith("call")}


def _site(root: Root | Unparsed, prover: Prover) -> AttentionSite:
    if isinstance(root, Unparsed):
        return _kept(root, root.refusal)
    laid_out = layout.resolve(root, prover.lifter)
    if isinstance(laid_out, Refusal):
        given = (root.query.node, root.key.node, root.value.node)
        return _kept(
            Unparsed(root.output, root.refusal or laid_out, root.spelling, *given, root.mask)
        )
    return _laid_out(root, laid_out, prover)


def _laid_out(root: Root, laid_out: Layout, prover: Prover) -> AttentionSite:
    geometry = laid_out.geometry
    mask: Mask | Refusal | None = root.refusal or _decode(geometry)
    found = (
        modifiers.read(root, laid_out, prover)
        if mask is None
        else modifiers.Found(scale=root.scale)
    )
    mask = mask or found.refusal
    changes = found.modifiers
    if mask is None:
        proof = _prove(root, geometry, found, prover, laid_out.dtype)
        mask, changes = proof.mask, modifiers.biased(found.modifiers, proof)
    module, module_class = origin.module(root.output)
    q, k, v = laid_out.query, laid_out.key, laid_out.value
    return AttentionSite(
        output=root.output,
        query=q.node,
        key=k.node,
        value=v.node,
        scale=found.scale,
        dropout=root.dropout,
        mask_node=root.mask,
        mask=mask,
        spelling=root.output.meta.get("nsa_spelling", root.spelling),
        module=module,
        module_class=module_class,
        source=origin.source(root.output),
        ordinal=0,
        q_heads=_static(geometry.q_heads),
        kv_heads=_product(laid_out.kv_heads),
        head_dim=_product(axes.axes((root.channel,))),
        value_dim=_product(axes.axes((root.value_channel,))),
        batch=_extent(laid_out, laid_out.roles.batch),
        q_len=_extent(laid_out, laid_out.roles.rows),
        kv_len=_extent(laid_out, axes.axes((root.key_at,))),
        dtype=laid_out.dtype,
        modifiers=changes,
        query_steps=q.steps + found.query_steps,
        key_steps=k.steps,
        value_steps=v.steps,
        output_steps=laid_out.output_steps,
        lse=None if root.lse is None else root.lse.node,
        lse_steps=laid_out.lse_steps,
    )


def _prove(
    root: Root, geometry: Geometry, found: modifiers.Found, prover: Prover, dtype: torch.dtype
) -> Proof:
    if not isinstance(root.is_causal, bool):
        unknown = f"is_causal={root.is_causal} is no constant"
        return Proof(Refusal(Reason.MASK_NOT_UNDERSTOOD, unknown))
    proof = prover.proof(geometry, found.terms, root.is_causal, root.output, dtype)
    if proof.alibi is not None and (found.modifiers.sinks or root.lse) is not None:
        # A bias is known up to one number a row, which a sink or a log-sum-exp would notice.
        beside = "sinks" if root.lse is None else "a log-sum-exp that the model reads"
        return Proof(Refusal(Reason.MODIFIER_NOT_SUPPORTED, f"ALiBi beside {beside}"))
    return proof


def _decode(geometry: Geometry) -> Refusal | None:
    if geometry.q_len == 1 and geometry.kv_len != 1:
        return Refusal(Reason.DECODE_STEP, f"q_len is 1 and kv_len is {geometry.kv_len}")
    return None


def _kept(root: Unparsed, refusal: Refusal | None = None) -> AttentionSite:
    """A site of which only shapes are told."""
    module, module_class = origin.module(root.output)
    nodes = [each if each is not None else root.output for each in (root.query, root.key)]
    q, k = (_four(node) for node in nodes)
    v = _four(root.value) if root.value is not None else k
    return AttentionSite(
        output=root.output,
        query=nodes[0],
        key=nodes[1],
        value=root.value if root.value is not None else nodes[1],
        scale=1.0,
        dropout=0.0,
        mask_node=root.mask,
        mask=refusal or root.refusal,
        spelling=root.output.meta.get("nsa_spelling", root.spelling),
        module=module,
        module_class=module_class,
        source=origin.source(root.output),
        ordinal=0,
        q_heads=_static(q[1]),
        kv_heads=_static(k[1]),
        head_dim=_static(q[3]),
        value_dim=_static(v[3]),
        batch=q[0],
        q_len=q[2],
        kv_len=k[2],
        dtype=_dtype(nodes[0]),
    )


def _four(node: fx.Node) -> tuple[Any, ...]:
    """``[..., H, T, D]`` as ``[B, H, T, D]`` for reports of shapes that are not converted."""
    fake = dialect.value(node)
    shape = tuple(fake.shape) if isinstance(fake, torch.Tensor) else ()
    return ((1,) * 4 + shape)[-4:] if len(shape) <= 4 else (shape[0], *shape[-3:])


def _extent(laid_out: Layout, vars_: Any) -> Any:
    """How many elements ``vars_`` run over: an int, or a SymInt as some operand has it."""
    result: Any = 1
    for var in vars_:
        constant = var.size.constant
        result = result * (_symbol(laid_out, var) if constant is None else constant)
    return result


def _symbol(laid_out: Layout, var: Var) -> Any:
    for operand in (laid_out.query, laid_out.key, laid_out.value):
        found = _dimension(operand, var)
        if found is not None:
            return found
    return 0


def _dimension(operand: Operand, var: Var) -> Any:
    fake = dialect.value(operand.node)
    for size, at in zip(fake.shape, operand.at, strict=True):
        if at.terms.get(var) == 1 and len(at.terms) == 1:
            return size
        if var in at.terms and at.terms[var] == max(at.terms.values()):
            return size // at.terms[var]
    return None


def _product(vars_: Any) -> int:
    extent = axes.extent(vars_)
    return 0 if extent is None or extent.constant is None else extent.constant


def _static(size: Size) -> int:
    return size if isinstance(size, int) else 0


def _dtype(node: fx.Node) -> torch.dtype:
    fake = dialect.value(node)
    return fake.dtype if isinstance(fake, torch.Tensor) else torch.float32
