"""Triton kernel of the gradient of the scales of chosen blocks.

    dg_tb = sum over rows i of tile t and keys j of block b of p_ij (do_i.v_j - delta_i) s_ij

with the logits s and delta_i = do_i.o_i - dlse_i, as in the backward of the attention. A program
has some rows of a tile and goes through the tile's list slot by slot; what programs of one tile
find is added in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nsa_compile.kernels.attend.site import Site
from nsa_compile.kernels.attend.triton_rows import load_rows, padded_dim, program
from nsa_compile.kernels.scaled.slots import first_named
from nsa_compile.kernels.triton_site import (
    LOG2_E,
    dense_rows,
    mask_pointer,
    mask_strides,
    row_range,
    row_segment,
    seen_in_terms,
    terms,
    visible,
)

# Most rows, and most keys a step, by whether inputs have sixteen bits and the widest head dim
# padded to a power of two. Not tuned: what surely fits.
ROWS_AND_KEYS: dict[tuple[bool, int], tuple[int, int]] = {
    (True, 64): (64, 64), (True, 128): (64, 64), (True, 256): (32, 32),
    (False, 64): (32, 32), (False, 128): (32, 32), (False, 256): (16, 16),
}  # fmt: skip


@triton.jit
def _scale_gradient(
    q, k, v, out, do, lse, dlse, ids, valid, part, scale, tiles, kv_heads, q_len, kv_len, offset,
    window, blocks, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, o_batch,
    o_head, o_row, do_batch, do_head, do_row, dlse_batch, dlse_head, dlse_row, valid_batch,
    valid_row, ranges, ranges_batch, query_segments, query_segments_batch, key_segments,
    key_segments_batch, G: tl.constexpr, N: tl.constexpr, R: tl.constexpr, L: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, M: tl.constexpr,
    BN: tl.constexpr, CHUNKS: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
    PADDED: tl.constexpr, LSE_GRADIENT: tl.constexpr, RANGED: tl.constexpr,
    SEGMENTED: tl.constexpr,
):  # fmt: skip
    entry, batch, kv_head, tile, chunk = program(tiles, kv_heads, CHUNKS)
    row = chunk * M + tl.arange(0, M)
    head = (kv_head * G + row // R).to(tl.int64)
    query = tile * R + row % R
    mine = (row < G * R) & (query < q_len)
    at = query.to(tl.int64)
    q_tile = load_rows(q + batch * q_batch, head * q_head + at * q_row, 1, mine, D, DP, True)
    do_rows = head * do_head + at * do_row
    do_tile = load_rows(do + batch * do_batch, do_rows, 1, mine, DV, DVP, True)
    o_rows = head * o_head + at * o_row
    o_tile = load_rows(out + batch * o_batch, o_rows, 1, mine, DV, DVP, True)
    delta = tl.sum(do_tile.to(tl.float32) * o_tile.to(tl.float32), 1)
    if LSE_GRADIENT:
        there = dlse + batch * dlse_batch + head * dlse_head + at * dlse_row
        delta -= tl.load(there, mask=mine, other=0.0).to(tl.float32)
    place = (batch * kv_heads * G + head) * q_len + query
    log_sum = tl.load(lse + place, mask=mine, other=float("-inf"))
    dead = log_sum == float("-inf")
    delta = tl.where(dead, 0.0, delta)
    log_sum = tl.where(dead, float("inf"), log_sum * 1.4426950408889634)
    position = query + offset
    low, high = row_range(ranges + batch * ranges_batch, query, mine, RANGED)
    segment = row_segment(query_segments + batch * query_segments_batch, query, mine, SEGMENTED)
    key_segments += batch * key_segments_batch
    k_base = k + batch * k_batch + kv_head.to(tl.int64) * k_head
    v_base = v + batch * v_batch + kv_head.to(tl.int64) * v_head
    valid_base = valid + batch * valid_batch
    for slot in range(0, N):
        block = tl.load(ids + entry * N + slot)
        listed = (block >= 0) & (block < blocks)
        total = tl.zeros([M], tl.float32)
        for piece in range(0, (L + BN - 1) // BN):
            lane = piece * BN + tl.arange(0, BN)
            key = tl.maximum(block, 0) * L + lane
            inside = (lane < L) & (key < kv_len) & listed
            if PADDED:  # what stands in padding may be NaN: it must not be read at all
                inside = inside & (
                    tl.load(valid_base + key.to(tl.int64) * valid_row, mask=inside, other=0) != 0
                )
            k_tile = load_rows(k_base, key, k_row, inside, D, DP, True)
            v_tile = load_rows(v_base, key, v_row, inside, DV, DVP, True)
            s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
            dp = tl.dot(do_tile, tl.trans(v_tile), input_precision="ieee")
            ds = tl.exp2(s - log_sum[:, None]) * (dp - delta[:, None])
            seen = visible(position[:, None], key[None, :], kv_len, window, CAUSAL, WINDOWED)
            seen = seen_in_terms(
                seen & inside[None, :], key, inside, low, high, segment, key_segments, RANGED,
                SEGMENTED,
            )  # fmt: skip
            total += tl.sum(tl.where(seen, ds * s, 0.0), 1)
        tl.store(part + (entry * CHUNKS + chunk) * N + slot, tl.sum(total, 0) * 0.6931471805599453)


def scale_gradient(
    grad_out: torch.Tensor, grad_lse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor,
    v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, block_indices: torch.Tensor, site: Site,
) -> torch.Tensor:  # fmt: skip
    """float32 [B, Hkv, NT, n]."""
    q, k, v, out, grad_out = (dense_rows(x) for x in (q, k, v, out, grad_out))
    ids = block_indices.contiguous()
    batch, kv_heads, tiles, width = ids.shape
    if ids.numel() == 0 or k.shape[2] == 0:
        return q.new_zeros(ids.shape, dtype=torch.float32)
    (_, q_heads, q_len, dim), kv_len, value_dim = q.shape, k.shape[2], v.shape[3]
    padded, group = (padded_dim(dim), padded_dim(value_dim)), q_heads // kv_heads
    rows, keys = ROWS_AND_KEYS[q.element_size() == 2, max(64, *padded)]
    rows = min(rows, max(16, triton.next_power_of_2(group * site.query_tile)))
    keys = min(keys, max(16, triton.next_power_of_2(site.block)))
    chunks = triton.cdiv(group * site.query_tile, rows)
    part = q.new_empty(batch * kv_heads * tiles, chunks, width, dtype=torch.float32)
    extra = terms(site.visibility, site.modifiers, q)
    dlse_strides = (0, 0, 0) if grad_lse is None else grad_lse.stride()
    _scale_gradient[(part.shape[0] * chunks,)](
        q, k, v, out, grad_out, lse.contiguous(), q if grad_lse is None else grad_lse, ids,
        mask_pointer(site.valid, q), part, site.scale * LOG2_E, tiles, kv_heads, q_len, kv_len,
        site.offset, site.window or 0, triton.cdiv(kv_len, site.block), *q.stride()[:3],
        *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *grad_out.stride()[:3], *dlse_strides,
        *mask_strides(site.valid), *extra.arguments[:6], G=group, N=width, R=site.query_tile,
        L=site.block, D=dim, DV=value_dim, DP=padded[0], DVP=padded[1], M=rows, BN=keys,
        CHUNKS=chunks, CAUSAL=site.causal, WINDOWED=site.window is not None,
        PADDED=site.valid is not None, LSE_GRADIENT=grad_lse is not None,
        RANGED=extra.flags["RANGED"], SEGMENTED=extra.flags["SEGMENTED"], num_warps=4,
        num_stages=1,
    )  # fmt: skip
    return part.sum(1).view(ids.shape).where(first_named(ids), 0.0)
