"""nsa::selection_scale: 1 for every chosen block, with the gradient of the block's importance.

The straight-through estimator of ``sel_scale`` (a + stop_gradient(1 - a) for the importance a): the
forward pass is as if it were not there, and in the backward one the compressed keys, hence the
network that makes them, learn which blocks were worth choosing. ``reference.py`` has the formula.

``lse`` is what nsa::compressed_attention returned for the same queries, compressed keys and mask;
part of the gradient goes through it. The result has the shape of ``block_indices``, flat as
nsa::select_blocks returns it, and the dtype of ``lse``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nsa_compile.kernels import geometry
from nsa_compile.kernels.autocast import register_autocast
from nsa_compile.kernels.autograd import once_differentiable
from nsa_compile.kernels.compressed.site import Site
from nsa_compile.kernels.importance import gradient
from nsa_compile.kernels.layout import empty_token_major, token_major

_SITE = (
    "Tensor? valid, Tensor? ranges, float scale, bool causal, SymInt offset, int compress_block, "
    "int compress_stride, SymInt kv_len, int query_tile, int block, int init_blocks, "
    "int local_window, str importance"
)
_INPUTS = "Tensor q, Tensor k_cmp, Tensor lse, Tensor block_indices"
_lib = torch.library.Library("nsa", "FRAGMENT")
_lib.define(f"selection_scale({_INPUTS}, {_SITE}) -> Tensor")
_lib.define(
    f"selection_scale_backward(Tensor grad, {_INPUTS}, {_SITE}) "
    "-> (Tensor dq, Tensor dk_cmp, Tensor dlse)"
)
# Fields of the compressed branch's site among the arguments behind block_indices.
_SITE_FIELDS = 8


def _ones(q: Tensor, k_cmp: Tensor, lse: Tensor, block_indices: Tensor, *args: Any) -> Tensor:
    return lse.new_ones(block_indices.shape)


def _backward_kernel(
    grad: Tensor, q: Tensor, k_cmp: Tensor, lse: Tensor, block_indices: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    site, choice = Site(*args[:_SITE_FIELDS]), gradient.Choice(*args[_SITE_FIELDS:])
    tiles = geometry.num_tiles(q.shape[2], choice.query_tile)
    slots = block_indices.shape[2] // max(1, tiles)
    grad, blocks = (x.reshape(*x.shape[:2], tiles, slots) for x in (grad, block_indices))
    dq, dk_cmp, dlse = gradient.backward(grad, q, k_cmp, lse, blocks, site, choice)
    return token_major(dq), dk_cmp.contiguous(), dlse.contiguous()


_lib.impl("selection_scale", _ones, "CompositeExplicitAutograd")
_lib.impl("selection_scale_backward", _backward_kernel, "CPU")
_lib.impl("selection_scale_backward", _backward_kernel, "CUDA")


@torch.library.register_fake("nsa::selection_scale", lib=_lib)
def _fake(q: Tensor, k_cmp: Tensor, lse: Tensor, block_indices: Tensor, *args: Any) -> Tensor:
    return lse.new_empty(block_indices.shape)


@torch.library.register_fake("nsa::selection_scale_backward", lib=_lib)
def _backward_fake(
    grad: Tensor, q: Tensor, k_cmp: Tensor, lse: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dq = empty_token_major(q, *q.shape)
    return dq, k_cmp.new_empty(k_cmp.shape), lse.new_empty(lse.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k_cmp, lse, block_indices, valid, ranges, *ctx.sizes = inputs
    ctx.save_for_backward(q, k_cmp, lse, block_indices, valid, ranges)


def _autograd(ctx: Any, grad: Tensor) -> Any:
    grads = torch.ops.nsa.selection_scale_backward(grad, *ctx.saved_tensors, *ctx.sizes)
    return *grads, *(None,) * (3 + len(ctx.sizes))


torch.library.register_autograd(
    "nsa::selection_scale", _autograd, setup_context=_setup_context, lib=_lib
)
once_differentiable(_lib, "selection_scale_backward")
register_autocast(_lib, "selection_scale", "q", "k_cmp")


@register_flop_formula(torch.ops.nsa.selection_scale)
def _flops(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 0


@register_flop_formula(torch.ops.nsa.selection_scale_backward)
def _backward_flops(
    grad_shape: Any, q_shape: Any, k_shape: Any, lse_shape: Any, blocks_shape: Any, *args: Any,
    out_shape: Any = None, **kwargs: Any,
) -> int:  # fmt: skip
    """Three matmuls over the compressed keys that the chosen blocks touch."""
    compress_block, stride, _, query_tile, block, *_ = args[5:]
    tiles = geometry.num_tiles(q_shape[2], query_tile)
    slots = blocks_shape[2] // max(1, tiles)
    touched = slots * (max(1, block // stride) + compress_block // stride)
    return int(6 * q_shape[0] * q_shape[1] * q_shape[2] * touched * q_shape[3])
