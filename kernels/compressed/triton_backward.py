"""Triton kernels of the gradient of attention over compressed keys.

    du_c = sum_i p_ic do_i,  ds_ic = p_ic (do_i.u_c - delta_i),  delta_i = do_i.o_i - dlse_i
    dq_i = scale sum_c ds_ic y_c,  dy_c = scale sum_i ds_ic q_i

There are few compressed keys and many queries: the key side is shared among programs by query head
and, for few heads, by pieces of the queries. Each writes a part of its own, and the parts are added
in a fixed order, so nothing is atomic and every run gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nsa_compile.kernels.attend.triton_rows import Launch, load_rows, padded_dim, store_rows
from nsa_compile.kernels.compressed.site import Site
from nsa_compile.kernels.compressed.triton_bounds import seen_blocks, spans_argument, steps
from nsa_compile.kernels.layout import empty_token_major
from nsa_compile.kernels.triton_descriptors import describable, describe, head_rows, load_tile
from nsa_compile.kernels.triton_site import LOG2_E, dense_rows

# By kernel, whether inputs have sixteen bits, and the widest head dim padded to a power of two.
# The key side owns ``keys`` compressed keys and reads ``rows`` queries a step.
# One H100, 65,536 tokens, heads of 128, bfloat16, compression 32/16, 32/8 heads, ms. Query side:
# 64x64 5.92, 3 stages 7.37; 128x64 with 8 warps and 3 stages 5.98, 2 stages 6.62; 128x32 6.77.
# Key side, rows x keys: 64x128 with 8 warps and 3 stages 9.80, 2 stages 10.74; 32x128 10.72;
# 32x64 11.6; 64x64 12.0; 128x64 20.5.
LAUNCHES: dict[tuple[str, bool, int], Launch] = {
    ("query", True, 64): Launch(128, 64, 8, 3),
    ("query", True, 128): Launch(64, 64, 4, 2),
    ("query", True, 256): Launch(64, 32, 4, 2),
    ("key", True, 64): Launch(64, 64, 4, 2),
    ("key", True, 128): Launch(64, 128, 8, 3),
    ("key", True, 256): Launch(32, 64, 8, 1),
    ("query", False, 64): Launch(32, 32, 4, 1),
    ("query", False, 128): Launch(32, 32, 4, 1),
    ("query", False, 256): Launch(16, 16, 4, 1),
    ("key", False, 64): Launch(32, 32, 4, 1),
    ("key", False, 128): Launch(32, 32, 4, 1),
    ("key", False, 256): Launch(16, 16, 4, 1),
}
# With what a step reads through descriptors, by kernel and widest head dim. As above, 64/4 heads.
# Query side: 128x64 with 8 warps and 3 stages 11.8 (the best through pointers 13.6), 64x64 in 168
# registers 12.0, without a limit 12.2, 128x128 12.6, 64x32 12.9, 128x32 13.2. Key side: 64x128 16.4
# (20.0), 2 stages 18.7, 32x128 17.9, 64x64 19.1; with dp computed after p 1.1 more. Heads of 64 at
# 32/8: 3.7 (4.2) and 5.5 (6.3); wider than 128 the key side spills more than it gains.
DESCRIBED_LAUNCHES: dict[tuple[str, int], Launch] = {
    ("query", 64): Launch(128, 64, 8, 3),
    ("query", 128): Launch(128, 64, 8, 3),
    ("key", 64): Launch(64, 64, 4, 2),
    ("key", 128): Launch(64, 128, 8, 3),
}
# Programs of the key side that fill the device; with fewer heads the queries are cut in pieces,
# of no less than PIECE_ROWS.
KEY_PROGRAMS = 512
PIECE_ROWS = 4096


@triton.jit
def _query_steps(
    acc, q, do, lse, delta, y, u, batch, head, some, start, stop, low, bound, count, scale, y_row,
    u_row, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, BN: tl.constexpr,
    PADDED: tl.constexpr, RANGED: tl.constexpr, DESCRIBED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, BN)
    for step in range(start, stop):
        c = step * BN + lane
        inside = c < count
        if MASKED and PADDED:
            inside = inside & (tl.load(some + c, mask=inside, other=0) != 0)
        keys = load_tile(
            y, batch, head, step * BN, lane, y_row, inside, D, DP, BN, MASKED, DESCRIBED
        )
        values = load_tile(
            u, batch, head, step * BN, lane, u_row, inside, DV, DVP, BN, MASKED, DESCRIBED
        )
        s = tl.dot(q, tl.trans(keys), input_precision="ieee")
        dp = tl.dot(do, tl.trans(values), input_precision="ieee")
        p = tl.exp2(s * scale - lse[:, None])
        ds = p * (dp - delta[:, None])
        if MASKED:
            seen = inside[None, :] & (c[None, :] < bound[:, None])
            if RANGED:
                seen = seen & (c[None, :] >= low[:, None])
            ds = tl.where(seen, ds, 0.0)
        acc = tl.dot(ds.to(keys.dtype), keys, acc, input_precision="ieee")
    return acc


@triton.jit
def _query_gradient(
    q, y, u, some, spans, spans_batch, out, do, lse, dlse, dq, log_sums, delta, scale, signed_scale,
    q_heads, q_len, count, offset, chunks, q_batch, q_head, q_row, y_batch, y_head, y_row, u_batch,
    u_head, u_row, o_batch, o_head, o_row, do_batch, do_head, do_row, dlse_batch, dlse_head,
    dlse_row, dq_batch, dq_head, dq_row, sums_row, G: tl.constexpr, CB: tl.constexpr,
    CD: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    M: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, PADDED: tl.constexpr,
    RANGED: tl.constexpr, NEGATIVE: tl.constexpr, LSE_GRADIENT: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """dq, and for the key side delta and the log-sum-exps in base 2, +inf where nothing is seen."""
    pid = tl.program_id(0).to(tl.int64)
    chunk = (chunks - 1 - pid % chunks).to(tl.int32)
    head = pid // chunks % q_heads
    batch = pid // chunks // q_heads
    row = tl.arange(0, M)
    first = chunk * M
    start = first.to(tl.int64)
    mine = first + row < q_len
    q_base = q + batch * q_batch + head * q_head + start * q_row
    q_tile = load_rows(q_base, row, q_row, mine, D, DP, True)
    if NEGATIVE:
        q_tile = -q_tile
    do_base = do + batch * do_batch + head * do_head + start * do_row
    do_tile = load_rows(do_base, row, do_row, mine, DV, DVP, True)
    o_base = out + batch * o_batch + head * o_head + start * o_row
    o_tile = load_rows(o_base, row, o_row, mine, DV, DVP, True)
    place = (batch * q_heads + head) * q_len + first + row
    log_sum = tl.load(lse + place, mask=mine, other=float("-inf"))
    difference = tl.sum(do_tile.to(tl.float32) * o_tile.to(tl.float32), 1)
    if LSE_GRADIENT:
        given = dlse + batch * dlse_batch + head * dlse_head + (start + row) * dlse_row
        difference -= tl.load(given, mask=mine, other=0.0).to(tl.float32)
    dead = log_sum == float("-inf")
    difference = tl.where(dead, 0.0, difference)
    log_sum = tl.where(dead, float("inf"), log_sum * 1.4426950408889634)
    there = (batch * q_heads + head) * sums_row + first + row
    tl.store(delta + there, difference, mask=mine)
    tl.store(log_sums + there, log_sum, mask=mine)
    low, bound = seen_blocks(
        spans + batch * spans_batch, first + row, mine, offset, count, CB, CD, CAUSAL, RANGED
    )
    first_step, full, stop = steps(
        low, bound, first, M, q_len, count, offset, BN, CB, CD, CAUSAL, PADDED, RANGED
    )
    shared = head // G
    y_base = head_rows(y, batch, shared, y_batch, y_head, DESCRIBED)
    u_base = head_rows(u, batch, shared, u_batch, u_head, DESCRIBED)
    where = batch.to(tl.int32), shared.to(tl.int32)
    some_base = some + batch * count
    acc = tl.zeros([M, DP], tl.float32)
    acc = _query_steps(
        acc, q_tile, do_tile, log_sum, difference, y_base, u_base, where[0], where[1], some_base,
        first_step, full, low, bound, count, scale, y_row, u_row, D, DV, DP, DVP, BN, PADDED,
        RANGED, DESCRIBED, False,
    )  # fmt: skip
    acc = _query_steps(
        acc, q_tile, do_tile, log_sum, difference, y_base, u_base, where[0], where[1], some_base,
        full, stop, low, bound, count, scale, y_row, u_row, D, DV, DP, DVP, BN, PADDED, RANGED,
        DESCRIBED, True,
    )  # fmt: skip
    dq_base = dq + batch * dq_batch + head * dq_head + start * dq_row
    store_rows(dq_base, row, dq_row, mine, acc * signed_scale, D, DP)


@triton.jit
def _row_sums(sums, row, first, query, mine, other, BM: tl.constexpr, DESCRIBED: tl.constexpr):
    """A number for each query of a step; ``row`` is the head's, counted over the batch."""
    if DESCRIBED:
        return tl.reshape(sums.load([row, first]), [BM])
    else:
        return tl.load(sums + query, mask=mine, other=other)


