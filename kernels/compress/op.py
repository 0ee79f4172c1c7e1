"""nsa::compress: mean pooling of keys into compressed blocks.

``spare`` appends rows of zeros that belong to no block: torch compiles separately for sizes 0 and
1, so a graph that serves many lengths asks for two spare rows. Readers take the first Nc rows.
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
_lib.define("compress(Tensor x, Tensor? valid, int block, int stride, int spare=0) -> Tensor")
_lib.define(
    "compress_backward(Tensor grad, Tensor? valid, int block, int stride, SymInt length) -> Tensor"
)
_lib.impl("compress_backward", cpu.compress_backward, "CPU")


@torch.library.impl(_lib, "compress", "CPU")
def _cpu(x: Tensor, valid: Tensor | None, block: int, stride: int, spare: int = 0) -> Tensor:
    return _with_spare(cpu.compress(x, valid, block, stride), spare)


@torch.library.impl(_lib, "compress", "CUDA")
def _cuda(x: Tensor, valid: Tensor | None, block: int, stride: int, spare: int = 0) -> Tensor:
    return _with_spare(launchers("compress").compress(x, valid, block, stride), spare)


def _with_spare(blocks: Tensor, spare: int) -> Tensor:
    return torch.nn.functional.pad(blocks, (0, 0, 0, spare)) if spare else blocks


@torch.library.impl(_lib, "compress_backward", "CUDA")
def _backward_cuda(
    grad: Tensor, valid: Tensor | None, block: int, stride: int, length: int
) -> Tensor:
    return launchers("compress").compress_backward(grad, valid, block, stride, length)


@torch.library.register_fake("nsa::compress", lib=_lib)
def _fake(x: Tensor, valid: Tensor | None, block: int, stride: int, spare: int = 0) -> Tensor:
    batch, heads, length, dim = x.shape
    return x.new_empty(batch, heads, geometry.num_compressed(length, block, stride) + spare, dim)


@torch.library.register_fake("nsa::compress_backward", lib=_lib)
def _backward_fake(
    grad: Tensor, valid: Tensor | None, block: int, stride: int, length: int
) -> Tensor:
    batch, heads, _, dim = grad.shape
    return grad.new_empty(batch, heads, length, dim)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, valid, ctx.block, ctx.stride, ctx.spare = inputs
    ctx.length = x.shape[2]
    ctx.save_for_backward(valid)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (valid,) = ctx.saved_tensors
    blocks = grad.narrow(2, 0, grad.shape[2] - ctx.spare)
    dx = torch.ops.nsa.compress_backward(blocks, valid, ctx.block, ctx.stride, ctx.length)
    return dx, None, None, None, None


torch.library.register_autograd("nsa::compress", _backward, setup_context=_setup_context, lib=_lib)

once_differentiable(_lib, "compress_backward")


@register_flop_formula([torch.ops.nsa.compress, torch.ops.nsa.compress_backward])
def _flops(x_shape: tuple[int, ...], valid: Any, block: int, *args: Any, out_shape: Any) -> int:
    """One multiply-add per pooled token and channel, forward and backward."""
    batch, heads, rows, dim = x_shape
    compressed = min(rows, out_shape[2])
    return 2 * batch * heads * compressed * block * dim
