"""nsa::scaled_attention: nsa::selected_attention whose chosen blocks have scales with a gradient.

``sel_scale``, in the shape of ``block_indices``, multiplies the logits of its tile and block. It
must be 1: it is there for its gradient, which nsa::selection_scale hands on to the scores. That it
is 1 is checked, on the GPU by an assertion that does not wait.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nsa_compile.kernels import geometry
from nsa_compile.kernels.attend.site import Site
from nsa_compile.kernels.autocast import register_autocast
from nsa_compile.kernels.autograd import once_differentiable
from nsa_compile.kernels.launchers import launchers
from nsa_compile.kernels.layout import empty_token_major
from nsa_compile.kernels.precision import accumulator
from nsa_compile.kernels.scaled import cpu

_SITE = (
    "Tensor? valid, Tensor? ranges, Tensor? query_segments, Tensor? key_segments, float scale, "
    "bool causal, SymInt offset, int? window, int query_tile, int block"
)
_lib = torch.library.Library("nsa", "FRAGMENT")
_lib.define(
    "scaled_attention(Tensor q, Tensor k, Tensor v, Tensor block_indices, Tensor sel_scale, "
    f"{_SITE}) -> (Tensor out, Tensor lse)"
)
_lib.define(
    "scaled_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, "
    f"Tensor out, Tensor lse, Tensor block_indices, {_SITE}) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dsel_scale)"
)
# How far from 1 a scale may be: a + (1 - a) rounds.
_ROUNDING = 1e-3


def _attention_site(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The site as nsa::selected_attention takes it: no ALiBi, no cap, never dense."""
    *tensors, scale, causal, offset, window, query_tile, block = args
    return (*tensors, None, None, scale, 0.0, causal, offset, window, query_tile, block, 0)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, sel_scale: Tensor, *args: Any
) -> tuple[Tensor, Tensor]:
    _check_ones(sel_scale)
    attention = torch.ops.nsa.selected_attention
    out, lse = attention(q, k, v, block_indices, *_attention_site(args))
    return out, lse


def _check_ones(sel_scale: Tensor) -> None:
    if sel_scale.numel() == 0:
        return
    far = (sel_scale - 1).abs().amax()
    text = "sel_scale is for its gradient alone: expected 1 everywhere"
    if sel_scale.is_cuda:
        torch._assert_async(far < _ROUNDING, text)
    elif not float(far) < _ROUNDING:
        raise ValueError(f"{text}, got values up to {float(far):.3g} away from it")


def _backward(implementation: Any) -> Any:
    def kernel(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        *saved, block_indices = args[:8]
        sizes = _attention_site(args[8:])
        grads = torch.ops.nsa.selected_attention_backward(*saved, block_indices, *sizes)
        site, q = Site(*sizes[:-1]), saved[2]
        tiles = geometry.num_tiles(q.shape[2], site.query_tile)
        slots = block_indices.shape[2] // max(1, tiles)
        blocks = block_indices.reshape(*block_indices.shape[:2], tiles, slots)
        dscale = implementation().scale_gradient(*saved, blocks, site)
        return *grads, dscale.flatten(2).contiguous()

    return kernel


_lib.impl("scaled_attention", _forward, "CompositeExplicitAutograd")
_lib.impl("scaled_attention_backward", _backward(lambda: cpu), "CPU")
_lib.impl("scaled_attention_backward", _backward(lambda: launchers("scaled")), "CUDA")


@torch.library.register_fake("nsa::scaled_attention", lib=_lib)
def _fake(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, *args: Any
) -> tuple[Tensor, Tensor]:
    out = empty_token_major(q, *q.shape[:3], v.shape[3])
    return out, q.new_empty(q.shape[:3], dtype=accumulator(q.dtype))


@torch.library.register_fake("nsa::scaled_attention_backward", lib=_lib)
def _backward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, _, q, k, v, _, _, block_indices, *_ = args
    dq, dk, dv = (empty_token_major(x, *x.shape) for x in (q, k, v))
    return dq, dk, dv, q.new_empty(block_indices.shape, dtype=accumulator(q.dtype))


# Of the arguments behind sel_scale the first are tensors or None: valid to key_segments.
_TENSORS = 4


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, block_indices, sel_scale, *rest = inputs
    terms, ctx.sizes, ctx.dtype = rest[:_TENSORS], rest[_TENSORS:], sel_scale.dtype
    ctx.save_for_backward(q, k, v, *output, block_indices, *terms)
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:
    q, k, v, out, lse, block_indices, *terms = ctx.saved_tensors
    rest = (None,) * (len(terms) + len(ctx.sizes))
    if grad_out is None and grad_lse is None:
        return None, None, None, None, None, *rest
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    dq, dk, dv, dscale = torch.ops.nsa.scaled_attention_backward(
        grad_out, grad_lse, q, k, v, out, lse, block_indices, *terms, *ctx.sizes
    )
    return dq, dk, dv, None, dscale.to(ctx.dtype), *rest


torch.library.register_autograd(
    "nsa::scaled_attention", _autograd, setup_context=_setup_context, lib=_lib
)
once_differentiable(_lib, "scaled_attention_backward")
register_autocast(_lib, "scaled_attention", "q", "k", "v")


@register_flop_formula(torch.ops.nsa.scaled_attention)
def _flops(
    q_shape: Any, k_shape: Any, v_shape: Any, blocks_shape: Any, *args: Any, out_shape: Any = None,
    **kwargs: Any,
) -> int:  # fmt: skip
    """Two matmuls over the keys of the chosen blocks."""
    return _pairs(q_shape, k_shape, blocks_shape, args) * 2 * (q_shape[3] + v_shape[3])


@register_flop_formula(torch.ops.nsa.scaled_attention_backward)
def _backward_flops(
    grad_out_shape: Any, grad_lse_shape: Any, q_shape: Any, k_shape: Any, v_shape: Any,
    out: Any, lse: Any, blocks_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any,
) -> int:  # fmt: skip
    """The attention's five matmuls, and the logits and dP once more for the scales."""
    pairs = _pairs(q_shape, k_shape, blocks_shape, args)
    return pairs * 2 * (4 * q_shape[3] + 3 * v_shape[3])


def _pairs(q_shape: Any, k_shape: Any, blocks_shape: Any, args: Any) -> int:
    query_tile, block = args[-2:]
    slots = blocks_shape[2] // max(1, geometry.num_tiles(q_shape[2], query_tile))
    return int(q_shape[0] * q_shape[1] * q_shape[2] * min(k_shape[2], slots * block))