@triton.jit
def _key_steps(
    dy, du, keys, values, q, do, log_sums, delta, batch, head, row, spans, start, stop, c, scale,
    q_len, count, offset, q_row, do_row, CB: tl.constexpr, CD: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, BM: tl.constexpr, CAUSAL: tl.constexpr,
    RANGED: tl.constexpr, NEGATIVE: tl.constexpr, DESCRIBED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Queries past the last one have zeros in q and do, and add nothing."""
    lane = tl.arange(0, BM)
    for step in range(start, stop):
        first = step * BM
        query = first + lane
        mine = query < q_len
        q_tile = load_tile(q, batch, head, first, lane, q_row, mine, D, DP, BM, True, DESCRIBED)
        do_tile = load_tile(
            do, batch, head, first, lane, do_row, mine, DV, DVP, BM, True, DESCRIBED
        )
        if NEGATIVE:
            q_tile = -q_tile
        log_sum = _row_sums(log_sums, row, first, query, mine, float("inf"), BM, DESCRIBED)
        difference = _row_sums(delta, row, first, query, mine, 0.0, BM, DESCRIBED)
        s = tl.dot(keys, tl.trans(q_tile), input_precision="ieee")
        dp = tl.dot(values, tl.trans(do_tile), input_precision="ieee")
        p = tl.exp2(s * scale - log_sum[None, :])
        if MASKED:
            low, bound = seen_blocks(spans, query, mine, offset, count, CB, CD, CAUSAL, RANGED)
            seen = c[:, None] < bound[None, :]
            if RANGED:
                seen = seen & (c[:, None] >= low[None, :])
            p = tl.where(seen, p, 0.0)
        ds = p * (dp - difference[None, :])
        du = tl.dot(p.to(do_tile.dtype), do_tile, du, input_precision="ieee")
        dy = tl.dot(ds.to(q_tile.dtype), q_tile, dy, input_precision="ieee")
    return dy, du


@triton.jit
def _key_gradient(
    q, y, u, some, spans, spans_batch, do, log_sums, delta, dy, du, scale, units, q_heads, q_len,
    count, offset, pieces, piece_rows, q_batch, q_head, q_row, y_batch, y_head, y_row, u_batch,
    u_head, u_row, do_batch, do_head, do_row, sums_row, G: tl.constexpr, CB: tl.constexpr,
    CD: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, CAUSAL: tl.constexpr, PADDED: tl.constexpr,
    RANGED: tl.constexpr, NEGATIVE: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """dy and du of BN compressed keys from one query head and one piece of its queries.

    The parts are [B, Hq, pieces, count, D]. Programs of the first keys, which most queries see,
    come first.
    """
    pid = tl.program_id(0).to(tl.int64)
    unit = pid % units
    piece = (unit % pieces).to(tl.int32)
    head = unit // pieces % q_heads
    batch = unit // pieces // q_heads
    c = (pid // units).to(tl.int32) * BN + tl.arange(0, BN)
    oldest = (pid // units).to(tl.int32) * BN
    inside = c < count
    real = inside
    if PADDED:
        real = inside & (tl.load(some + batch * count + c, mask=inside, other=0) != 0)
    keys = load_rows(y + batch * y_batch + head // G * y_head, c, y_row, real, D, DP, True)
    values = load_rows(u + batch * u_batch + head // G * u_head, c, u_row, real, DV, DVP, True)
    start = piece * piece_rows
    stop = tl.minimum(start + piece_rows, q_len)
    full = start
    if CAUSAL:
        start = tl.maximum(start, oldest * CD + CB - 1 - offset)
        newest = tl.minimum(oldest + BN, count) - 1
        full = tl.maximum(start, newest * CD + CB - 1 - offset)
    if RANGED:
        full = stop
    stop = (stop + BM - 1) // BM
    start = tl.minimum(start // BM, stop)
    full = tl.minimum((full + BM - 1) // BM, stop)
    q_base = head_rows(q, batch, head, q_batch, q_head, DESCRIBED)
    do_base = head_rows(do, batch, head, do_batch, do_head, DESCRIBED)
    row = batch * q_heads + head
    sums = head_rows(log_sums, 0, row, 0, sums_row, DESCRIBED)
    differences = head_rows(delta, 0, row, 0, sums_row, DESCRIBED)
    where = batch.to(tl.int32), head.to(tl.int32), row.to(tl.int32)
    dy_sum = tl.zeros([BN, DP], tl.float32)
    du_sum = tl.zeros([BN, DVP], tl.float32)
    own_spans = spans + batch * spans_batch
    if CAUSAL or RANGED:
        dy_sum, du_sum = _key_steps(
            dy_sum, du_sum, keys, values, q_base, do_base, sums, differences, where[0], where[1],
            where[2], own_spans, start, full, c, scale, q_len, count, offset, q_row, do_row, CB, CD,
            D, DV, DP, DVP, BM, CAUSAL, RANGED, NEGATIVE, DESCRIBED, True,
        )  # fmt: skip
    dy_sum, du_sum = _key_steps(
        dy_sum, du_sum, keys, values, q_base, do_base, sums, differences, where[0], where[1],
        where[2], own_spans, full, stop, c, scale, q_len, count, offset, q_row, do_row, CB, CD, D,
        DV, DP, DVP, BM, CAUSAL, RANGED, NEGATIVE, DESCRIBED, False,
    )  # fmt: skip
    if PADDED:
        dy_sum = tl.where(real[:, None], dy_sum, 0.0)
        du_sum = tl.where(real[:, None], du_sum, 0.0)
    dy_sum = dy_sum * (scale * 0.6931471805599453)
    store_rows(dy + unit * count * D, c, D, inside, dy_sum, D, DP)
    store_rows(du + unit * count * DV, c, DV, inside, du_sum, DV, DVP)


def backward(
    grad_out: torch.Tensor, grad_lse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor,
    v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, count: int, site: Site,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(dq token-major, dk, dv) in the dtypes of q, k and v; rows behind ``count`` get none."""
    dq = empty_token_major(q, *q.shape)
    q, k, v, out, grad_out = (dense_rows(x) for x in (q, k, v, out, grad_out))
    holds, spans = site.holds(count), site.spans(count)
    some = q if holds is None else holds.to(torch.uint8).contiguous()
    seen = (some, *spans_argument(spans, q))
    dim, value_dim = q.shape[3], v.shape[3]
    shape = {"G": q.shape[1] // k.shape[1], "CB": site.block, "CD": site.stride, "D": dim,
             "DV": value_dim, "DP": padded_dim(dim), "DVP": padded_dim(value_dim),
             "CAUSAL": site.causal, "PADDED": holds is not None,
             "RANGED": spans is not None, "NEGATIVE": site.scale < 0}  # fmt: skip
    # Log-sum-exps in base 2 and delta for the rows of all heads, padded to start on 16 bytes.
    heads, q_len = q.shape[0] * q.shape[1], q.shape[2]
    sums = q.new_empty(2, heads, triton.cdiv(q_len, 4) * 4, dtype=torch.float32)[..., :q_len]
    lse = lse.contiguous()
    _launch_query(grad_out, grad_lse, q, k, v, seen, out, lse, dq, sums, count, site, shape)
    dk, dv = _launch_key(grad_out, q, k, v, seen, sums, count, site, shape)
    return dq, dk, dv


def _launch(
    kernel: str, q: torch.Tensor, shape: dict[str, int], describable: bool
) -> tuple[Launch, bool]:
    """The launch, and whether it is one for descriptors."""
    widest = max(64, shape["DP"], shape["DVP"])
    launch = DESCRIBED_LAUNCHES.get((kernel, widest)) if describable else None
    return launch or LAUNCHES[kernel, q.element_size() == 2, widest], launch is not None


def _launch_query(
    grad_out, grad_lse, q, k, v, seen, out, lse, dq, sums, count, site, shape
) -> None:
    batch, q_heads, q_len, _ = q.shape
    # What stands in a hidden block may be NaN: only pointers can leave it unread.
    launch, described = _launch("query", q, shape, not shape["PADDED"] and describable(k, v))
    chunks = triton.cdiv(q_len, launch.rows)
    keys, values = k, v
    if described:
        keys = describe(k, (1, 1, launch.keys, shape["DP"]), count)
        values = describe(v, (1, 1, launch.keys, shape["DVP"]), count)
    _query_gradient[(chunks * q_heads * batch,)](
        q, keys, values, *seen, out, grad_out, lse, lse if grad_lse is None else grad_lse, dq,
        *sums, abs(site.scale) * LOG2_E, site.scale, q_heads, q_len, count, site.offset, chunks,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        *grad_out.stride()[:3], *((0, 0, 0) if grad_lse is None else grad_lse.stride()),
        *dq.stride()[:3], sums.stride(1), **shape, M=launch.rows, BN=launch.keys,
        LSE_GRADIENT=grad_lse is not None, DESCRIBED=described, num_warps=launch.warps,
        num_stages=launch.stages, maxnreg=launch.registers,
    )  # fmt: skip


def _launch_key(
    grad_out, q, k, v, seen, sums, count, site, shape
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, q_heads, q_len, _ = q.shape
    launch, described = _launch("key", q, shape, describable(q, grad_out))
    steps = triton.cdiv(count, launch.keys)
    wanted = triton.cdiv(KEY_PROGRAMS, steps * q_heads * batch)
    pieces = min(wanted, triton.cdiv(q_len, PIECE_ROWS))
    piece_rows = triton.cdiv(triton.cdiv(q_len, pieces), launch.rows) * launch.rows
    units, parts = batch * q_heads * pieces, shape["G"] * pieces
    # One part is the gradient itself; several are added in float32.
    parts_dtype = q.dtype if parts == 1 else torch.float32
    dk, dv = (
        q.new_empty(batch, k.shape[1], parts, count, x.shape[3], dtype=parts_dtype) for x in (k, v)
    )
    read = q, grad_out, *sums
    if described:
        rows = launch.rows
        read = (
            describe(q, (1, 1, rows, shape["DP"])),
            describe(grad_out, (1, 1, rows, shape["DVP"])),
            *(describe(x, (1, rows)) for x in sums),
        )
    _key_gradient[(units * steps,)](
        read[0], k, v, *seen, *read[1:], dk, dv, abs(site.scale) * LOG2_E, units, q_heads,
        q_len, count, site.offset, pieces, piece_rows, *q.stride()[:3], *k.stride()[:3],
        *v.stride()[:3], *grad_out.stride()[:3], sums.stride(1), **shape, BN=launch.keys,
        BM=launch.rows, DESCRIBED=described, num_warps=launch.warps, num_stages=launch.stages,
        maxnreg=launch.registers,
    )  # fmt: skip
    spare = k.shape[2] - count
    joined = ((x[:, :, 0] if parts == 1 else x.sum(dim=2).to(q.dtype)) for x in (dk, dv))
    dk, dv = (torch.nn.functional.pad(x, (0, 0, 0, spare)) if spare else x for x in joined)
    return dk, dv
