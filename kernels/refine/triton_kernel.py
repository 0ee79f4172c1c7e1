"""Triton kernel that weighs listed blocks of keys by their exact logits.

    x_ib = max_{j in b, j seen by i} scale q_i.k_j,  b over the free candidates of i's tile
    score_tb = max_{i in t, heads} exp(x_ib) / sum_b' exp(x_ib')

A program owns M rows of one tile (head-major, as in attention over selected blocks) and keeps their
logits, one a candidate, in registers. Exponentials are base 2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nsa_compile.kernels.attend.triton_rows import Launch, program_rows, warps_for
from nsa_compile.kernels.modifiers import Modifiers
from nsa_compile.kernels.refine.ranking import best_candidates, forced_candidates
from nsa_compile.kernels.triton_site import (
    LOG2_E,
    capped,
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
from nsa_compile.kernels.visibility import Visibility

# By sixteen-bit inputs and head dim padded to a power of two.
LAUNCHES: dict[tuple[bool, int], Launch] = {
    (True, 64): Launch(128, 64, 4, 3),
    (True, 128): Launch(128, 64, 8, 3),
    (True, 256): Launch(64, 64, 4, 2),
    (False, 64): Launch(32, 32, 4, 1),
    (False, 128): Launch(32, 32, 4, 1),
    (False, 256): Launch(16, 16, 4, 1),
}


@triton.jit
def _listed_logits(
    best, q, k, valid, ids, start, stop, position, scale, kv_len, window, k_row, valid_row, row_low,
    row_high, segment, slope, place, key_segments, positions, cap, D: tl.constexpr,
    DP: tl.constexpr, L: tl.constexpr, BN: tl.constexpr, SLOTS: tl.constexpr, M: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PADDED: tl.constexpr, RANGED: tl.constexpr,
    SEGMENTED: tl.constexpr, SLOPED: tl.constexpr, PLACED: tl.constexpr, CAPPED: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Logits of the candidates [start, stop) of a tile, each written to its column of ``best``."""
    pieces: tl.constexpr = (L + BN - 1) // BN
    lane = tl.arange(0, BN)
    column = tl.arange(0, DP)
    slot = tl.arange(0, SLOTS)
    for step in range(start * pieces, stop * pieces):
        at = step // pieces
        within = step % pieces * BN
        key = tl.load(ids + at) * L + within + lane
        pointers = k + key.to(tl.int64)[:, None] * k_row + column[None, :]
        inside = (within + lane < L) & (key < kv_len)
        if MASKED or DP != D or BN > L:
            tile = tl.load(pointers, mask=inside[:, None] & (column < D)[None, :], other=0.0)
        else:
            tile = tl.load(pointers)
        s = tl.dot(q, tl.trans(tile), input_precision="ieee")
        if SLOPED:
            s = s * scale
            if CAPPED:
                s = capped(s, cap)
            away = place_of(key, positions, kv_len, SLOPED, PLACED)[None, :] - place[:, None]
            s = s + slope[:, None] * away
        if MASKED:
            seen = visible(position[:, None], key[None, :], kv_len, window, CAUSAL, WINDOWED)
            seen = seen & inside[None, :]
            seen = seen_in_terms(
                seen, key, inside, row_low, row_high, segment, key_segments, RANGED, SEGMENTED
            )
            if PADDED:
                real = tl.load(valid + key.to(tl.int64) * valid_row, mask=inside, other=0)
                seen = seen & (real != 0)[None, :]
            s = tl.where(seen, s, float("-inf"))
        elif BN > L:
            s = tl.where(inside[None, :], s, float("-inf"))
        x = tl.max(s, 1)
        if not SLOPED:
            x = x * scale
            if CAPPED:  # without slopes the cap is monotone
                x = capped(x, cap)
        best = tl.where((slot == at)[None, :], tl.maximum(best, x[:, None]), best)
    return best


