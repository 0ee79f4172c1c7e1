"""nsa::sliding_window_attention: softmax attention over the keys of a window."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nsa_compile.kernels.attend.op import _backward_fake, _fake
from nsa_compile.kernels.autocast import register_autocast
from nsa_compile.kernels.autograd import differentiable_attention
from nsa_compile.kernels.window.table import window_blocks

_SITE = "Tensor? valid, Tensor? ranges, float scale, bool causal, SymInt offset, int window"
_lib = torch.library.Library("nsa", "FRAGMENT")
_lib.define(
    f"sliding_window_attention(Tensor q, Tensor k, Tensor v, {_SITE}) -> (Tensor out, Tensor lse)"
)
_lib.define(
    "sliding_window_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, "
    f"Tensor v, Tensor out, Tensor lse, {_SITE}) -> (Tensor dq, Tensor dk, Tensor dv)"
)
torch.library.register_fake("nsa::sliding_window_attention", _fake, lib=_lib)
torch.library.register_fake("nsa::sliding_window_attention_backward", _backward_fake, lib=_lib)


def _forward(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    blocks, site = window_blocks(q, k, *args)
    out, lse = torch.ops.nsa.selected_attention(q, k, v, blocks, *site.arguments, 0)
    return out, lse


def _backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
    lse: Tensor, *args: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    blocks, site = window_blocks(q, k, *args)
    saved = (grad_out, grad_lse, q, k, v, out, lse)
    grads = torch.ops.nsa.selected_attention_backward(*saved, blocks, *site.arguments, 0)
    dq, dk, dv = grads
    return dq, dk, dv


for _device in ("CPU", "CUDA"):
    _lib.impl("sliding_window_attention", _forward, _device)
    _lib.impl("sliding_window_attention_backward", _backward, _device)


differentiable_attention(_lib, "sliding_window_attention", 2)
register_autocast(_lib, "sliding_window_attention", "q", "k", "v")


def keys_in_window(kv_len: int, causal: bool, window: int) -> int:
    """Keys that a query sees at most."""
    return min(int(kv_len), window if causal else 2 * window - 1)


@register_flop_formula(torch.ops.nsa.sliding_window_attention)
def _flops(
    q_shape: Any, k_shape: Any, v_shape: Any, valid: Any, ranges: Any, scale: float, causal: bool,
    offset: int, window: int, *, out_shape: Any = None,
) -> int:  # fmt: skip
    """Two matmuls over the keys of the window."""
    keys = keys_in_window(k_shape[2], causal, window)
    batch, heads, q_len, dim = q_shape
    return 2 * batch * heads * q_len * keys * (dim + v_shape[3])


@register_flop_formula(torch.ops.nsa.sliding_window_attention_backward)
def _backward_flops(
    grad_out_shape: Any, grad_lse_shape: Any, q_shape: Any, k_shape: Any, v_shape: Any, out: Any,
    lse: Any, valid: Any, ranges: Any, scale: float, causal: bool, offset: int, window: int, *,
    out_shape: Any = None,
) -> int:  # fmt: skip
    """Five matmuls: the logits again, dP and dV over Dv, dQ and dK over D."""
    keys = keys_in_window(k_shape[2], causal, window)
    batch, heads, q_len, dim = q_shape
    return 2 * batch * heads * q_len * keys * (3 * dim + 2 * v_shape[3])
