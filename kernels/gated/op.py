"""nsa::gated_attention: two of the gated branches, the sum of all three, and one backward.

The compressed branch comes as an input, because the choice of blocks needs its log-sum-exp. Its
gradient is computed here too if ``k_cmp`` and ``v_cmp`` are given, and ``compressed`` then has
none; without them ``compressed`` gets a gradient, for whoever changed it after its attention. The
selected branch is given by ``blocks``, or as ``selected``, which then gets a gradient.

One backward for all: the branches add to the same gradients one after the other, and the gate
scales rows inside them, so that neither its products nor three gradients of one tensor are kept.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nsa_compile.kernels import geometry
from nsa_compile.kernels.autocast import register_autocast
from nsa_compile.kernels.autograd import once_differentiable
from nsa_compile.kernels.gated import cpu
from nsa_compile.kernels.gated.site import Site
from nsa_compile.kernels.launchers import launchers
from nsa_compile.kernels.layout import empty_token_major, token_major
from nsa_compile.kernels.precision import accumulator
from nsa_compile.kernels.window.op import keys_in_window

_QKV = "Tensor gates, Tensor q, Tensor k, Tensor v, Tensor? k_cmp, Tensor? v_cmp"
_SITE = (
    "Tensor? valid, Tensor? ranges, float scale, bool causal, SymInt offset, int compress_block, "
    "int compress_stride, int window, int query_tile, int block"
)
_BRANCHES = "Tensor selected_out, Tensor selected_lse, Tensor window_out, Tensor window_lse"
_lib = torch.library.Library("nsa", "FRAGMENT")
_lib.define(
    f"gated_attention({_QKV}, Tensor compressed, Tensor? compressed_lse, Tensor? blocks, "
    f"Tensor? selected, {_SITE}, bool keep) -> (Tensor out, {_BRANCHES})"
)
_lib.define(
    f"gated_attention_backward(Tensor grad_out, {_QKV}, Tensor compressed, Tensor? compressed_lse, "
    f"Tensor? blocks, Tensor? selected, {_BRANCHES}, {_SITE}) -> (Tensor dgates, Tensor dq, "
    "Tensor dk, Tensor dv, Tensor dk_cmp, Tensor dv_cmp, Tensor dcompressed, Tensor dselected)"
)
# Tensors of the forward before ``valid``, and the fields of Site.
_TENSORS, _FIELDS = 10, 10


@torch.library.register_fake("nsa::gated_attention", lib=_lib)
def _fake(gates: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, ...]:
    batch, heads, q_len, _ = q.shape
    out, *branches = (empty_token_major(q, batch, heads, q_len, v.shape[3]) for _ in range(3))
    given, keep = args[_TENSORS - 5] is not None, args[-1]
    kept = []
    for branch, written in zip(branches, (keep and not given, keep), strict=True):
        lse = q.new_empty((batch, heads, q_len), dtype=accumulator(q.dtype))
        kept += [branch, lse] if written else _nothing(q)
    return out, *kept


def _nothing(q: Tensor) -> tuple[Tensor, Tensor]:
    """In the place of a branch's out and lse."""
    return q.new_empty(0), q.new_empty(0, dtype=accumulator(q.dtype))


