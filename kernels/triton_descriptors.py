"""Rows of matrices through the GPU's copy engine: tensor descriptors, where a tensor allows them.

The engine computes addresses and fills what lies outside with zeros, so a kernel needs neither
pointers nor masks for it. A kernel is told by ``DESCRIBED`` which of the two it was given.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from nsa_compile.kernels.attend.triton_rows import load_rows

_ALIGNED = 16  # bytes, of the base and of every stride


@functools.cache
def has_copy_engine(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def describable(*tensors: torch.Tensor) -> bool:
    """Whether the device has the engine and each tensor of 16 bits, with dense rows, suits it."""
    return all(has_copy_engine(x.device) and _aligned(x) for x in tensors)


def _aligned(x: torch.Tensor) -> bool:
    step = _ALIGNED // x.element_size()
    strides = (s for n, s in zip(x.shape[:-1], x.stride(), strict=False) if n > 1)
    regular = all(s > 0 and s % step == 0 for s in strides)
    based = x.numel() > 0 and x.data_ptr() % _ALIGNED == 0
    return x.element_size() == 2 and based and regular


def describe(x: torch.Tensor, block: tuple[int, ...], rows: int | None = None) -> TensorDescriptor:
    """x for loads of ``block``; with ``rows`` the rows of x [..., T, D] behind them are zeros."""
    shape = [*x.shape]
    if rows is not None:
        shape[-2] = rows
    step = _ALIGNED // x.element_size()
    # The stride of a single entry is not read, but has to be a stride.
    strides = [s if n > 1 else step for n, s in zip(x.shape, x.stride(), strict=True)]
    return TensorDescriptor(x, shape, [*strides[:-1], 1], list(block))


@triton.jit
def head_rows(x, batch, head, batch_stride, head_stride, DESCRIBED: tl.constexpr):
    """What ``load_tile`` reads the rows of one head from."""
    if DESCRIBED:
        return x
    else:
        return x + batch * batch_stride + head * head_stride


@triton.jit
def load_tile(
    x, batch, head, first, row, stride, inside, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, CHECK: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """[ROWS, PADDED]: the rows ``first + row`` of a head, zero outside.

    Without a descriptor only ``CHECK`` makes it so, and only as far as ``inside`` says.
    """
    if DESCRIBED:
        return tl.reshape(x.load([batch, head, first, 0]), [ROWS, PADDED])
    else:
        start = tl.full([], 1, tl.int64) * stride * first
        return load_rows(x + start, row, stride, inside, WIDTH, PADDED, CHECK)
