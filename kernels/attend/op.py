"""nsa::selected_attention: softmax attention over the blocks that each tile of queries selected."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nsa_compile.kernels import geometry
from nsa_compile.kernels.attend import cpu, dense
from nsa_compile.kernels.autograd import once_differentiable
from nsa_compile.kernels.launchers import launchers
from nsa_compile.kernels.layout import empty_token_major, token_major
from nsa_compile.kernels.precision import accumulator

_MASK = "float scale, bool causal, SymInt offset, int? window, int query_tile, int block"
_lib = torch.library.Library("nsa", "FRAGMENT")
_lib.define(
    "selected_attention(Tensor q, Tensor k, Tensor v, Tensor block_indices, Tensor? valid, "
    f"{_MASK}, int dense_len) -> (Tensor out, Tensor lse)"
)
_lib.define(
    "selected_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, "
    f"Tensor out, Tensor lse, Tensor block_indices, Tensor? valid, {_MASK}, int dense_len"
    ") -> (Tensor dq, Tensor dk, Tensor dv)"
)


@torch.library.register_fake("nsa::selected_attention", lib=_lib)
def _fake(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, valid: Tensor | None, scale: float,
    causal: bool, offset: int, window: int | None, query_tile: int, block: int, dense_len: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, heads, q_len, _ = q.shape
    out = empty_token_major(q, batch, heads, q_len, v.shape[3])
    return out, q.new_empty((batch, heads, q_len), dtype=accumulator(q.dtype))


@torch.library.register_fake("nsa::selected_attention_backward", lib=_lib)
def _backward_fake(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (empty_token_major(x, *x.shape) for x in (q, k, v))
    return dq, dk, dv


def _forward(implementation: Any) -> Any:
    """The op's kernel around ``implementation``: dense attention up to ``dense_len`` keys."""

    def kernel(
        q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, valid: Tensor | None, scale: float,
        causal: bool, offset: int, window: int | None, query_tile: int, block: int, dense_len: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        if k.shape[2] <= dense_len:
            out, lse = dense.forward(q, k, v, valid, scale, causal, offset, window)
        else:
            blocks = _by_tile(block_indices, q, query_tile)
            out, lse = implementation().forward(
                q, k, v, blocks, valid, scale, causal, offset, window, query_tile, block
            )
        return token_major(out), lse.contiguous()

    return kernel


def _backward(implementation: Any) -> Any:
    """The backward op's kernel around ``implementation``, with the same switch."""

    def kernel(
        grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
        lse: Tensor, block_indices: Tensor, valid: Tensor | None, scale: float, causal: bool,
        offset: int, window: int | None, query_tile: int, block: int, dense_len: int,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        if k.shape[2] <= dense_len:
            grads = dense.backward(
                grad_out, grad_lse, q, k, v, out, lse, valid, scale, causal, offset, window
            )
        else:
            blocks = _by_tile(block_indices, q, query_tile)
            grads = implementation().backward(
                grad_out, grad_lse, q, k, v, out, lse, blocks, valid, scale, causal, offset,
                window, query_tile, block,
            )  # fmt: skip
        dq, dk, dv = grads
        return token_major(dq), token_major(dk), token_major(dv)

    return kernel


def _by_tile(block_indices: Tensor, q: Tensor, query_tile: int) -> Tensor:
    """[B, Hkv, NT * n] as select_blocks returns it (or [B, Hkv, NT, n]) -> [B, Hkv, NT, n]."""
    tiles = geometry.num_tiles(q.shape[2], query_tile)
    return block_indices.reshape(*block_indices.shape[:2], tiles, -1)


_lib.impl("selected_attention", _forward(lambda: cpu), "CPU")
_lib.impl("selected_attention", _forward(lambda: launchers("attend")), "CUDA")
_lib.impl("selected_attention_backward", _backward(lambda: cpu), "CPU")
_lib.impl("selected_attention_backward", _backward(lambda: launchers("attend")), "CUDA")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, block_indices, valid, *ctx.sizes = inputs
    ctx.save_for_backward(q, k, v, *output, block_indices, valid)
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:
    q, k, v, out, lse, block_indices, valid = ctx.saved_tensors
    rest = (None,) * (2 + len(ctx.sizes))
    if grad_out is None and grad_lse is None:
        return None, None, None, *rest
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = torch.ops.nsa.selected_attention_backward(
        grad_out, grad_lse, q, k, v, out, lse, block_indices, valid, *ctx.sizes
    )
    return *grads, *rest


torch.library.register_autograd(
    "nsa::selected_attention", _autograd, setup_context=_setup_context, lib=_lib
)

once_differentiable(_lib, "selected_attention_backward")


@register_flop_formula(torch.ops.nsa.selected_attention)
def _flops(
    q_shape: Any, k_shape: Any, v_shape: Any, block_indices_shape: Any, *args: Any,
    out_shape: Any = None, **kwargs: Any,
) -> int:  # fmt: skip
    """Two matmuls over the keys read: the selected blocks, or all of them when dense."""
    keys = _keys_read(q_shape, k_shape, block_indices_shape, args, kwargs)
    batch, heads, q_len, dim = q_shape
    return 2 * batch * heads * q_len * keys * (dim + v_shape[3])


@register_flop_formula(torch.ops.nsa.selected_attention_backward)
def _backward_flops(
    grad_out_shape: Any, grad_lse_shape: Any, q_shape: Any, k_shape: Any, v_shape: Any,
    out: Any, lse: Any, block_indices_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any,
) -> int:  # fmt: skip
    """Five matmuls: the logits again, dP and dV over Dv, dQ and dK over D."""
    keys = _keys_read(q_shape, k_shape, block_indices_shape, args, kwargs)
    batch, heads, q_len, dim = q_shape
    return 2 * batch * heads * q_len * keys * (3 * dim + 2 * v_shape[3])


def _keys_read(q_shape: Any, k_shape: Any, block_indices_shape: Any, args: Any, kwargs: Any) -> int:
    # The trailing arguments are query_tile, block, dense_len; any suffix may come by keyword.
    names = [name for name in ("query_tile", "block", "dense_len") if name not in kwargs]
    positional = args[len(args) - len(names) :]
    sizes = {**kwargs, **dict(zip(names, positional, strict=True))}
    if k_shape[2] <= sizes["dense_len"]:
        return int(k_shape[2])
    tiles = geometry.num_tiles(q_shape[2], sizes["query_tile"])
    selected = math.prod(block_indices_shape[2:]) // max(tiles, 1)
    return min(int(k_shape[2]), sizes["block"] * selected)
