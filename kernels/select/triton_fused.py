"""Triton kernel that scores and picks in one go, for tiles of few queries: scorer "mean".

    worth_tb = sum_delta w_delta sum_{i in t, heads} exp(scale q_i.y_{b step + delta} - lse_i)

A program owns a few tiles of one kv head: M columns (member of the tile, tile; tile fastest), so
that the sum over a tile's members stays inside a thread. It goes through the blocks a chunk at a
time, and within a chunk through the compressed keys at the same place ``delta`` of every block, so
that a compressed key's share lands in its block's row with no exchange between rows. No [Tq, Nc] or
[Tq, Ns] matrix exists.

The n best so far wait in registers as 64-bit keys (score above reversed index: unique, ties to the
lower block). Of a chunk only blocks that beat the worst of them are taken, the largest first, as
often as the neediest tile of the program requires: about n ln(Ns) times, whatever the chunks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nsa_compile.kernels.score.triton_rows import Launch
from nsa_compile.kernels.select.triton_visible import seen_and_forced
from nsa_compile.kernels.triton_site import LOG2_E, dense_rows

# By whether inputs have sixteen bits, and the members of a tile (at least).
# One H100, 65,536 tokens, heads of 128, bfloat16, 32/16/64, 16 blocks, lse given, ms. 32/8 heads:
# 128x64 9.30, 2 stages 9.38, 64x64 11.0, 128x128 13.9, 256x64 23.9, in 168 registers 17.1. 64/4:
# 128x64 9.83, 128x128 14.3, 256x64 18.7. 32/32: 32x64 30.0, 64x64 37.4, 128x64 92.
LAUNCHES: dict[tuple[bool, int], Launch] = {
    (True, 1): Launch(32, 64, 4, 3),
    (True, 4): Launch(128, 64, 4, 3),
    (False, 1): Launch(32, 32, 4, 1),
}
# Most places for chosen blocks that a program holds: tiles x n.
MOST_PLACES = 4096
# Most members (heads x queries) of a tile that is scored here.
MOST_MEMBERS = 64

_NEVER = tl.constexpr(-(1 << 62))
_ALWAYS = tl.constexpr((1 << 63) - 1)


@triton.jit
def _worth(
    q_tile, log_sums, y, some, chunk, bound, scale, count, y_row, D: tl.constexpr, DP: tl.constexpr,
    NB: tl.constexpr, MEMBERS: tl.constexpr, TILES: tl.constexpr, CB: tl.constexpr,
    CD: tl.constexpr, L: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """[NB, TILES]: what the blocks of a chunk are worth to each tile."""
    back: tl.constexpr = (CB - 1) // CD
    lane = tl.arange(0, NB)
    column = tl.arange(0, DP)
    base = y + tl.full([], NB * (L // CD), tl.int64) * chunk * y_row
    worth = tl.zeros([NB, TILES], tl.float32)
    for place in range(0, L // CD + back):
        delta = tl.full([], -back, tl.int32) + place
        c = (chunk * NB + lane) * (L // CD) + delta
        inside = (c >= 0) & (c < count)
        if PADDED:  # what stands in a hidden block may be NaN: it must not be read
            inside = inside & (tl.load(some + c, mask=inside, other=0) != 0)
        pointers = base + (lane * (L // CD) + delta).to(tl.int64)[:, None] * y_row + column[None, :]
        keys = tl.load(pointers, mask=inside[:, None] & (column < D)[None, :], other=0.0)
        s = tl.dot(keys, tl.trans(q_tile), input_precision="ieee")
        p = tl.exp2(s * scale - log_sums[None, :])
        if MASKED:
            p = tl.where(c[:, None] < bound[None, :], p, 0.0)
        share = tl.sum(tl.reshape(p, [NB, MEMBERS, TILES]), 1)
        tokens = tl.minimum(delta * CD + CB, L) - tl.maximum(delta * CD, 0)
        worth += tl.where(inside[:, None], share * (tokens.to(tl.float32) / CD), 0.0)
    return worth


@triton.jit
def _merge(best, worth, seen, forced, block, n):
    """The best with the blocks of a chunk merged in; all [..., TILES], best in no order."""
    worth = tl.where(worth == worth, tl.minimum(worth, 3.0e38), 0.0)
    rank = tl.where(forced, 2147483647, worth.to(tl.int32, bitcast=True) + 1)
    key = (rank.to(tl.int64) << 32) | (2147483647 - block).to(tl.int64)
    key = tl.where(seen, key, _NEVER)
    worst = tl.min(best, 0)
    better = tl.sum((key > worst[None, :]).to(tl.int32), 0)
    last = tl.full([1, key.shape[1]], _ALWAYS, tl.int64)
    for _ in range(0, tl.minimum(tl.max(better, 0), n)):
        largest = tl.max(tl.where(key < last, key, _NEVER), 0)[None, :]
        worst = tl.min(best, 0)
        best = tl.where((best == worst[None, :]) & (largest > worst[None, :]), largest, best)
        last = largest
    return best


@triton.jit
def _chunk(
    best, q_tile, log_sums, y, some, before, batch, chunk, bound, first, last, scale, count, kv_len,
    init_blocks, local_window, n, y_row, D: tl.constexpr, DP: tl.constexpr, NB: tl.constexpr,
    MEMBERS: tl.constexpr, TILES: tl.constexpr, CB: tl.constexpr, CD: tl.constexpr,
    L: tl.constexpr, CAUSAL: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    worth = _worth(
        q_tile, log_sums, y, some, chunk, bound, scale, count, y_row, D, DP, NB, MEMBERS, TILES, CB,
        CD, L, PADDED, MASKED,
    )  # fmt: skip
    block = (chunk * NB + tl.arange(0, NB))[:, None]
    seen, forced = seen_and_forced(
        before, before, batch, block, first[None, :], last[None, :], kv_len, 0, init_blocks,
        local_window, 1, L, CAUSAL, False, PADDED, False,
    )  # fmt: skip
    return _merge(best, worth, seen, forced, block, n)


@triton.jit
def _score_and_pick(
    q, y, some, log_sums, before, picked, scale, kv_heads, q_len, kv_len, offset, blocks, count,
    tiles, groups, init_blocks, local_window, n, q_batch, q_head, q_row, y_batch, y_head, y_row,
    G: tl.constexpr, R: tl.constexpr, CB: tl.constexpr, CD: tl.constexpr, L: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, NB: tl.constexpr, HEADS: tl.constexpr, QUERIES: tl.constexpr,
    TILES: tl.constexpr, N_PAD: tl.constexpr, CAUSAL: tl.constexpr, PADDED: tl.constexpr,
    NEGATIVE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    group = (groups - 1 - pid % groups).to(tl.int32)  # the longest programs of a pair first
    pair = pid // groups
    batch = pair // kv_heads
    members: tl.constexpr = HEADS * QUERIES
    column = tl.arange(0, members * TILES)
    dim = tl.arange(0, DP)
    member = column // TILES
    head = member // QUERIES
    within = member % QUERIES
    tile = group * TILES + column % TILES
    query = tile * R + within
    mine = (head < G) & (within < R) & (query < q_len)
    q_base = q + batch * q_batch + pair % kv_heads * G * q_head
    q_rows = head.to(tl.int64) * q_head + query.to(tl.int64) * q_row
    inside = mine[:, None] & (dim < D)[None, :]
    q_tile = tl.load(q_base + q_rows[:, None] + dim[None, :], mask=inside, other=0.0)
    if NEGATIVE:
        q_tile = -q_tile
    sums = log_sums + (pair * G + head) * q_len + query
    log_sum = tl.load(sums, mask=mine, other=float("inf"))
    position = query + offset
    bound = position * 0 + count
    if CAUSAL:
        bound = tl.minimum(bound, tl.maximum(position + 1 - CB + CD, 0) // CD)
    own = group * TILES + tl.arange(0, TILES)
    first = own * R + offset
    last = tl.minimum(own * R + R, q_len) - 1 + offset
    start = group * TILES * R
    stop = tl.minimum(start + TILES * R, q_len) - 1 + offset
    chunks = start * 0 + (blocks + NB - 1) // NB
    full = chunks
    if CAUSAL:  # chunks that end before the first query, and that begin before the last
        chunks = tl.minimum(chunks, (stop // L + NB) // NB)
        chunks = tl.where(stop < 0, 0, chunks)
        complete = tl.maximum(start + offset + 1 - CB + CD, 0) // CD
        full = tl.minimum(chunks, complete // (NB * (L // CD)))
    y_base = y + batch * y_batch + pair % kv_heads * y_head
    some_base = some + batch * count
    slot = tl.arange(0, N_PAD)[:, None]
    # Empty places are below every key and differ; places behind the n-th are never given up.
    best = tl.where(slot < n, _NEVER + 1 + slot.to(tl.int64), _ALWAYS)
    best = best + tl.zeros([N_PAD, TILES], tl.int64)
    for chunk in range(0, full):
        best = _chunk(
            best, q_tile, log_sum, y_base, some_base, before, batch, chunk, bound, first, last,
            scale, count, kv_len, init_blocks, local_window, n, y_row, D, DP, NB, members, TILES,
            CB, CD, L, CAUSAL, PADDED, False,
        )  # fmt: skip
    for chunk in range(full, chunks):
        best = _chunk(
            best, q_tile, log_sum, y_base, some_base, before, batch, chunk, bound, first, last,
            scale, count, kv_len, init_blocks, local_window, n, y_row, D, DP, NB, members, TILES,
            CB, CD, L, CAUSAL, PADDED, CAUSAL,
        )  # fmt: skip
    index = 2147483647 - (best & 4294967295).to(tl.int32)
    index = tl.where((best > 0) & (slot < n), index, 2147483647)
    index = tl.sort(tl.trans(index), 1)
    index = tl.where(index == 2147483647, -1, index)
    place = tl.arange(0, N_PAD)[None, :]
    out = picked + (pair * tiles + own).to(tl.int64)[:, None] * n + place
    tl.store(out, index, mask=(own < tiles)[:, None] & (place < n))


def fits(group: int, query_tile: int, num_selected: int) -> bool:
    """Tiles that are scored here; longer ones sum their queries' mass in memory."""
    members = triton.next_power_of_2(group) * triton.next_power_of_2(query_tile)
    return members <= MOST_MEMBERS and num_selected <= MOST_PLACES // 16


