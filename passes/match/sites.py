"""Assemble attention sites: roots with heads undone, mask proven and origin named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from nsa_compile.passes import dialect
from nsa_compile.passes.masks import Geometry, Prover
from nsa_compile.passes.masks.sizes import Size
from nsa_compile.passes.match import heads, origin
from nsa_compile.passes.match.roots import Root, find_roots
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
    prover = Prover(gm, values or {})
    ordinals: dict[str, int] = {}
    sites = []
    for root in find_roots(gm.graph):
        path, cls = origin.module(root.output)
        ordinal = ordinals.get(path, 0)
        ordinals[path] = ordinal + 1
        sites.append(_site(root, prover, path, cls, ordinal))
    return sites


def _site(root: Root, prover: Prover, path: str, cls: str, ordinal: int) -> AttentionSite:
    key, value = root.key, root.value
    refusal = _wrong_shape(root)
    if refusal is None:
        key, value = heads.undo(key, value, root.output, prover.lifter)
    q, k, v = (_four(dialect.shape(n)) for n in (root.query, key, value))
    geometry = Geometry(q[0], q[1], q[2], k[2])
    mask = refusal or _decode(geometry) or _prove(root, geometry, prover)
    return AttentionSite(
        output=root.output,
        query=root.query,
        key=key,
        value=value,
        scale=root.scale,
        dropout=root.dropout,
        mask_node=root.mask,
        mask=mask,
        spelling=root.spelling,
        module=path,
        module_class=cls,
        source=origin.source(root.output),
        ordinal=ordinal,
        q_heads=_static(q[1]),
        kv_heads=_static(k[1]),
        head_dim=_static(q[3]),
        value_dim=_static(v[3]),
        batch=_size(root.query, 0, q),
        q_len=_size(root.query, -2, q),
        kv_len=_size(key, -2, k),
        dtype=_dtype(root.output),
    )


def _prove(root: Root, geometry: Geometry, prover: Prover) -> Mask | Refusal:
    if not isinstance(root.is_causal, bool):
        return Refusal(Reason.MASK_NOT_UNDERSTOOD, f"is_causal={root.is_causal} is no constant")
    return prover.prove(geometry, root.mask, root.is_causal, root.output)


def _decode(geometry: Geometry) -> Refusal | None:
    if geometry.q_len == 1 and geometry.kv_len != 1:
        return Refusal(Reason.DECODE_STEP, f"q_len is 1 and kv_len is {geometry.kv_len}")
    return None


def _wrong_shape(root: Root) -> Refusal | None:
    """Why the operators do not take these tensors, None when they do."""
    shapes = []
    for name, node in (("q", root.query), ("k", root.key), ("v", root.value)):
        shape = dialect.shape(node) if isinstance(node, fx.Node) else None
        if shape is None:
            return Refusal(Reason.UNSUPPORTED_SHAPE, f"{name} has no recorded shape")
        if len(shape) != 4:
            return Refusal(Reason.UNSUPPORTED_SHAPE, f"{name} is {_shown(shape)}, not 4-d")
        if not isinstance(shape[1], int) or not isinstance(shape[3], int):
            return Refusal(
                Reason.UNSUPPORTED_SHAPE,
                f"{name} is {_shown(shape)}: heads and head width must be constants",
            )
        shapes.append(shape)
    return _disagreement(*shapes)


def _disagreement(q: tuple[Size, ...], k: tuple[Size, ...], v: tuple[Size, ...]) -> Refusal | None:
    shown = f"q {_shown(q)}, k {_shown(k)}, v {_shown(v)}"
    if not q[0] == k[0] == v[0]:
        return Refusal(Reason.UNSUPPORTED_SHAPE, f"batches differ: {shown}")
    if k[1] != v[1] or q[3] != k[3] or k[2] != v[2]:
        return Refusal(Reason.UNSUPPORTED_SHAPE, f"q, k and v do not fit together: {shown}")
    assert isinstance(q[1], int)
    assert isinstance(k[1], int)
    if k[1] < 1 or q[1] % k[1]:
        return Refusal(Reason.UNSUPPORTED_SHAPE, f"query heads are no multiple of k heads: {shown}")
    return None


def _shown(shape: tuple[Size, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def _four(shape: tuple[Size, ...] | None) -> tuple[Size, ...]:
    """``[..., H, T, D]`` as ``[B, H, T, D]`` for reports of shapes that are not converted."""
    shape = shape or ()
    return ((1,) * 4 + shape)[-4:] if len(shape) <= 4 else (shape[0], *shape[-3:])


def _static(size: Size) -> int:
    return size if isinstance(size, int) else 0


def _size(node: fx.Node, dim: int, shape: tuple[Size, ...]) -> Any:
    """The size as the graph has it: an int or a SymInt."""
    fake = dialect.value(node)
    if isinstance(fake, torch.Tensor) and fake.dim() == 4:
        return fake.shape[dim]
    position = dim % 4
    return shape[position] if isinstance(shape[position], int) else 0


def _dtype(node: fx.Node) -> torch.dtype:
    fake = dialect.value(node)
    return fake.dtype if isinstance(fake, torch.Tensor) else torch.float32
