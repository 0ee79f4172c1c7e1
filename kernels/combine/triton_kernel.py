"""Triton kernels of the gated sum: one pass over the branches forward, one backward.

    o_i = sum_c g_ic o^c_i;   do^c_i = g_ic do_i,  dg_ic = do_i . o^c_i

Rows are taken token by token, all heads of a token together, which is how the branches lie.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from nsa_compile.kernels.attend.triton_rows import load_rows, padded_dim, store_rows
from nsa_compile.kernels.layout import empty_token_major
from nsa_compile.kernels.triton_site import dense_rows

# Rows of a program times the padded head dim.
_ELEMENTS = 4096


@triton.jit
def _rows(heads, q_len, total, M: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    token = row // heads
    return token // q_len, row % heads, token % q_len, row < total


@triton.jit
def _combine(
    gates, a, b, c, out, heads, q_len, total, g_batch, g_head, g_row, g_branch, a_batch, a_head,
    a_row, b_batch, b_head, b_row, c_batch, c_head, c_row, o_batch, o_head, o_row, D: tl.constexpr,
    DP: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    batch, head, query, mine = _rows(heads, q_len, total, M)
    g = gates + batch * g_batch + head * g_head + query * g_row
    acc = tl.load(g, mask=mine, other=0.0).to(tl.float32)[:, None] * load_rows(
        a, batch * a_batch + head * a_head + query * a_row, 1, mine, D, DP, True
    ).to(tl.float32)
    acc += tl.load(g + g_branch, mask=mine, other=0.0).to(tl.float32)[:, None] * load_rows(
        b, batch * b_batch + head * b_head + query * b_row, 1, mine, D, DP, True
    ).to(tl.float32)
    acc += tl.load(g + 2 * g_branch, mask=mine, other=0.0).to(tl.float32)[:, None] * load_rows(
        c, batch * c_batch + head * c_head + query * c_row, 1, mine, D, DP, True
    ).to(tl.float32)
    store_rows(out, batch * o_batch + head * o_head + query * o_row, 1, mine, acc, D, DP)


@triton.jit
def _gate_gradient(grad, x, dgate, place, mine, dg_at, D: tl.constexpr, DP: tl.constexpr):
    total = tl.sum(grad * load_rows(x, place, 1, mine, D, DP, True).to(tl.float32), 1)
    tl.store(dgate + dg_at, total.to(dgate.dtype.element_ty), mask=mine)
    return total


@triton.jit
def _branch_gradient(
    grad, gate, x, dgate, dx, place, mine, g_at, dg_at, D: tl.constexpr, DP: tl.constexpr
):
    weight = tl.load(gate + g_at, mask=mine, other=0.0).to(tl.float32)
    _gate_gradient(grad, x, dgate, place[0], mine, dg_at, D, DP)
    store_rows(dx, place[1], 1, mine, grad * weight[:, None], D, DP)


@triton.jit
def _combine_backward(
    grad, gates, a, b, c, dgates, da, db, dc, heads, q_len, total, o_batch, o_head, o_row, g_batch,
    g_head, g_row, g_branch, a_batch, a_head, a_row, b_batch, b_head, b_row, c_batch, c_head, c_row,
    d_batch, d_head, d_row, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    batch, head, query, mine = _rows(heads, q_len, total, M)
    at = batch * o_batch + head * o_head + query * o_row
    upstream = load_rows(grad, at, 1, mine, D, DP, True).to(tl.float32)
    g_at = batch * g_batch + head * g_head + query * g_row
    dg_at = ((batch * heads + head) * q_len + query) * 3
    d_at = batch * d_batch + head * d_head + query * d_row
    a_at = batch * a_batch + head * a_head + query * a_row
    _branch_gradient(upstream, gates, a, dgates, da, (a_at, d_at), mine, g_at, dg_at, D, DP)
    b_at = batch * b_batch + head * b_head + query * b_row
    g_at += g_branch
    _branch_gradient(upstream, gates, b, dgates, db, (b_at, d_at), mine, g_at, dg_at + 1, D, DP)
    c_at = batch * c_batch + head * c_head + query * c_row
    g_at += g_branch
    _branch_gradient(upstream, gates, c, dgates, dc, (c_at, d_at), mine, g_at, dg_at + 2, D, DP)


@triton.jit
def _gate_gradients(
    grad, gates, a, b, c, dgates, weights, delta, da, db, heads, q_len, total, o_batch, o_head,
    o_row, g_batch, g_head, g_row, g_branch, a_batch, a_head, a_row, b_batch, b_head, b_row,
    c_batch, c_head, c_row, d_batch, d_head, d_row, D: tl.constexpr, DP: tl.constexpr,
    M: tl.constexpr, WANTED: tl.constexpr,
):  # fmt: skip
    """dg; g and dg in float32, branch by branch; da, and db if it is ``WANTED``."""
    batch, head, query, mine = _rows(heads, q_len, total, M)
    at = batch * o_batch + head * o_head + query * o_row
    upstream = load_rows(grad, at, 1, mine, D, DP, True).to(tl.float32)
    place = (batch * heads + head) * q_len + query
    at = batch * a_batch + head * a_head + query * a_row
    first = _gate_gradient(upstream, a, dgates, at, mine, place * 3, D, DP)
    tl.store(delta + place, first, mask=mine)
    at = batch * b_batch + head * b_head + query * b_row
    second = _gate_gradient(upstream, b, dgates, at, mine, place * 3 + 1, D, DP)
    tl.store(delta + total + place, second, mask=mine)
    at = batch * c_batch + head * c_head + query * c_row
    third = _gate_gradient(upstream, c, dgates, at, mine, place * 3 + 2, D, DP)
    tl.store(delta + 2 * total + place, third, mask=mine)
    g = gates + batch * g_batch + head * g_head + query * g_row
    weight = tl.load(g, mask=mine, other=0.0).to(tl.float32)
    tl.store(weights + place, weight, mask=mine)
    at = batch * d_batch + head * d_head + query * d_row
    store_rows(da, at, 1, mine, upstream * weight[:, None], D, DP)
    weight = tl.load(g + g_branch, mask=mine, other=0.0).to(tl.float32)
    tl.store(weights + total + place, weight, mask=mine)
    if WANTED:
        store_rows(db, at, 1, mine, upstream * weight[:, None], D, DP)
    weight = tl.load(g + 2 * g_branch, mask=mine, other=0.0).to(tl.float32)
    tl.store(weights + 2 * total + place, weight, mask=mine)


def combine(
    gates: torch.Tensor, compressed: torch.Tensor, selected: torch.Tensor, window: torch.Tensor
) -> torch.Tensor:
    branches = [dense_rows(x) for x in (compressed, selected, window)]
    out = empty_token_major(compressed, *compressed.shape)
    grid, sizes, constants = _launch(out)
    if out.numel():
        _combine[grid](
            gates, *branches, out, *sizes, *gates.stride(),
            *(stride for x in (*branches, out) for stride in x.stride()[:3]), **constants,
        )  # fmt: skip
    return out


def combine_backward(
    grad: torch.Tensor, gates: torch.Tensor, compressed: torch.Tensor, selected: torch.Tensor,
    window: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    grad, *branches = (dense_rows(x) for x in (grad, compressed, selected, window))
    dgates = gates.new_empty(gates.shape)
    gradients = [empty_token_major(x, *x.shape) for x in branches]
    grid, sizes, constants = _launch(grad)
    if grad.numel():
        _combine_backward[grid](
            grad, gates, *branches, dgates, *gradients, *sizes, *grad.stride()[:3],
            *gates.stride(), *(stride for x in branches for stride in x.stride()[:3]),
            *gradients[0].stride()[:3], **constants,
        )  # fmt: skip
    else:
        dgates.zero_()
    return dgates, *gradients


def gate_gradients(
    grad: torch.Tensor, gates: torch.Tensor, compressed: torch.Tensor, selected: torch.Tensor,
    window: torch.Tensor, wanted: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """dgates; float32 [2, 3, B, Hq, Tq], gates and their gradients; then the gradients of the first
    branch and, if it is ``wanted``, of the second."""
    grad, *branches = (dense_rows(x) for x in (grad, compressed, selected, window))
    dgates = gates.new_empty(gates.shape)
    rows = gates.new_empty(2, 3, *gates.shape[:3], dtype=torch.float32)
    first = empty_token_major(grad, *grad.shape)
    second = empty_token_major(grad, *grad.shape) if wanted else None
    grid, sizes, constants = _launch(grad)
    if grad.numel():
        _gate_gradients[grid](
            grad, gates, *branches, dgates, rows[0], rows[1], first,
            first if second is None else second, *sizes, *grad.stride()[:3], *gates.stride(),
            *(stride for x in branches for stride in x.stride()[:3]), *first.stride()[:3],
            **constants, WANTED=wanted,
        )  # fmt: skip
    else:
        dgates.zero_()
        rows.zero_()
    return dgates, rows, first, second


def _launch(out: torch.Tensor) -> tuple[tuple[int], tuple[int, ...], dict[str, Any]]:
    """Grid, sizes and constants of both kernels."""
    batch, heads, q_len, dim = out.shape
    padded = padded_dim(dim)
    rows = max(1, _ELEMENTS // padded)
    total = batch * heads * q_len
    constants = {"D": dim, "DP": padded, "M": rows, "num_warps": 4}
    return (triton.cdiv(total, rows),), (heads, q_len, total), constants
