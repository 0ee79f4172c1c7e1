"""Triton kernel of attention over compressed keys, and its launches.

    s_ic = scale q_i.y_c,  p_ic = exp(s_ic - lse_i)  over c < bound_i
    o_i = sum_c p_ic u_c,  lse_i = log sum_c exp(s_ic)

bound_i counts the compressed blocks that are complete at query i, so the mask is one comparison and
only the last step of a program needs it. Exponentials are base 2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nsa_compile.kernels.attend.triton_rows import Launch, load_rows, padded_dim, store_rows
from nsa_compile.kernels.compressed.site import Site
from nsa_compile.kernels.compressed.triton_backward import backward
from nsa_compile.kernels.compressed.triton_bounds import seen_blocks, spans_argument, steps
from nsa_compile.kernels.layout import empty_token_major
from nsa_compile.kernels.triton_descriptors import describable, describe, head_rows, load_tile
from nsa_compile.kernels.triton_site import LOG2_E, dense_rows

__all__ = ["backward", "forward"]

# By whether inputs have sixteen bits, and the widest head dim padded to a power of two.
# One H100, 65,536 tokens, heads of 128, bfloat16, compression 32/16, ms at 32/8 heads: 128x64 with
# 8 warps and 3 stages 4.80 (64/4 heads 9.58); 2 stages 5.27, in 128 registers 5.07; 128x128 5.06;
# 64x64 5.24; 128x32 5.73; 64x128 7.27.
LAUNCHES: dict[tuple[bool, int], Launch] = {
    (True, 64): Launch(128, 64, 4, 3),
    (True, 128): Launch(128, 64, 8, 3),
    (True, 256): Launch(64, 64, 4, 2),
    (False, 64): Launch(32, 32, 4, 1),
    (False, 128): Launch(32, 32, 4, 1),
    (False, 256): Launch(16, 16, 4, 1),
}
# With keys and values through descriptors, by the widest head dim. As above, 64/4 heads: in 128
# registers, so that two programs overlap, 8.64 (the best through pointers 9.50); without a limit
# 9.7 (3 stages), 11.0 (2); 4 warps 8.82; 128x128 9.86; 64x64 10.4. Heads of 256: 10.7, through
# pointers 15.1; of 64 no difference.
DESCRIBED_LAUNCHES: dict[int, Launch] = {
    128: Launch(128, 64, 8, 2, registers=128),
    256: Launch(64, 64, 4, 2),
}


@triton.jit
def _steps(
    acc, top, total, q, y, u, batch, head, some, start, stop, low, bound, count, scale, y_row,
    u_row, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, BN: tl.constexpr,
    PADDED: tl.constexpr, RANGED: tl.constexpr, DESCRIBED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, BN)
    for step in range(start, stop):
        c = step * BN + lane
        inside = c < count
        if MASKED and PADDED:  # what stands in a hidden block may be NaN: it must not be read
            inside = inside & (tl.load(some + c, mask=inside, other=0) != 0)
        keys = load_tile(
            y, batch, head, step * BN, lane, y_row, inside, D, DP, BN, MASKED, DESCRIBED
        )
        s = tl.dot(q, tl.trans(keys), input_precision="ieee")
        if MASKED:
            seen = inside[None, :] & (c[None, :] < bound[:, None])
            if RANGED:
                seen = seen & (c[None, :] >= low[:, None])
            s = tl.where(seen, s * scale, float("-inf"))
            new_top = tl.maximum(top, tl.max(s, 1))
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            p = tl.exp2(s - base[:, None])
        else:
            new_top = tl.maximum(top, tl.max(s, 1) * scale)
            base = new_top
            p = tl.exp2(s * scale - base[:, None])
        fade = tl.exp2(top - base)
        total = total * fade + tl.sum(p, 1)
        values = load_tile(
            u, batch, head, step * BN, lane, u_row, inside, DV, DVP, BN, MASKED, DESCRIBED
        )
        acc = tl.dot(p.to(values.dtype), values, acc * fade[:, None], input_precision="ieee")
        top = new_top
    return acc, top, total


@triton.jit
def _forward(
    q, y, u, some, spans, spans_batch, out, lse, scale, q_heads, q_len, count, offset, chunks,
    q_batch, q_head, q_row, y_batch, y_head, y_row, u_batch, u_head, u_row, o_batch, o_head, o_row,
    G: tl.constexpr, CB: tl.constexpr, CD: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    DP: tl.constexpr, DVP: tl.constexpr, M: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
    PADDED: tl.constexpr, RANGED: tl.constexpr, NEGATIVE: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    chunk = (chunks - 1 - pid % chunks).to(tl.int32)  # the longest programs of a head first
    head = pid // chunks % q_heads
    batch = pid // chunks // q_heads
    row = tl.arange(0, M)
    first = chunk * M
    mine = first + row < q_len
    q_base = q + batch * q_batch + head * q_head + first.to(tl.int64) * q_row
    q_tile = load_rows(q_base, row, q_row, mine, D, DP, True)
    if NEGATIVE:
        q_tile = -q_tile
    low, bound = seen_blocks(
        spans + batch * spans_batch, first + row, mine, offset, count, CB, CD, CAUSAL, RANGED
    )
    start, full, stop = steps(
        low, bound, first, M, q_len, count, offset, BN, CB, CD, CAUSAL, PADDED, RANGED
    )
    shared = head // G
    y_base = head_rows(y, batch, shared, y_batch, y_head, DESCRIBED)
    u_base = head_rows(u, batch, shared, u_batch, u_head, DESCRIBED)
    where = batch.to(tl.int32), shared.to(tl.int32)
    some_base = some + batch * count
    acc = tl.zeros([M, DVP], tl.float32)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc, top, total = _steps(
        acc, top, total, q_tile, y_base, u_base, where[0], where[1], some_base, start, full, low,
        bound, count, scale, y_row, u_row, D, DV, DP, DVP, BN, PADDED, RANGED, DESCRIBED, False,
    )  # fmt: skip
    acc, top, total = _steps(
        acc, top, total, q_tile, y_base, u_base, where[0], where[1], some_base, full, stop, low,
        bound, count, scale, y_row, u_row, D, DV, DP, DVP, BN, PADDED, RANGED, DESCRIBED, True,
    )  # fmt: skip
    alive = total > 0
    total = tl.where(alive, total, 1.0)
    log_sum = tl.where(alive, (top + tl.log2(total)) * 0.6931471805599453, float("-inf"))
    o_base = out + batch * o_batch + head * o_head + first.to(tl.int64) * o_row
    store_rows(o_base, row, o_row, mine, acc / total[:, None], DV, DVP)
    tl.store(lse + (batch * q_heads + head) * q_len + first + row, log_sum, mask=mine)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, count: int, site: Site
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [B, Hq, Tq, Dv] in q's dtype, token-major, and lse [B, Hq, Tq] in float32."""
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    batch, q_heads, q_len, dim = q.shape
    value_dim = v.shape[3]
    out = empty_token_major(q, batch, q_heads, q_len, value_dim)
    lse = q.new_empty(batch, q_heads, q_len, dtype=torch.float32)
    some, spans = site.holds(count), site.spans(count)
    widest = max(64, padded_dim(max(dim, value_dim)))
    # What stands in a hidden block may be NaN: only pointers can leave it unread.
    fast = DESCRIBED_LAUNCHES.get(widest) if some is None and describable(k, v) else None
    launch = fast or LAUNCHES[q.element_size() == 2, widest]
    keys, values = k, v
    if fast:
        keys = describe(k, (1, 1, launch.keys, padded_dim(dim)), count)
        values = describe(v, (1, 1, launch.keys, padded_dim(value_dim)), count)
    chunks = triton.cdiv(q_len, launch.rows)
    _forward[(chunks * q_heads * batch,)](
        q, keys, values, q if some is None else some.to(torch.uint8).contiguous(),
        *spans_argument(spans, q), out, lse, abs(site.scale) * LOG2_E, q_heads, q_len, count,
        site.offset, chunks, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        G=q_heads // k.shape[1], CB=site.block, CD=site.stride, D=dim, DV=value_dim,
        DP=padded_dim(dim), DVP=padded_dim(value_dim), M=launch.rows, BN=launch.keys,
        CAUSAL=site.causal, PADDED=some is not None, RANGED=spans is not None,
        NEGATIVE=site.scale < 0, DESCRIBED=fast is not None, num_warps=launch.warps,
        num_stages=launch.stages, maxnreg=launch.registers,
    )  # fmt: skip
    return out, lse
