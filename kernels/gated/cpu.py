"""The gated sum of operators' results, and its backward: a branch's own backward, and a sum."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from nsa_compile.kernels.combine import cpu as combining
from nsa_compile.kernels.gated.site import Site

if TYPE_CHECKING:
    from nsa_compile.kernels.gated.op import Saved


class Found(NamedTuple):
    """Gradients: of k_cmp and v_cmp, or of the compressed branch; of the selected one if given."""

    dgates: Tensor
    dqkv: tuple[Tensor, Tensor, Tensor]
    dk_cmp: Tensor | None
    dv_cmp: Tensor | None
    dcompressed: Tensor | None
    dselected: Tensor | None


def forward(
    gates: Tensor, q: Tensor, k: Tensor, v: Tensor, compressed: Tensor, selected: Tensor,
    site: Site, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The sum; then the window's out and lse, without elements unless they are kept."""
    window, lse = torch.ops.nsa.sliding_window_attention(q, k, v, *site.windowed)
    out = torch.ops.nsa.combine(gates, compressed, selected, window)
    if keep:
        return out, window, lse
    return out, window.new_empty(0), lse.new_empty(0)


def backward(grad_out: Tensor, saved: Saved, site: Site) -> Found:
    ops, qkv = torch.ops.nsa, (saved.q, saved.k, saved.v)
    branches = (saved.compressed, saved.selected, saved.window)
    dgates, dcompressed, dselected, dwindow = combining.combine_backward(
        grad_out, saved.gates, *branches
    )
    dq, dk, dv = ops.sliding_window_attention_backward(
        dwindow, None, *qkv, saved.window, saved.window_lse, *site.windowed
    )
    if saved.blocks is not None:
        own = (saved.selected, saved.selected_lse, saved.blocks, *site.selected.arguments, 0)
        parts = ops.selected_attention_backward(dselected, None, *qkv, *own)
        for gradient, part in zip((dq, dk, dv), parts, strict=True):
            gradient += part
        dselected = None
    if saved.k_cmp is None:
        return Found(dgates, (dq, dk, dv), None, None, dcompressed, dselected)
    part, dk_cmp, dv_cmp = ops.compressed_attention_backward(
        dcompressed, None, saved.q, saved.k_cmp, saved.v_cmp, saved.compressed,
        saved.compressed_lse, *site.compressed(saved.k.shape[2]),
    )  # fmt: skip
    dq += part
    return Found(dgates, (dq, dk, dv), dk_cmp, dv_cmp, None, dselected)
