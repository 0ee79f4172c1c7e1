"""nsa::compress: mean pooling of keys into compressed blocks.

``spare`` appends rows of zeros that belong to no block: torch compiles separately for sizes 0 and
1, so a graph that serves many lengths asks for two spare rows. Readers take the first Nc rows.
Up to ``dense_len`` tokens, where selection reads no summary, the blocks are zeros.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nsa_compile.kernels import geometry
from nsa_compile.kernels.autograd import once_differentiable
from nsa_compile.kernels.compress import cpu
from nsa_compile.kernels.launchers import launchers

_lib = torch.library.Library("nsa", "FRAGMENT")
_lib.define(
    "compress(Tensor x, Tensor? valid, int block, int stride, int spare=0, int dense_len=0) -> "
    "Tensor"
)
_lib.define(
    "compress_backward(Tensor grad, Tensor? valid, int block, int stride, SymInt length, "
    "int dense_len=0) -> Tensor"
)


def _kernel(implementation: Any) -> Any:
    """The op's kernel around ``implementation``."""

    def kernel(
        x: Tensor, valid: Tensor | None, block: int, stride: int, spare: int = 0, dense_len: int = 0
    ) -> Tensor:
        if x.shape[2] <= dense_len:
            return _fake(x, valid, block, stride, spare).zero_()
        blocks = implementation().compress(x, valid, block, stride)
        return torch.nn.functional.pad(blocks, (0, 0, 0, spare)) if spare else blocks

    return kernel


_lib.impl("compress", _kernel(lambda: cpu), "CPU")
_lib.impl("compress", _kernel(lambda: launchers("compress")), "CUDA")


def _backward_kernel(implementation: Any) -> Any:
    """The backward op's kernel around ``implementation``."""

    def kernel(
        grad: Tensor, valid: Tensor | None, block: int, stride: int, length: int, dense_len: int = 0
    ) -> Tensor:
        if length <= dense_len:
            return _backward_fake(grad, valid, block, stride, length).zero_()
        rows = grad[:, :, : geometry.num_compressed(length, block, stride)]
        return implementation().compress_backward(rows, valid, block, stride, length)

    return kernel


_lib.impl("compress_backward", _backward_kernel(lambda: cpu), "CPU")
_lib.impl("compress_backward", _backward_kernel(lambda: launchers("compress")), "CUDA")


@torch.library.register_fake("nsa::compress", lib=_lib)
def _fake(
    x: Tensor, valid: Tensor | None, block: int, stride: int, spare: int = 0, dense_len: int = 0
) -> Tensor:
    batch, heads, length, dim = x.shape
    return x.new_empty(batch, heads, geometry.num_compressed(length, block, stride) + spare, dim)


@torch.library.register_fake("nsa::compress_backward", lib=_lib)
def _backward_fake(
    grad: Tensor, valid: Tensor | None, block: int, stride: int, length: int, dense_len: int = 0
) -> Tensor:
    batch, heads, _, dim = grad.shape
    return grad.new_empty(batch, heads, length, dim)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, valid, ctx.block, ctx.stride, ctx.spare, ctx.dense_len = inputs
    ctx.length = x.shape[2]
    ctx.save_for_backward(valid)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (valid,) = ctx.saved_tensors
    dx = torch.ops.nsa.compress_backward(
        grad, valid, ctx.block, ctx.stride, ctx.length, ctx.dense_len
    )
    return dx, None, None, None, None, None


torch.library.register_autograd("nsa::compress", _backward, setup_context=_setup_context, lib=_lib)

once_differentiable(_lib, "compress_backward")


@register_flop_formula([torch.ops.nsa.compress, torch.ops.nsa.compress_backward])
def _flops(x_shape: tuple[int, ...], valid: Any, block: int, *args: Any, out_shape: Any) -> int:
    """One multiply-add per pooled token and channel, forward and backward."""
    batch, heads, rows, dim = x_shape
    compressed = min(rows, out_shape[2])
    return 2 * batch * heads * compressed * block * dim