@triton.jit
def _listed_scores(
    q, k, valid, ids, counts, part, scale, tiles, kv_heads, q_len, kv_len, offset, window,
    q_batch, q_head, q_row, k_batch, k_head, k_row, valid_batch, valid_row, ranges, ranges_batch,
    query_segments, query_segments_batch, key_segments, key_segments_batch, slopes, positions,
    positions_batch, cap, G: tl.constexpr, N: tl.constexpr, R: tl.constexpr, L: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, BN: tl.constexpr, SLOTS: tl.constexpr,
    CHUNKS: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PADDED: tl.constexpr,
    RANGED: tl.constexpr, SEGMENTED: tl.constexpr, SLOPED: tl.constexpr, PLACED: tl.constexpr,
    CAPPED: tl.constexpr, NEGATIVE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    chunk = (pid % CHUNKS).to(tl.int32)
    entry = pid // CHUNKS
    tile = (entry % tiles).to(tl.int32)
    pair = entry // tiles
    batch = pair // kv_heads
    kv_head = pair % kv_heads
    row = chunk * M + tl.arange(0, M)
    head = kv_head * G + row // R
    query = tile * R + row % R
    mine = (row < G * R) & (query < q_len)
    column = tl.arange(0, DP)
    pointers = (
        q
        + batch * q_batch
        + (head * q_head + query.to(tl.int64) * q_row)[:, None]
        + column[None, :]
    )
    q_tile = tl.load(pointers, mask=mine[:, None] & (column < D)[None, :], other=0.0)
    if NEGATIVE:
        q_tile = -q_tile
    position = query + offset
    row_low, row_high = row_range(ranges + batch * ranges_batch, query, mine, RANGED)
    segment = row_segment(query_segments + batch * query_segments_batch, query, mine, SEGMENTED)
    segments = key_segments + batch * key_segments_batch
    slope = row_slope(slopes, head, mine, SLOPED)
    places = positions + batch * positions_batch
    place = place_of(position, places, kv_len, SLOPED, PLACED)
    k_base = k + batch * k_batch + kv_head * k_head
    valid_base = valid + batch * valid_batch
    ids_base = ids + entry * N
    full = tl.load(counts + entry * 2)
    count = tl.load(counts + entry * 2 + 1)
    best = tl.full([M, SLOTS], float("-inf"), tl.float32)
    best = _listed_logits(
        best, q_tile, k_base, valid_base, ids_base, 0, full, position, scale, kv_len, window, k_row,
        valid_row, row_low, row_high, segment, slope, place, segments, places, cap, D, DP, L, BN,
        SLOTS, M, CAUSAL, WINDOWED, PADDED, RANGED, SEGMENTED, SLOPED, PLACED, CAPPED, False,
    )  # fmt: skip
    best = _listed_logits(
        best, q_tile, k_base, valid_base, ids_base, full, count, position, scale, kv_len, window,
        k_row, valid_row, row_low, row_high, segment, slope, place, segments, places, cap, D, DP, L,
        BN, SLOTS, M, CAUSAL, WINDOWED, PADDED, RANGED, SEGMENTED, SLOPED, PLACED, CAPPED, True,
    )  # fmt: skip
    top = tl.max(best, 1)
    weight = tl.exp2(best - tl.where(top == float("-inf"), 0.0, top)[:, None])
    total = tl.sum(weight, 1)
    share = tl.where(mine & (total > 0), 1.0 / tl.where(total > 0, total, 1.0), 0.0)
    score = tl.max(weight * share[:, None], 0)
    tl.store(part + pid * SLOTS + tl.arange(0, SLOTS), score)


def refine_blocks(
    q: torch.Tensor, k: torch.Tensor, candidates: torch.Tensor, visibility: Visibility,
    modifiers: Modifiers, scale: float, causal: bool, offset: int, window: int | None,
    query_tile: int, block: int, num_selected: int, init_blocks: int, local_window: int,
) -> torch.Tensor:  # fmt: skip
    """int32 [B, Hkv, NT, n] out of ``candidates`` [B, Hkv, NT, m], ascending, -1 padded."""
    valid, extra = visibility.valid, terms(visibility, modifiers, q)
    batch, q_heads, q_len, dim = q.shape
    kv_heads, kv_len = k.shape[1:3]
    q, k = dense_rows(q), dense_rows(k)
    group, tiles, listed = q_heads // kv_heads, candidates.shape[2], candidates.shape[3]
    forced = forced_candidates(
        candidates, q_len, causal, offset, query_tile, block, init_blocks, local_window
    )
    # Free candidates first, still ascending: those every row sees in full need no mask.
    free = (candidates >= 0) & ~forced
    order = (~free).to(torch.int8).sort(dim=-1, stable=True).indices
    ids = candidates.gather(-1, order).contiguous()
    full = free.new_zeros(free.shape)
    if window is None and visibility.unlimited:
        first = torch.arange(tiles, device=q.device)[:, None] * query_tile + offset
        end = (candidates + 1) * block
        full = free & (end <= kv_len)
        if causal:
            full &= end - 1 <= first
    counts = torch.stack((full.sum(-1), free.sum(-1)), dim=-1).to(torch.int32).contiguous()
    padded = max(16, triton.next_power_of_2(dim))
    launch = LAUNCHES[q.element_size() == 2, max(64, padded)]
    rows = program_rows(launch.rows, group, query_tile)
    chunks = triton.cdiv(group * query_tile, rows)
    slots = max(16, triton.next_power_of_2(listed))
    part = q.new_empty(batch, kv_heads, tiles, chunks, slots, dtype=torch.float32)
    _listed_scores[(batch * kv_heads * tiles * chunks,)](
        q, k, mask_pointer(valid, q), ids, counts, part,
        abs(scale) * LOG2_E, tiles, kv_heads, q_len, kv_len, offset, window or 0,
        *q.stride()[:3], *k.stride()[:3], *mask_strides(valid),
        *extra.arguments, G=group, N=listed, R=query_tile, L=block, D=dim, DP=padded, M=rows,
        BN=launch.keys, SLOTS=slots, CHUNKS=chunks, CAUSAL=causal, WINDOWED=window is not None,
        PADDED=valid is not None, **extra.flags, NEGATIVE=scale < 0,
        num_warps=warps_for(launch, rows), num_stages=launch.stages,
    )  # fmt: skip
    weights = part.amax(dim=3)[..., :listed]
    scores = torch.zeros_like(weights).scatter_(-1, order, weights)
    return best_candidates(candidates, forced, scores, num_selected)
