"""Triton kernel of the queries' gradient of block-sparse attention, and delta.

    ds_ij = p_ij (do_i.v_j - delta_i) (times the cap's slope, if any),  delta_i = do_i.o_i - dlse_i
    dq_i = scale sum_j ds_ij k_j

Its programs are the forward's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nsa_compile.kernels.attend.gate import weights_of
from nsa_compile.kernels.attend.triton_rows import (
    last_steps,
    launch_for,
    listed_keys,
    load_rows,
    modified,
    padded_dim,
    program,
    store_rows,
    whole_steps,
)
from nsa_compile.kernels.triton_site import (
    LOG2_E,
    mask_pointer,
    mask_strides,
    place_of,
    row_range,
    row_segment,
    row_slope,
    seen_in_terms,
    visible,
)


@triton.jit
def _query_steps(
    acc, q, do, lse, delta, k, v, valid, key_segments, positions, ids, first, stop, steps, position,
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
        if MASKED and PADDED:
            inside = inside & (
                tl.load(valid + key.to(tl.int64) * valid_row, mask=inside, other=0) != 0
            )
        k_tile = load_rows(k + origin * k_row, offset, k_row, inside, D, DP, MASKED)
        v_tile = load_rows(v + origin * v_row, offset, v_row, inside, DV, DVP, MASKED)
        s = tl.dot(q, tl.trans(k_tile), input_precision="ieee")
        dp = tl.dot(do, tl.trans(v_tile), input_precision="ieee")
        key_place = place_of(key, positions, kv_len, SLOPED, PLACED)
        s, bend = modified(
            s, scale, cap, slope[:, None], place[:, None], key_place[None, :], CAPPED, SLOPED
        )
        p = tl.exp2(s - lse[:, None])
        ds = p * (dp - delta[:, None])
        if CAPPED:
            ds = ds * bend
        if MASKED:
            seen = visible(position[:, None], key[None, :], kv_len, window, CAUSAL, WINDOWED)
            seen = seen_in_terms(
                seen & inside[None, :], key, inside, low, high, segment, key_segments, RANGED,
                SEGMENTED,
            )  # fmt: skip
            ds = tl.where(seen, ds, 0.0)
        acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision="ieee")
    return acc


@triton.jit
def _query_gradient(
    q, k, v, out, do, lse, dlse, ids, counts, valid, dq, delta, scale, signed_scale, tiles,
    kv_heads, q_len, kv_len, offset, window, q_batch, q_head, q_row, k_batch, k_head, k_row,
    v_batch, v_head, v_row, o_batch, o_head, o_row, do_batch, do_head, do_row, dlse_batch,
    dlse_head, dlse_row, dq_batch, dq_head, dq_row, gate, valid_batch, valid_row, ranges,
    ranges_batch, query_segments, query_segments_batch, key_segments, key_segments_batch, slopes,
    positions, positions_batch, cap, G: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
    L: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    M: tl.constexpr, BN: tl.constexpr, CHUNKS: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr, PADDED: tl.constexpr, NEGATIVE: tl.constexpr, GIVEN: tl.constexpr,
    LSE_GRADIENT: tl.constexpr, GATED: tl.constexpr, ADDED: tl.constexpr, RANGED: tl.constexpr,
    SEGMENTED: tl.constexpr, SLOPED: tl.constexpr, PLACED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """dq, and on the way delta for the key side; programs own the rows they own in forward.

    ``GIVEN``: delta is there already, and ``out`` is not read.
    """
    entry, batch, kv_head, tile, chunk = program(tiles, kv_heads, CHUNKS)
    row = chunk * M + tl.arange(0, M)
    head = (kv_head * G + row // R).to(tl.int64)
    query = tile * R + row % R
    mine = (row < G * R) & (query < q_len)
    q_tile = load_rows(
        q + batch * q_batch, head * q_head + query.to(tl.int64) * q_row, 1, mine, D, DP, True
    )
    if NEGATIVE:
        q_tile = -q_tile
    do_rows = head * do_head + query.to(tl.int64) * do_row
    do_tile = load_rows(do + batch * do_batch, do_rows, 1, mine, DV, DVP, True)
    row_place = (batch * kv_heads * G + head) * q_len + query
    log_sum = tl.load(lse + row_place, mask=mine, other=float("-inf"))
    dead = log_sum == float("-inf")
    if GIVEN:
        difference = tl.load(delta + row_place, mask=mine, other=0.0)
    else:
        o_rows = head * o_head + query.to(tl.int64) * o_row
        o_tile = load_rows(out + batch * o_batch, o_rows, 1, mine, DV, DVP, True)
        difference = tl.sum(do_tile.to(tl.float32) * o_tile.to(tl.float32), 1)
        if LSE_GRADIENT:
            there = dlse + batch * dlse_batch + head * dlse_head + query.to(tl.int64) * dlse_row
            difference -= tl.load(there, mask=mine, other=0.0).to(tl.float32)
        difference = tl.where(dead, 0.0, difference)
        tl.store(delta + row_place, difference, mask=mine)
    log_sum = tl.where(dead, float("inf"), log_sum * 1.4426950408889634)
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
    if BN % L != 0 and L % BN != 0:
        full = full * 0
    acc = tl.zeros([M, DP], tl.float32)
    steps, covered = whole_steps(full, L, BN)
    acc = _query_steps(
        acc, q_tile, do_tile, log_sum, difference, k_base, v_base, valid_base, key_segments,
        positions, ids_base, 0, full, steps, position, low, high, segment, slope, place, scale, cap,
        kv_len, window, k_row, v_row, valid_row, D, DV, DP, DVP, L, BN, CAUSAL, WINDOWED, PADDED,
        RANGED, SEGMENTED, SLOPED, PLACED, CAPPED, False,
    )  # fmt: skip
    steps = last_steps(count - covered, L, BN)
    acc = _query_steps(
        acc, q_tile, do_tile, log_sum, difference, k_base, v_base, valid_base, key_segments,
        positions, ids_base, covered, count, steps, position, low, high, segment, slope, place,
        scale, cap, kv_len, window, k_row, v_row, valid_row, D, DV, DP, DVP, L, BN, CAUSAL,
        WINDOWED, PADDED, RANGED, SEGMENTED, SLOPED, PLACED, CAPPED, True,
    )  # fmt: skip
    acc = acc * signed_scale
    if GATED:
        acc = acc * tl.load(gate + row_place, mask=mine, other=0.0)[:, None]
    dq += batch * dq_batch
    dq_rows = head * dq_head + query.to(tl.int64) * dq_row
    if ADDED:
        acc += load_rows(dq, dq_rows, 1, mine, D, DP, True).to(tl.float32)
    store_rows(dq, dq_rows, 1, mine, acc, D, DP)


def query_gradient(upstream, q, k, v, lse, ordered, dq, delta, site, extra):
    """Fills dq, and delta unless it is given; ``ordered`` is what ``order_blocks`` returned."""
    ids, counts = ordered
    grad_out, grad_lse, out, gate, (added, _), given = upstream
    batch, q_heads, q_len, head_dim = q.shape
    group, value_dim = q_heads // k.shape[1], v.shape[3]
    launch = launch_for("query", q, v, group, site.query_tile, site.block)
    chunks = triton.cdiv(group * site.query_tile, launch.rows)
    grad_lse_strides = (0, 0, 0) if grad_lse is None else grad_lse.stride()
    _query_gradient[(chunks * ids.shape[2] * k.shape[1] * batch,)](
        q, k, v, out, grad_out, lse, lse if grad_lse is None else grad_lse, ids, counts,
        mask_pointer(site.valid, q), dq, delta, abs(site.scale) * LOG2_E, site.scale, ids.shape[2],
        k.shape[1], q_len, k.shape[2], site.offset, site.window or 0, *q.stride()[:3],
        *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *grad_out.stride()[:3],
        *grad_lse_strides, *dq.stride()[:3], weights_of(gate, lse), *mask_strides(site.valid),
        *extra.arguments, G=group, N=ids.shape[3], R=site.query_tile, L=site.block, D=head_dim,
        DV=value_dim, DP=padded_dim(head_dim), DVP=padded_dim(value_dim), M=launch.rows,
        BN=launch.keys, CHUNKS=chunks, CAUSAL=site.causal, WINDOWED=site.window is not None,
        PADDED=site.valid is not None, NEGATIVE=site.scale < 0, GIVEN=given,
        LSE_GRADIENT=grad_lse is not None, GATED=gate is not None, ADDED=added, **extra.flags,
        num_warps=launch.warps, num_stages=launch.stages, maxnreg=launch.registers,
    )  # fmt: skip
