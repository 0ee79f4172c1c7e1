"""Triton kernels of mean pooling: compressed keys and the gradient of the keys they came from.

    y_c = sum_t w_t x_t / max(1, sum_t w_t)  over t in [c d, c d + l),  w_t = 1 for a valid key
    dx_t = w_t sum_c dy_c / max(1, sum w)    over the c whose range holds t

Both read each input about once from device memory: neighbouring programs share rows in L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nsa_compile.kernels.triton_site import dense_rows, mask_pointer, mask_strides, valid_before

# Compressed blocks (forward) or keys (backward) a program makes: 32 rows of 128 half-precision
# channels are 16-byte loads for 4 warps, several in flight.
ROWS = 32


@triton.jit
def _pool(
    x, valid, out, heads, count, x_batch, x_head, x_row, valid_batch, valid_row, chunks,
    CB: tl.constexpr, CD: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    pair = pid // chunks
    row = pid % chunks * M + tl.arange(0, M)
    column = tl.arange(0, DP)
    inside = row < count
    base = x + pair // heads * x_batch + pair % heads * x_head
    total = tl.zeros([M, DP], tl.float32)
    weight = tl.zeros([M], tl.float32)
    for t in range(0, CB):
        key = row * CD + t
        mask = inside
        if PADDED:
            real = tl.load(
                valid + pair // heads * valid_batch + key * valid_row, mask=inside, other=0
            )
            mask = inside & (real != 0)
            weight += mask.to(tl.float32)
        pointers = base + key[:, None] * x_row + column[None, :]
        total += tl.load(pointers, mask=mask[:, None] & (column < D)[None, :], other=0.0).to(
            tl.float32
        )
    if PADDED:
        total = total / tl.maximum(weight, 1.0)[:, None]
    else:
        total = total / CB
    there = out + (pair * count + row)[:, None] * D + column[None, :]
    tl.store(there, total.to(out.dtype.element_ty), mask=inside[:, None] & (column < D)[None, :])


@triton.jit
def _spread(
    grad, before, valid, out, heads, length, count, g_batch, g_head, g_row, valid_batch, valid_row,
    chunks, CB: tl.constexpr, CD: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr,
    OVERLAP: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    pair = pid // chunks
    batch = pair // heads
    key = pid % chunks * M + tl.arange(0, M)
    column = tl.arange(0, DP)
    inside = key < length
    base = grad + batch * g_batch + pair % heads * g_head
    total = tl.zeros([M, DP], tl.float32)
    for back in range(0, OVERLAP):
        c = key // CD - back
        covers = inside & (c >= 0) & (c < count) & (c * CD + CB > key)
        pointers = base + c[:, None] * g_row + column[None, :]
        part = tl.load(pointers, mask=covers[:, None] & (column < D)[None, :], other=0.0).to(
            tl.float32
        )
        if PADDED:
            tally = before + batch * (length + 1) + c * CD
            weight = tl.load(tally + CB, mask=covers, other=1)
            weight -= tl.load(tally, mask=covers, other=0)
            part = part / tl.maximum(weight, 1).to(tl.float32)[:, None]
        total += part
    if PADDED:
        real = tl.load(valid + batch * valid_batch + key * valid_row, mask=inside, other=0)
        total = tl.where((real != 0)[:, None], total, 0.0)
    else:
        total = total / CB
    there = out + (pair * length + key)[:, None] * D + column[None, :]
    tl.store(there, total.to(out.dtype.element_ty), mask=inside[:, None] & (column < D)[None, :])


def compress(x: torch.Tensor, valid: torch.Tensor | None, block: int, stride: int) -> torch.Tensor:
    """[B, H, T, D] -> [B, H, Nc, D] in x's dtype: the mean over valid keys of each block."""
    batch, heads, length, dim = x.shape
    count = max(0, (length - block) // stride + 1)
    out = x.new_empty(batch, heads, count, dim)
    if out.numel() == 0:
        return out
    x = dense_rows(x)
    chunks = triton.cdiv(count, ROWS)
    _pool[(batch * heads * chunks,)](
        x, mask_pointer(valid, x), out, heads, count, *x.stride()[:3],
        *mask_strides(valid), chunks, CB=block, CD=stride, D=dim, DP=triton.next_power_of_2(dim),
        M=ROWS, PADDED=valid is not None, num_warps=4,
    )  # fmt: skip
    return out


def compress_backward(
    grad: torch.Tensor, valid: torch.Tensor | None, block: int, stride: int, length: int
) -> torch.Tensor:
    """[B, H, Nc, D] -> [B, H, T, D]: the gradient of the pooled keys."""
    batch, heads, count, dim = grad.shape
    out = grad.new_empty(batch, heads, length, dim)
    if count == 0:
        return out.zero_()
    if out.numel() == 0:
        return out
    grad = dense_rows(grad)
    before = grad
    if valid is not None:
        before = valid_before(valid)
    chunks = triton.cdiv(length, ROWS)
    _spread[(batch * heads * chunks,)](
        grad, before, mask_pointer(valid, grad), out, heads, length, count,
        *grad.stride()[:3], *mask_strides(valid), chunks, CB=block, CD=stride, D=dim,
        DP=triton.next_power_of_2(dim), M=ROWS, OVERLAP=(block - 1) // stride + 1,
        PADDED=valid is not None, num_warps=4,
    )  # fmt: skip
    return out
