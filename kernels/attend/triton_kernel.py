"""Triton kernels of block-sparse attention: one softmax over the keys of the listed blocks.

    s_ij = scale q_i.k_j (capped and slanted as the site says),  p_ij = exp(s_ij - lse_i)
    o_i = sum_j p_ij v_j,  lse_i = log sum_j exp(s_ij)

A program owns M rows, the rows of one tile in head-major order (head m // R of the group, query
m % R), so that a short tile still fills the tensor cores with the heads that share its blocks.
Blocks that every row sees whole come first and need no mask. Exponentials are base 2.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from nsa_compile.kernels.attend import triton_few, triton_gathered
from nsa_compile.kernels.attend.gate import GatedSum, arguments_of
from nsa_compile.kernels.attend.site import Site
from nsa_compile.kernels.attend.triton_backward import backward
from nsa_compile.kernels.attend.triton_rows import (
    last_steps,
    launch_for,
    listed_keys,
    load_rows,
    modified,
    order_blocks,
    padded_dim,
    program,
    store_rows,
    whole_steps,
)
from nsa_compile.kernels.layout import empty_token_major
from nsa_compile.kernels.triton_site import (
    LOG2_E,
    dense_rows,
    mask_pointer,
    mask_strides,
    place_of,
    row_range,
    row_segment,
    row_slope,
    seen_in_terms,
    terms,
    visible,
)

__all__ = ["backward", "forward", "forward_and_sum"]


@triton.jit
def _forward_steps(
    acc, top, total, q, k, v, valid, key_segments, positions, ids, first, stop, steps, position,
    low, high, segment, slope, place, scale, cap, kv_len, window, k_row, v_row, valid_row,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, L: tl.constexpr,
    BN: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PADDED: tl.constexpr,
    RANGED: tl.constexpr, SEGMENTED: tl.constexpr, SLOPED: tl.constexpr, PLACED: tl.constexpr,
    CAPPED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    for step in range(0, steps):
        origin, offset, used = listed_keys(ids, step, first, stop, L, BN)
        origin = origin.to(tl.int64)
        key = (origin + offset).to(tl.int32)
        inside = used & (key < kv_len)
        if MASKED and PADDED:  # what stands in padding may be NaN: it must not be read at all
            inside = inside & (
                tl.load(valid + key.to(tl.int64) * valid_row, mask=inside, other=0) != 0
            )
        k_tile = load_rows(k + origin * k_row, offset, k_row, inside, D, DP, MASKED)
        s = tl.dot(q, tl.trans(k_tile), input_precision="ieee")
        key_place = place_of(key, positions, kv_len, SLOPED, PLACED)
        if MASKED:
            seen = visible(position[:, None], key[None, :], kv_len, window, CAUSAL, WINDOWED)
            seen = seen_in_terms(
                seen & inside[None, :], key, inside, low, high, segment, key_segments, RANGED,
                SEGMENTED,
            )  # fmt: skip
            s, _ = modified(
                s, scale, cap, slope[:, None], place[:, None], key_place[None, :], CAPPED, SLOPED
            )
            s = tl.where(seen, s, float("-inf"))
            new_top = tl.maximum(top, tl.max(s, 1))
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            p = tl.exp2(s - base[:, None])
        elif CAPPED or SLOPED:
            s, _ = modified(
                s, scale, cap, slope[:, None], place[:, None], key_place[None, :], CAPPED, SLOPED
            )
            new_top = tl.maximum(top, tl.max(s, 1))
            base = new_top
            p = tl.exp2(s - base[:, None])
        else:
            new_top = tl.maximum(top, tl.max(s, 1) * scale)
            base = new_top
            p = tl.exp2(s * scale - base[:, None])
        fade = tl.exp2(top - base)
        total = total * fade + tl.sum(p, 1)
        v_tile = load_rows(v + origin * v_row, offset, v_row, inside, DV, DVP, MASKED)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * fade[:, None], input_precision="ieee")
        top = new_top
    return acc, top, total


@triton.jit
def _forward(
    q, k, v, ids, counts, valid, out, lse, scale, tiles, kv_heads, q_len, kv_len, offset, window,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, o_batch, o_head, o_row,
    valid_batch, valid_row, ranges, ranges_batch, query_segments, query_segments_batch,
    key_segments, key_segments_batch, slopes, positions, positions_batch, cap, gates, g_batch,
    g_head, g_row, g_branch, first, second, a_batch, a_head, a_row, b_batch, b_head, b_row, summed,
    G: tl.constexpr, N: tl.constexpr, R: tl.constexpr, L: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr,
    DP: tl.constexpr, DVP: tl.constexpr, M: tl.constexpr, BN: tl.constexpr, CHUNKS: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PADDED: tl.constexpr, NEGATIVE: tl.constexpr,
    ADDED: tl.constexpr, RANGED: tl.constexpr, SEGMENTED: tl.constexpr, SLOPED: tl.constexpr,
    PLACED: tl.constexpr, CAPPED: tl.constexpr, SUMMED: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """With ``ADDED`` the softmax goes on from what ``out`` and ``lse`` hold.

    With ``SUMMED`` the rows, rounded as ``out`` is, are also the last summand of a gated sum.
    """
    entry, batch, kv_head, tile, chunk = program(tiles, kv_heads, CHUNKS)
    row = chunk * M + tl.arange(0, M)
    head = kv_head * G + row // R
    query = tile * R + row % R
    mine = (row < G * R) & (query < q_len)
    q_rows = head.to(tl.int64) * q_head + query.to(tl.int64) * q_row
    q_tile = load_rows(q + batch * q_batch, q_rows, 1, mine, D, DP, True)
    if NEGATIVE:
        q_tile = -q_tile
    position = query + offset
    low, high = row_range(ranges + batch * ranges_batch, query, mine, RANGED)
    segment = row_segment(query_segments + batch * query_segments_batch, query, mine, SEGMENTED)
    slope = row_slope(slopes, head, mine, SLOPED)
    key_segments += batch * key_segments_batch
    positions += batch * positions_batch
    place = place_of(position, positions, kv_len, SLOPED, PLACED)
    k_base = k + batch * k_batch + kv_head.to(tl.int64) * k_head
    v_base = v + batch * v_batch + kv_head.to(tl.int64) * v_head
    valid_base = valid + batch * valid_batch
    ids_base = ids + entry * N
    full = tl.load(counts + entry * 2)
    count = tl.load(counts + entry * 2 + 1)
    if BN % L != 0 and L % BN != 0:  # lanes past the block must be masked
        full = full * 0
    result = (batch * kv_heads * G + head) * q_len + query
    o_rows = head.to(tl.int64) * o_head + query.to(tl.int64) * o_row
    out += batch * o_batch
    if ADDED:
        if count == 0:
            return
        acc = load_rows(out, o_rows, 1, mine, DV, DVP, True).to(tl.float32)
        top = tl.load(lse + result, mask=mine, other=float("-inf")) * 1.4426950408889634
        total = tl.where(top > float("-inf"), 1.0, 0.0)
    else:
        acc = tl.zeros([M, DVP], tl.float32)
        top = tl.full([M], float("-inf"), tl.float32)
        total = tl.zeros([M], tl.float32)
    steps, covered = whole_steps(full, L, BN)
    acc, top, total = _forward_steps(
        acc, top, total, q_tile, k_base, v_base, valid_base, key_segments, positions, ids_base, 0,
        full, steps, position, low, high, segment, slope, place, scale, cap, kv_len, window, k_row,
        v_row, valid_row, D, DV, DP, DVP, L, BN, CAUSAL, WINDOWED, PADDED, RANGED, SEGMENTED,
        SLOPED, PLACED, CAPPED, False,
    )  # fmt: skip
    steps = last_steps(count - covered, L, BN)
    acc, top, total = _forward_steps(
        acc, top, total, q_tile, k_base, v_base, valid_base, key_segments, positions, ids_base,
        covered, count, steps, position, low, high, segment, slope, place, scale, cap, kv_len,
        window, k_row, v_row, valid_row, D, DV, DP, DVP, L, BN, CAUSAL, WINDOWED, PADDED, RANGED,
        SEGMENTED, SLOPED, PLACED, CAPPED, True,
    )  # fmt: skip
    alive = total > 0
    acc = acc / tl.where(alive, total, 1.0)[:, None]
    log_sum = tl.where(
        alive, (top + tl.log2(tl.where(alive, total, 1.0))) * 0.6931471805599453, float("-inf")
    )
    if SUMMED:
        gate = gates + batch * g_batch + head.to(tl.int64) * g_head + query.to(tl.int64) * g_row
        rows = head.to(tl.int64) * a_head + query.to(tl.int64) * a_row
        other = load_rows(first + batch * a_batch, rows, 1, mine, DV, DVP, True)
        weight = tl.load(gate, mask=mine, other=0.0).to(tl.float32)
        y = weight[:, None] * other.to(tl.float32)
        rows = head.to(tl.int64) * b_head + query.to(tl.int64) * b_row
        other = load_rows(second + batch * b_batch, rows, 1, mine, DV, DVP, True)
        weight = tl.load(gate + g_branch, mask=mine, other=0.0).to(tl.float32)
        y += weight[:, None] * other.to(tl.float32)
        weight = tl.load(gate + 2 * g_branch, mask=mine, other=0.0).to(tl.float32)
        y += weight[:, None] * acc.to(out.dtype.element_ty).to(tl.float32)
        store_rows(summed + batch * o_batch, o_rows, 1, mine, y, DV, DVP)
    if KEPT:
        store_rows(out, o_rows, 1, mine, acc, DV, DVP)
        tl.store(lse + result, log_sum, mask=mine)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_indices: torch.Tensor, site: Site
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [B, Hq, Tq, Dv] in q's dtype, token-major, and lse [B, Hq, Tq] in float32."""
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    if triton_few.serves(q, k, v, site):
        parts = triton_few.parts_of(q, k, block_indices, site, False)
        return _tiled(q, k, v, *parts.left, _tiled(q, k, v, *parts.shared))
    if triton_gathered.serves(q, k, v, site):
        tiled = functools.partial(_tiled, q, k, v)
        return triton_gathered.forward(q, k, v, block_indices, site, tiled)
    return _tiled(q, k, v, block_indices, site)