def _forward(
    implementation: Any, gates: Tensor, q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor | None,
    v_cmp: Tensor | None, compressed: Tensor, compressed_lse: Tensor | None, blocks: Tensor | None,
    selected: Tensor | None, *args: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """``keep``, the last argument, is whether a gradient may follow: it reads the branches."""
    if (blocks is None) == (selected is None):
        raise ValueError("the selected branch is given by blocks or as selected, and not by both")
    site, keep = Site(*args[:-1]), args[-1]
    computed = _nothing(q)
    if selected is None:
        arguments = (blocks, *site.selected.arguments, 0)
        selected, lse = torch.ops.nsa.selected_attention(q, k, v, *arguments)
        computed = (selected, lse) if keep else computed
    window = implementation().forward(gates, q, k, v, compressed, selected, site, keep)
    return window[0], *computed, *window[1:]


class Saved(NamedTuple):
    """What the backward is given, but for the gradient and the site."""

    gates: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    k_cmp: Tensor | None
    v_cmp: Tensor | None
    compressed: Tensor
    compressed_lse: Tensor | None
    blocks: Tensor | None
    given: Tensor | None
    computed: Tensor
    selected_lse: Tensor
    window: Tensor
    window_lse: Tensor

    @property
    def selected(self) -> Tensor:
        return self.computed if self.given is None else self.given


@torch.library.register_fake("nsa::gated_attention_backward", lib=_lib)
def _backward_fake(grad_out: Tensor, *args: Any) -> tuple[Tensor, ...]:
    saved = Saved(*args[: len(args) - _FIELDS])
    dqkv = (empty_token_major(x, *x.shape) for x in (saved.q, saved.k, saved.v))
    compressed = tuple(
        None if x is None else x.new_empty(x.shape) for x in (saved.k_cmp, saved.v_cmp)
    )
    branches = tuple(
        empty_token_major(grad_out, *grad_out.shape) if own else None
        for own in (saved.k_cmp is None, saved.blocks is None)
    )
    optional = _present(saved.q, *compressed, *branches)
    return saved.gates.new_empty(saved.gates.shape), *dqkv, *optional


def _present(like: Tensor, *gradients: Tensor | None) -> tuple[Tensor, ...]:
    """An operator returns tensors: one without elements stands for None."""
    return tuple(like.new_empty(0) if x is None else x for x in gradients)


def _backward(implementation: Any) -> Any:
    """The backward op's kernel around ``implementation``."""

    def kernel(grad_out: Tensor, *args: Any) -> tuple[Tensor, ...]:
        saved, site = Saved(*args[: len(args) - _FIELDS]), Site(*args[len(args) - _FIELDS :])
        found = implementation().backward(grad_out, saved, site)
        branches = (
            None if x is None else token_major(x) for x in (found.dcompressed, found.dselected)
        )
        optional = _present(saved.q, found.dk_cmp, found.dv_cmp, *branches)
        return found.dgates, *(token_major(x) for x in found.dqkv), *optional

    return kernel


_lib.impl("gated_attention", functools.partial(_forward, lambda: cpu), "CPU")
_lib.impl("gated_attention", functools.partial(_forward, lambda: launchers("gated")), "CUDA")
_lib.impl("gated_attention_backward", _backward(lambda: cpu), "CPU")
_lib.impl("gated_attention_backward", _backward(lambda: launchers("gated")), "CUDA")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, (valid, ranges, *ctx.sizes, ctx.kept) = inputs[:_TENSORS], inputs[_TENSORS:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, *output[1:], valid, ranges)
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad_out: Tensor | None, *others: Tensor | None) -> Any:
    if grad_out is None:
        return (None,) * (_TENSORS + _FIELDS + 1)
    if not ctx.kept:
        raise RuntimeError(
            "nsa::gated_attention was called with keep=False and has nothing to differentiate by; "
            "pass keep=True where a gradient follows"
        )
    tensors = ctx.saved_tensors  # once: activation checkpointing unpacks a tensor no second time
    saved = Saved(*tensors[:-2])
    gradients = torch.ops.nsa.gated_attention_backward(grad_out, *tensors, *ctx.sizes)
    dgates, dq, dk, dv, *cmp, dcompressed, dselected = gradients
    if saved.k_cmp is None:
        cmp = [None, None]
    else:
        dcompressed = None
    if saved.blocks is not None:
        dselected = None
    return dgates, dq, dk, dv, *cmp, dcompressed, None, None, dselected, *(None,) * (_FIELDS + 1)


torch.library.register_autograd(
    "nsa::gated_attention", _autograd, setup_context=_setup_context, lib=_lib
)

once_differentiable(_lib, "gated_attention_backward")
register_autocast(
    _lib, "gated_attention", "q", "k", "v", "k_cmp", "v_cmp", "compressed", "selected"
)


def _keys(k_shape: Any, q_len: int, blocks_shape: Any, site: tuple[Any, ...]) -> int:
    """Keys that a query reads in the selected and in the window branch."""
    _, causal, _, _, _, window, query_tile, block = site
    keys = keys_in_window(k_shape[2], causal, window)
    if blocks_shape is not None:
        tiles = geometry.num_tiles(q_len, query_tile)
        listed = math.prod(blocks_shape[2:]) // max(tiles, 1) * block
        keys += min(int(k_shape[2]), listed)
    return keys


@register_flop_formula(torch.ops.nsa.gated_attention)
def _flops(
    gates_shape: Any, q_shape: Any, k_shape: Any, v_shape: Any, k_cmp: Any, v_cmp: Any,
    compressed: Any, lse: Any, blocks_shape: Any, selected: Any, valid: Any, ranges: Any,
    *args: Any, out_shape: Any = None,
) -> int:  # fmt: skip
    """Two matmuls over the keys read, and a multiply-add for each element of three branches."""
    batch, heads, q_len, dim = q_shape
    keys = _keys(k_shape, q_len, blocks_shape, args[:-1])
    return 2 * batch * heads * q_len * (keys * (dim + v_shape[3]) + 3 * v_shape[3])


@register_flop_formula(torch.ops.nsa.gated_attention_backward)
def _backward_flops(
    grad_shape: Any, gates_shape: Any, q_shape: Any, k_shape: Any, v_shape: Any, k_cmp_shape: Any,
    v_cmp_shape: Any, compressed: Any, lse: Any, blocks_shape: Any, given: Any, selected: Any,
    selected_lse: Any, window: Any, window_lse: Any, valid: Any, ranges: Any, *site: Any,
    out_shape: Any = None,
) -> int:  # fmt: skip
    """Five matmuls over the keys read and the compressed ones; a product with each branch."""
    batch, heads, q_len, dim = q_shape
    keys = _keys(k_shape, q_len, blocks_shape, site)
    keys += 0 if k_cmp_shape is None else k_cmp_shape[2]
    return 2 * batch * heads * q_len * (keys * (3 * dim + 2 * v_shape[3]) + 3 * v_shape[3])