def score_and_pick(
    q: torch.Tensor, compressed: torch.Tensor, some: torch.Tensor | None,
    before: torch.Tensor | None, log_sums: torch.Tensor, picked: torch.Tensor, kv_len: int,
    scale: float, causal: bool, offset: int, query_tile: int, block: int, init_blocks: int,
    local_window: int, compress_block: int, compress_stride: int,
) -> None:  # fmt: skip
    """Fill ``picked`` int32 [B, Hkv, NT, n]; ``log_sums`` as ``row_sums`` returns them."""
    q, compressed = dense_rows(q), dense_rows(compressed)
    batch, q_heads, q_len, dim = q.shape
    kv_heads, count = compressed.shape[1:3]
    tiles, num_selected = picked.shape[2:]
    heads = triton.next_power_of_2(q_heads // kv_heads)
    queries = triton.next_power_of_2(query_tile)
    members, padded = heads * queries, max(2, triton.next_power_of_2(num_selected))
    half = q.element_size() == 2
    launch = LAUNCHES[half, max(least for kind, least in LAUNCHES if kind == half
                                and least <= members)]  # fmt: skip
    columns = max(launch.rows, members)
    while columns // members * padded > MOST_PLACES:
        columns //= 2
    columns = max(16, members, columns)
    groups = triton.cdiv(tiles, columns // members)
    _score_and_pick[(batch * kv_heads * groups,)](
        q, compressed, q if some is None else some, log_sums, q if before is None else before,
        picked, abs(scale) * LOG2_E, kv_heads, q_len, kv_len, offset, triton.cdiv(kv_len, block),
        count, tiles, groups, init_blocks, local_window, num_selected, *q.stride()[:3],
        *compressed.stride()[:3], G=q_heads // kv_heads, R=query_tile, CB=compress_block,
        CD=compress_stride, L=block, D=dim, DP=max(16, triton.next_power_of_2(dim)),
        NB=launch.keys, HEADS=heads, QUERIES=queries, TILES=columns // members, N_PAD=padded,
        CAUSAL=causal, PADDED=some is not None, NEGATIVE=scale < 0,
        num_warps=launch.warps, num_stages=launch.stages, maxnreg=launch.registers,
    )  # fmt: skip