def forward_and_sum(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_indices: torch.Tensor, site: Site,
    gates: torch.Tensor, first: torch.Tensor, second: torch.Tensor, keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The gated sum of ``first``, ``second`` and this attention; then its out and lse.

    Those two have no elements unless they are kept, which saves writing them.
    """
    q, k, v, first, second = (dense_rows(x) for x in (q, k, v, first, second))
    total = empty_token_major(q, *q.shape[:3], v.shape[3])
    gated = GatedSum(gates, first, second, total)
    return total, *_tiled(q, k, v, block_indices, site, None, gated, keep)


def _tiled(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_indices: torch.Tensor, site: Site,
    onto: tuple[torch.Tensor, torch.Tensor] | None = None, gated: GatedSum | None = None,
    keep: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """A program for the rows of each tile, or for some of them.

    ``onto``: out and lse of other blocks; the softmax then runs over those too.
    """
    batch, q_heads, q_len, head_dim = q.shape
    kv_heads, kv_len, value_dim = k.shape[1], k.shape[2], v.shape[3]
    if onto is not None:
        out, lse = onto
    elif keep:
        out = empty_token_major(q, batch, q_heads, q_len, value_dim)
        lse = q.new_empty(batch, q_heads, q_len, dtype=torch.float32)
    else:
        out, lse = q.new_empty(0), q.new_empty(0, dtype=torch.float32)
    if batch * q_heads * q_len == 0:
        return out, lse
    o_strides = (out if gated is None else gated.out).stride()[:3]
    ids, counts = order_blocks(block_indices, q_len, kv_len, site)
    launch = launch_for("forward", q, v, q_heads // kv_heads, site.query_tile, site.block)
    tiles, chunks = ids.shape[2], triton.cdiv(q_heads // kv_heads * site.query_tile, launch.rows)
    extra = terms(site.visibility, site.modifiers, q)
    _forward[(chunks * tiles * kv_heads * batch,)](
        q, k, v, ids, counts, mask_pointer(site.valid, q), out, lse, abs(site.scale) * LOG2_E,
        tiles, kv_heads, q_len, kv_len, site.offset, site.window or 0, *q.stride()[:3],
        *k.stride()[:3], *v.stride()[:3], *o_strides, *mask_strides(site.valid),
        *extra.arguments, *arguments_of(gated, q), G=q_heads // kv_heads, N=ids.shape[3],
        R=site.query_tile, L=site.block, D=head_dim, DV=value_dim, DP=padded_dim(head_dim),
        DVP=padded_dim(value_dim), M=launch.rows, BN=launch.keys, CHUNKS=chunks,
        CAUSAL=site.causal, WINDOWED=site.window is not None, PADDED=site.valid is not None,
        NEGATIVE=site.scale < 0, ADDED=onto is not None, **extra.flags,
        SUMMED=gated is not None, KEPT=keep, num_warps=launch.warps,
        num_stages=launch.stages, maxnreg=launch.registers,
    )  # fmt: skip
    return out, lse
