"""nsa::compressed_attention: softmax attention over the compressed blocks complete at the query."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nsa_compile.kernels.autocast import register_autocast
from nsa_compile.kernels.autograd import differentiable_attention
from nsa_compile.kernels.compressed import cpu
from nsa_compile.kernels.compressed.site import Site
from nsa_compile.kernels.launchers import launchers
from nsa_compile.kernels.layout import empty_token_major, token_major
from nsa_compile.kernels.precision import accumulator, check_dtypes

# The fields of Site. ``kv_len`` tells how many of the rows of k_cmp are blocks when some are spare
# (see nsa::compress) and no ``valid`` does.
_SITE = (
    "Tensor? valid, Tensor? ranges, float scale, bool causal, SymInt offset, "
    "int compress_block, int compress_stride, SymInt? kv_len=None"
)
_lib = torch.library.Library("nsa", "FRAGMENT")
_lib.define(
    f"compressed_attention(Tensor q, Tensor k_cmp, Tensor v_cmp, {_SITE}) "
    "-> (Tensor out, Tensor lse)"
)
_lib.define(
    "compressed_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k_cmp, "
    f"Tensor v_cmp, Tensor out, Tensor lse, {_SITE}) -> (Tensor dq, Tensor dk_cmp, Tensor dv_cmp)"
)


@torch.library.register_fake("nsa::compressed_attention", lib=_lib)
def _fake(q: Tensor, k_cmp: Tensor, v_cmp: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    check_dtypes(q=q, k_cmp=k_cmp, v_cmp=v_cmp)
    batch, heads, q_len, _ = q.shape
    out = empty_token_major(q, batch, heads, q_len, v_cmp.shape[3])
    return out, q.new_empty((batch, heads, q_len), dtype=accumulator(q.dtype))


@torch.library.register_fake("nsa::compressed_attention_backward", lib=_lib)
def _backward_fake(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k_cmp: Tensor, v_cmp: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dq = empty_token_major(q, *q.shape)
    return dq, k_cmp.new_empty(k_cmp.shape), v_cmp.new_empty(v_cmp.shape)


def _forward(implementation: Any) -> Any:
    """The op's kernel around ``implementation``; without any block there is nothing to compute."""

    def kernel(q: Tensor, k_cmp: Tensor, v_cmp: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        check_dtypes(q=q, k_cmp=k_cmp, v_cmp=v_cmp)
        site = Site(*args)
        count = site.count(k_cmp.shape[2])
        if count == 0 or q.numel() == 0:
            out = empty_token_major(q, *q.shape[:3], v_cmp.shape[3]).zero_()
            lse = q.new_full(q.shape[:3], -torch.inf, dtype=accumulator(q.dtype))
            return out, lse
        out, lse = implementation().forward(q, k_cmp, v_cmp, count, site)
        return token_major(out), lse.contiguous()

    return kernel


def _backward(implementation: Any) -> Any:
    def kernel(
        grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k_cmp: Tensor, v_cmp: Tensor,
        out: Tensor, lse: Tensor, *args: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        site = Site(*args)
        count = site.count(k_cmp.shape[2])
        if count == 0 or q.numel() == 0:
            dq = empty_token_major(q, *q.shape).zero_()
            return dq, k_cmp.new_zeros(k_cmp.shape), v_cmp.new_zeros(v_cmp.shape)
        dq, dk, dv = implementation().backward(
            grad_out, grad_lse, q, k_cmp, v_cmp, out, lse, count, site
        )
        return token_major(dq), dk.contiguous(), dv.contiguous()

    return kernel


_lib.impl("compressed_attention", _forward(lambda: cpu), "CPU")
_lib.impl("compressed_attention", _forward(lambda: launchers("compressed")), "CUDA")
_lib.impl("compressed_attention_backward", _backward(lambda: cpu), "CPU")
_lib.impl("compressed_attention_backward", _backward(lambda: launchers("compressed")), "CUDA")


differentiable_attention(_lib, "compressed_attention", 2)
register_autocast(_lib, "compressed_attention", "q", "k_cmp", "v_cmp")


@register_flop_formula(torch.ops.nsa.compressed_attention)
def _flops(
    q_shape: Any, k_shape: Any, v_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """Two matmuls over all compressed blocks, as dense attention is counted."""
    batch, heads, q_len, dim = q_shape
    return 2 * batch * heads * q_len * k_shape[2] * (dim + v_shape[3])


@register_flop_formula(torch.ops.nsa.compressed_attention_backward)
def _backward_flops(
    grad_out_shape: Any, grad_lse_shape: Any, q_shape: Any, k_shape: Any, v_shape: Any, *args: Any,
    out_shape: Any = None, **kwargs: Any,
) -> int:  # fmt: skip
    """Five matmuls: the logits again, dP and dV over Dv, dQ and dK over D."""
    batch, heads, q_len, dim = q_shape
    return 2 * batch * heads * q_len * k_shape[2] * (3 * dim + 2 * v_shape[3])
