"""nsa::selected_attention: softmax attention over the blocks that each tile of queries selected."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nsa_compile.kernels import geometry
from nsa_compile.kernels.attend import cpu, dense
from nsa_compile.kernels.attend.site import Site
from nsa_compile.kernels.autocast import register_autocast
from nsa_compile.kernels.autograd import differentiable_attention
from nsa_compile.kernels.launchers import launchers
from nsa_compile.kernels.layout import empty_token_major, token_major
from nsa_compile.kernels.precision import accumulator, check_dtypes

# The fields of Site, and the length up to which every key is read.
_SITE = (
    "Tensor? valid, Tensor? ranges, Tensor? query_segments, Tensor? key_segments, Tensor? slopes, "
    "Tensor? positions, float scale, float softcap, bool causal, SymInt offset, int? window, "
    "int query_tile, int block, int dense_len"
)
_lib = torch.library.Library("nsa", "FRAGMENT")
_lib.define(
    "selected_attention(Tensor q, Tensor k, Tensor v, Tensor block_indices, "
    f"{_SITE}) -> (Tensor out, Tensor lse)"
)
_lib.define(
    "selected_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, "
    f"Tensor out, Tensor lse, Tensor block_indices, {_SITE}) -> (Tensor dq, Tensor dk, Tensor dv)"
)


@torch.library.register_fake("nsa::selected_attention", lib=_lib)
def _fake(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, *args: Any
) -> tuple[Tensor, Tensor]:
    check_dtypes(q=q, k=k, v=v)
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
        q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, *args: Any
    ) -> tuple[Tensor, Tensor]:
        check_dtypes(q=q, k=k, v=v)
        site, dense_len = Site(*args[:-1]), args[-1]
        if _is_sdpa(site, q, k, dense_len):
            mask = (site.scale, site.causal, site.offset, site.window)
            out, lse = dense.forward(q, k, v, site.valid, *mask)
        else:
            site, blocks = _blocks_read(q, k, block_indices, site, dense_len)
            out, lse = implementation().forward(q, k, v, blocks, site)
        return token_major(out), lse.contiguous()

    return kernel


def _backward(implementation: Any) -> Any:
    """The backward op's kernel around ``implementation``, with the same switch."""

    def kernel(
        grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
        lse: Tensor, block_indices: Tensor, *args: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        site, dense_len = Site(*args[:-1]), args[-1]
        saved = (grad_out, grad_lse, q, k, v, out, lse)
        if _is_sdpa(site, q, k, dense_len):
            mask = (site.scale, site.causal, site.offset, site.window)
            grads = dense.backward(*saved, site.valid, *mask)
        else:
            site, blocks = _blocks_read(q, k, block_indices, site, dense_len)
            grads = implementation().backward(*saved, blocks, site)
        dq, dk, dv = grads
        return token_major(dq), token_major(dk), token_major(dv)

    return kernel


def _is_sdpa(site: Site, q: Tensor, k: Tensor, dense_len: int) -> bool:
    return q.numel() == 0 or k.shape[2] == 0 or (k.shape[2] <= dense_len and site.like_sdpa)


def _blocks_read(
    q: Tensor, k: Tensor, block_indices: Tensor, site: Site, dense_len: int
) -> tuple[Site, Tensor]:
    """The blocks each tile reads: those selected, or up to ``dense_len`` keys all of them."""
    if k.shape[2] <= dense_len:
        return site.reading_everything(q, k)
    return site, _by_tile(block_indices, q, site.query_tile)


def _by_tile(block_indices: Tensor, q: Tensor, query_tile: int) -> Tensor:
    """[B, Hkv, NT * n] as select_blocks returns it (or [B, Hkv, NT, n]) -> [B, Hkv, NT, n]."""
    tiles = geometry.num_tiles(q.shape[2], query_tile)
    return block_indices.reshape(*block_indices.shape[:2], tiles, -1)


_lib.impl("selected_attention", _forward(lambda: cpu), "CPU")
_lib.impl("selected_attention", _forward(lambda: launchers("attend")), "CUDA")
_lib.impl("selected_attention_backward", _backward(lambda: cpu), "CPU")
_lib.impl("selected_attention_backward", _backward(lambda: launchers("attend")), "CUDA")


# block_indices, and valid to positions.
differentiable_attention(_lib, "selected_attention", 7)
register_autocast(_lib, "selected_attention", "q", "k", "v")


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
