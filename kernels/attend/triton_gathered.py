"""Triton kernels of token-granular selected attention: a block of keys gathers its readers.

A program per query reads n blocks of keys for G rows, which starves the tensor cores and reads keys
from the cache n * L / G times as often as queries. Here a program holds one block b and gathers the
rows that chose it. What it leaves behind for row i, and how the slots of i meet:

    lse_ib = log sum_(j in b) exp(s_ij),  o_ib = sum_(j in b) exp(s_ij - lse_ib) v_j
    lse_i = log sum_b exp(lse_ib),  o_i = sum_b exp(lse_ib - lse_i) o_ib

Blocks that neighbouring queries share go to the tile kernel, whose result is one more o_ib.
The gradient of the queries is made the same way, dq_i = sum_b dq_ib; nothing is atomic.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from nsa_compile.kernels.attend.gate import Gate, weights_of
from nsa_compile.kernels.attend.site import Site
from nsa_compile.kernels.attend.triton_readers import (
    Readers,
    Sizes,
    Split,
    readers_of,
    sizes_of,
    split_lists,
)
from nsa_compile.kernels.attend.triton_rows import load_rows, padded_dim, store_rows
from nsa_compile.kernels.triton_site import LOG2_E, mask_pointer, mask_strides, visible


class Launch(NamedTuple):
    """Rows a step, warps, pipeline stages and most registers of a gathering kernel."""

    rows: int
    warps: int
    stages: int
    registers: int | None = None


# By kernel, whether inputs have sixteen bits, and the widest head dim padded to a power of two.
LAUNCHES: dict[tuple[str, bool, int], Launch] = {
    ("forward", True, 64): Launch(128, 4, 2),
    ("forward", True, 128): Launch(64, 4, 2),
    ("forward", True, 256): Launch(64, 8, 1),
    ("query", True, 64): Launch(64, 4, 2),
    ("query", True, 128): Launch(64, 4, 2),
    ("query", True, 256): Launch(32, 8, 1),
    ("forward", False, 64): Launch(32, 4, 1),
    ("forward", False, 128): Launch(32, 4, 1),
    ("forward", False, 256): Launch(16, 4, 1),
    ("query", False, 64): Launch(32, 4, 1),
    ("query", False, 128): Launch(16, 4, 1),
    ("query", False, 256): Launch(16, 4, 1),
}
# Bytes that entries leave behind at one time: no more than the queries take, or than the lower
# bound, which keeps launches few. One H100, 65,536 tokens, 32/8 heads of 128, forward, ms: 512 MB
# 9.6, 256 MB 10.1, 64 MB 13.0.
SCRATCH_BYTES, LEAST_SCRATCH = 1 << 29, 1 << 26
# Rows of one work item: enough to pay for loading a block of keys.
PIECE_ROWS = 1024
# Shorter inputs are launches, not work; tiles with more rows feed the tensor cores themselves.
LEAST_QUERIES = 1024
MOST_ROWS = 16


def serves(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, site: Site) -> bool:
    """Whether gathering is faster than a program for each tile, and the terms are known to it."""
    rows = q.shape[1] // k.shape[1] * site.query_tile
    width = triton.next_power_of_2(site.block) * padded_dim(max(q.shape[3], v.shape[3]))
    return (
        site.like_sdpa and site.query_tile < 16 and rows <= MOST_ROWS
        and q.shape[2] >= LEAST_QUERIES and width <= 64 * 256 and k.shape[2] > 0 and q.numel() > 0
    )  # fmt: skip


@triton.jit
def _item(
    entries, starts, item_first, item_block, segment, item, items, length, blocks,
    PIECE: tl.constexpr,
):  # fmt: skip
    """Block of a work item, where its entries start, and how many there are (0: unused)."""
    block = tl.load(item_block + segment * items + item)
    used = block < blocks
    at = segment * (blocks + 1) + tl.minimum(block, blocks - 1)
    piece = item - tl.load(item_first + at)
    begin = tl.load(starts + at) + piece * PIECE
    end = tl.minimum(tl.load(starts + at + 1), begin + PIECE)
    count = tl.where(used, tl.maximum(end - begin, 0), 0)
    return block, entries + segment * length + begin, count.to(tl.int32)


@triton.jit
def _block_rows(
    valid, block, kv_len, valid_row, L: tl.constexpr, LP: tl.constexpr, PADDED: tl.constexpr
):
    """Keys of a block and which of them are there: past the end and in padding nothing is read."""
    lane = tl.arange(0, LP)
    key = block * L + lane
    inside = (lane < L) & (key < kv_len)
    if PADDED:
        inside = inside & (tl.load(valid + key.to(tl.int64) * valid_row, mask=inside, other=0) != 0)
    return key, inside


@triton.jit
def _is_cut(
    list_base, inside, block, first_tile, offset, L: tl.constexpr, LP: tl.constexpr,
    N: tl.constexpr, R: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Whether some reader may not see some key; readers ascend, so the first is the earliest."""
    cut = tl.sum(inside.to(tl.int32)) < L
    if CAUSAL:
        first = (first_tile + tl.load(list_base) // N) * R + offset
        cut = cut | (first < block * L + L - 1)
    if WINDOWED or L != LP:
        cut = cut | True
    return cut


@triton.jit
def _row(
    list_base, here, rows, first_tile, q_len, G: tl.constexpr, N: tl.constexpr, R: tl.constexpr
):
    """Of each row: its place among what entries leave behind, head of the group, query, in use."""
    within = here % (G * R)
    entry = tl.load(list_base + here // (G * R), mask=here < rows, other=0)
    query = (first_tile + entry // N) * R + within % R
    mine = (here < rows) & (query < q_len)
    return entry.to(tl.int64) * (G * R) + within, within // R, query, mine


@triton.jit
def _forward_steps(
    q, k_tile, v_tile, part, part_lse, list_base, rows, key, inside, first_tile, scale, q_len,
    kv_len, offset, window, q_head, q_row, G: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, M: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    for start in range(0, rows, M):
        place, head, query, mine = _row(
            list_base, start + tl.arange(0, M), rows, first_tile, q_len, G, N, R
        )
        q_rows = head.to(tl.int64) * q_head + query.to(tl.int64) * q_row
        q_tile = load_rows(q, q_rows, 1, mine, D, DP, True)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        if MASKED:
            seen = visible(
                (query + offset)[:, None], key[None, :], kv_len, window, CAUSAL, WINDOWED
            )
            s = tl.where(seen & inside[None, :], s * scale, float("-inf"))
            top = tl.max(s, 1)
            base = tl.where(top == float("-inf"), 0.0, top)
            p = tl.exp2(s - base[:, None])
        else:
            base = tl.max(s, 1) * scale
            p = tl.exp2(s * scale - base[:, None])
        total = tl.sum(p, 1)
        o = tl.dot(p.to(v_tile.dtype), v_tile, input_precision="ieee")
        o = o / tl.where(total > 0, total, 1.0)[:, None]
        store_rows(part, place * DV, 1, mine, o, DV, DVP)
        tl.store(part_lse + place, base + tl.log2(total), mask=mine)


@triton.jit(do_not_specialize=["first_segment"])
def _forward(
    q, k, v, valid, entries, starts, item_first, item_block, part, part_lse, scale, first_segment,
    segments, segment_tiles, kv_heads, q_len, kv_len, offset, window, blocks, items, length,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, valid_batch, valid_row,
    G: tl.constexpr, N: tl.constexpr, R: tl.constexpr, L: tl.constexpr, LP: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, M: tl.constexpr,
    PIECE: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PADDED: tl.constexpr,
    NEGATIVE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    local = pid // items
    segment = first_segment + local
    block, list_base, count = _item(
        entries, starts, item_first, item_block, segment, pid % items, items, length, blocks, PIECE
    )
    if count == 0:
        return
    pair = segment // segments
    first_tile = ((segment % segments) * segment_tiles).to(tl.int32)
    batch = pair // kv_heads
    kv_head = pair % kv_heads
    key, inside = _block_rows(valid + batch * valid_batch, block, kv_len, valid_row, L, LP, PADDED)
    k_tile = load_rows(k + batch * k_batch + kv_head * k_head, key, k_row, inside, D, DP, True)
    v_tile = load_rows(v + batch * v_batch + kv_head * v_head, key, v_row, inside, DV, DVP, True)
    if NEGATIVE:
        k_tile = -k_tile
    q += batch * q_batch + kv_head * G * q_head
    part += local * length * (G * R * DV)
    part_lse += local * length * (G * R)
    if _is_cut(list_base, inside, block, first_tile, offset, L, LP, N, R, CAUSAL, WINDOWED):
        _forward_steps(
            q, k_tile, v_tile, part, part_lse, list_base, count * (G * R), key, inside, first_tile,
            scale, q_len, kv_len, offset, window, q_head, q_row, G, N, R, D, DV, DP, DVP, M, CAUSAL,
            WINDOWED, True,
        )  # fmt: skip
    else:
        _forward_steps(
            q, k_tile, v_tile, part, part_lse, list_base, count * (G * R), key, inside, first_tile,
            scale, q_len, kv_len, offset, window, q_head, q_row, G, N, R, D, DV, DP, DVP, M, CAUSAL,
            WINDOWED, False,
        )  # fmt: skip


@triton.jit
def _merged_row(
    left, local, segment, segments, segment_tiles, length, kv_heads, q_len, G: tl.constexpr,
    N: tl.constexpr, R: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Rows of one program that meets what entries left behind; see ``_row``."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    tile = row // (G * R)
    within = row % (G * R)
    query = ((segment % segments).to(tl.int32) * segment_tiles + tile) * R + within % R
    mine = (tile < segment_tiles) & (query < q_len)
    pair = segment // segments
    head = (pair % kv_heads) * G + within // R
    slots = tile.to(tl.int64) * N
    return pair // kv_heads, head, query, mine, slots, local * length + slots, within


@triton.jit(do_not_specialize=["first_segment"])
def _merge(
    out, lse, part, part_lse, left, first_segment, segments, segment_tiles, length, blocks,
    kv_heads, q_len, o_batch, o_head, o_row, G: tl.constexpr, N: tl.constexpr,
    N_PAD: tl.constexpr, R: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Adds what entries left behind to ``out`` and ``lse`` of the shared blocks."""
    local = tl.program_id(1).to(tl.int64)
    segment = first_segment + local
    batch, head, query, mine, slots, first, within = _merged_row(
        left, local, segment, segments, segment_tiles, length, kv_heads, q_len, G, N, R, BM
    )
    listed = left + segment * length + slots
    place = (batch * kv_heads * G + head) * q_len + query
    mine_lse = tl.load(lse + place, mask=mine, other=float("-inf")) * 1.4426950408889634
    slot = tl.arange(0, N_PAD)
    there = mine[:, None] & (slot < N)[None, :]
    used = tl.load(listed[:, None] + slot[None, :], mask=there, other=blocks) < blocks
    spots = (first[:, None] + slot[None, :]) * (G * R) + within[:, None]
    logs = tl.load(part_lse + spots, mask=used, other=float("-inf"))
    top = tl.maximum(mine_lse, tl.max(logs, 1))
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.exp2(mine_lse - base) + tl.sum(tl.exp2(logs - base[:, None]), 1)
    o_rows = head.to(tl.int64) * o_head + query.to(tl.int64) * o_row
    out += batch * o_batch
    acc = load_rows(out, o_rows, 1, mine, DV, DVP, True).to(tl.float32)
    acc = acc * tl.exp2(mine_lse - base)[:, None]
    for n in range(0, N):
        alive = tl.load(listed + n, mask=mine, other=blocks) < blocks
        spot = (first + n) * (G * R) + within
        weight = tl.exp2(tl.load(part_lse + spot, mask=alive, other=float("-inf")) - base)
        piece = load_rows(part, spot * DV, 1, alive, DV, DVP, True)
        acc += weight[:, None] * piece.to(tl.float32)
    alive = total > 0
    total = tl.where(alive, total, 1.0)
    store_rows(out, o_rows, 1, mine, acc / total[:, None], DV, DVP)
    log_sum = tl.where(alive, (base + tl.log2(total)) * 0.6931471805599453, float("-inf"))
    tl.store(lse + place, log_sum, mask=mine)


@triton.jit
def _query_steps(
    q, do, lse, delta, k_tile, v_tile, part, list_base, rows, key, inside, first_tile, scale,
    signed_scale, q_len, kv_len, offset, window, q_head, q_row, do_head, do_row, gate,
    G: tl.constexpr, N: tl.constexpr, R: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    DP: tl.constexpr, DVP: tl.constexpr, M: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr, GATED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    for start in range(0, rows, M):
        place, head, query, mine = _row(
            list_base, start + tl.arange(0, M), rows, first_tile, q_len, G, N, R
        )
        head = head.to(tl.int64)
        row = query.to(tl.int64)
        q_tile = load_rows(q, head * q_head + row * q_row, 1, mine, D, DP, True)
        do_tile = load_rows(do, head * do_head + row * do_row, 1, mine, DV, DVP, True)
        log_sum = tl.load(lse + head * q_len + row, mask=mine, other=float("-inf"))
        log_sum = tl.where(log_sum == float("-inf"), float("inf"), log_sum * 1.4426950408889634)
        difference = tl.load(delta + head * q_len + row, mask=mine, other=0.0)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        dp = tl.dot(do_tile, tl.trans(v_tile), input_precision="ieee")
        p = tl.exp2(s * scale - log_sum[:, None])
        ds = p * (dp - difference[:, None])
        if MASKED:
            seen = visible(
                (query + offset)[:, None], key[None, :], kv_len, window, CAUSAL, WINDOWED
            )
            ds = tl.where(seen & inside[None, :], ds, 0.0)
        dq = tl.dot(ds.to(k_tile.dtype), k_tile, input_precision="ieee")
        dq = dq * signed_scale
        if GATED:
            dq = dq * tl.load(gate + head * q_len + row, mask=mine, other=0.0)[:, None]
        store_rows(part, place * D, 1, mine, dq, D, DP)


@triton.jit(do_not_specialize=["first_segment"])
def _query_gradient(
    q, k, v, do, lse, delta, valid, entries, starts, item_first, item_block, part, scale,
    first_segment, segments, segment_tiles, kv_heads, q_len, kv_len, offset, window, blocks, items,
    length, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, do_batch,
    do_head, do_row, gate, valid_batch, valid_row, G: tl.constexpr, N: tl.constexpr,
    R: tl.constexpr, L: tl.constexpr, LP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    DP: tl.constexpr, DVP: tl.constexpr, M: tl.constexpr, PIECE: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr, PADDED: tl.constexpr, NEGATIVE: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    local = pid // items
    segment = first_segment + local
    block, list_base, count = _item(
        entries, starts, item_first, item_block, segment, pid % items, items, length, blocks, PIECE
    )
    if count == 0:
        return
    pair = segment // segments
    first_tile = ((segment % segments) * segment_tiles).to(tl.int32)
    batch = pair // kv_heads
    kv_head = pair % kv_heads
    key, inside = _block_rows(valid + batch * valid_batch, block, kv_len, valid_row, L, LP, PADDED)
    k_tile = load_rows(k + batch * k_batch + kv_head * k_head, key, k_row, inside, D, DP, True)
    v_tile = load_rows(v + batch * v_batch + kv_head * v_head, key, v_row, inside, DV, DVP, True)
    if NEGATIVE:  # of both k and the sign of its sum: the two cancel in dq
        k_tile = -k_tile
    q += batch * q_batch + kv_head * G * q_head
    do += batch * do_batch + kv_head * G * do_head
    gate += pair * G * q_len
    lse += pair * G * q_len
    delta += pair * G * q_len
    part += local * length * (G * R * D)
    plain_scale = scale * 0.6931471805599453
    if _is_cut(list_base, inside, block, first_tile, offset, L, LP, N, R, CAUSAL, WINDOWED):
        _query_steps(
            q, do, lse, delta, k_tile, v_tile, part, list_base, count * (G * R), key, inside,
            first_tile, scale, plain_scale, q_len, kv_len, offset, window, q_head, q_row, do_head,
            do_row, gate, G, N, R, D, DV, DP, DVP, M, CAUSAL, WINDOWED, GATED,
            True,
        )  # fmt: skip
    else:
        _query_steps(
            q, do, lse, delta, k_tile, v_tile, part, list_base, count * (G * R), key, inside,
            first_tile, scale, plain_scale, q_len, kv_len, offset, window, q_head, q_row, do_head,
            do_row, gate, G, N, R, D, DV, DP, DVP, M, CAUSAL, WINDOWED, GATED,
            False,
        )  # fmt: skip


@triton.jit(do_not_specialize=["first_segment"])
def _add(
    dq, part, left, first_segment, segments, segment_tiles, length, blocks, kv_heads, q_len,
    dq_batch, dq_head, dq_row, G: tl.constexpr, N: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Adds what entries left behind to the ``dq`` of the shared blocks."""
    local = tl.program_id(1).to(tl.int64)
    segment = first_segment + local
    batch, head, query, mine, slots, first, within = _merged_row(
        left, local, segment, segments, segment_tiles, length, kv_heads, q_len, G, N, R, BM
    )
    listed = left + segment * length + slots
    rows = head.to(tl.int64) * dq_head + query.to(tl.int64) * dq_row
    dq += batch * dq_batch
    acc = load_rows(dq, rows, 1, mine, D, DP, True).to(tl.float32)
    for n in range(0, N):
        alive = tl.load(listed + n, mask=mine, other=blocks) < blocks
        piece = load_rows(part, ((first + n) * (G * R) + within) * D, 1, alive, D, DP, True)
        acc += piece.to(tl.float32)
    store_rows(dq, rows, 1, mine, acc, D, DP)


Tiled = Callable[[torch.Tensor, Site], tuple[torch.Tensor, torch.Tensor]]


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_indices: torch.Tensor, site: Site,
    tiled: Tiled,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """out and lse; ``tiled(lists, site)`` is the tile kernel's answer for the shared blocks."""
    work = _Work(q, k, v, block_indices, site, "forward", v.shape[3])
    out, lse = tiled(work.split.shared, work.grouped_site)
    part_lse = q.new_empty(work.scratch_rows, dtype=torch.float32)
    for first, count in work.sizes.rounds():
        _forward[(count * work.readers.items,)](
            q, k, v, mask_pointer(site.valid, q), *work.readers[:4], work.part, part_lse,
            *work.arguments(first), *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            *mask_strides(site.valid), **work.constants, **work.launched,
        )  # fmt: skip
        _merge[work.merging(count)](
            out, lse, work.part, part_lse, work.split.left, *work.merged(first), *out.stride()[:3],
            **work.rows_constants, N_PAD=triton.next_power_of_2(work.sizes.width), DV=v.shape[3],
            DVP=padded_dim(v.shape[3]), num_warps=4,
        )  # fmt: skip
    return out, lse


def query_gradient(
    grad_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lse: torch.Tensor,
    delta: torch.Tensor, gate: Gate | None, dq: torch.Tensor, block_indices: torch.Tensor,
    site: Site, tiled: Callable[[torch.Tensor, Site], object],
) -> torch.Tensor:  # fmt: skip
    """Fills dq and delta; returns the lists without repeated blocks and those that nobody sees.

    ``tiled(lists, site)`` does it for the shared blocks.
    """
    work = _Work(q, k, v, block_indices, site, "query", q.shape[3])
    tiled(work.split.shared, work.grouped_site)
    for first, count in work.sizes.rounds():
        _query_gradient[(count * work.readers.items,)](
            q, k, v, grad_out, lse, delta, mask_pointer(site.valid, q), *work.readers[:4],
            work.part, *work.arguments(first), *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            *grad_out.stride()[:3], weights_of(gate, lse), *mask_strides(site.valid),
            **work.constants, **work.launched, GATED=gate is not None,
        )  # fmt: skip
        _add[work.merging(count)](
            dq, work.part, work.split.left, *work.merged(first), *dq.stride()[:3],
            **work.rows_constants, D=q.shape[3], DP=padded_dim(q.shape[3]), num_warps=4,
        )  # fmt: skip
    return work.split.kept


class _Work:
    """Lists, scratch memory and the arguments of the kernels of one direction."""

    MERGED_ROWS = 16

    def __init__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_indices: torch.Tensor,
        site: Site, kernel: str, width: int,
    ) -> None:  # fmt: skip
        group, kv_len = q.shape[1] // k.shape[1], k.shape[2]
        self.q, self.k, self.site = q, k, site
        self.blocks = triton.cdiv(kv_len, site.block)
        scratch = min(SCRATCH_BYTES, max(LEAST_SCRATCH, q.numel() * q.element_size()))
        self.sizes: Sizes = sizes_of(
            block_indices, group, site.query_tile, width * q.element_size(), scratch
        )
        self.split: Split = split_lists(
            block_indices, q.shape[2], kv_len, site, self.sizes, kernel == "query"
        )
        piece = max(1, PIECE_ROWS // self.sizes.rows)
        self.readers: Readers = readers_of(self.split.left, self.blocks, piece)
        self.scratch_rows = self.sizes.batch * self.sizes.entries * self.sizes.rows
        self.part = q.new_empty(self.scratch_rows * width)
        query_tile = self.sizes.together * site.query_tile
        self.grouped_site = dataclasses.replace(site, query_tile=query_tile)
        dim, value_dim = q.shape[3], v.shape[3]
        padded = padded_dim(dim), padded_dim(value_dim)
        launch = LAUNCHES[kernel, q.element_size() == 2, max(64, *padded)]
        self.launched = {"num_warps": launch.warps, "num_stages": launch.stages,
                         "maxnreg": launch.registers}  # fmt: skip
        self.constants: dict[str, Any] = {
            "G": group, "N": self.sizes.width, "R": site.query_tile, "L": site.block,
            "LP": max(16, triton.next_power_of_2(site.block)), "D": dim, "DV": value_dim,
            "DP": padded[0], "DVP": padded[1], "M": launch.rows, "PIECE": piece,
            "CAUSAL": site.causal, "WINDOWED": site.window is not None,
            "PADDED": site.valid is not None, "NEGATIVE": site.scale < 0,
        }  # fmt: skip
        self.rows_constants = {"G": group, "N": self.sizes.width, "R": site.query_tile,
                               "BM": self.MERGED_ROWS}  # fmt: skip

    def arguments(self, first: int) -> tuple[Any, ...]:
        """From scale to length, for the round that starts with segment ``first``."""
        site, sizes = self.site, self.sizes
        return (
            abs(site.scale) * LOG2_E, first, sizes.segments, sizes.segment, self.k.shape[1],
            self.q.shape[2], self.k.shape[2], site.offset, site.window or 0, self.blocks,
            self.readers.items, sizes.entries,
        )  # fmt: skip

    def merged(self, first: int) -> tuple[int, ...]:
        """From first_segment to q_len of a kernel that meets what entries left behind."""
        sizes = self.sizes
        return (
            first, sizes.segments, sizes.segment, sizes.entries, self.blocks, self.k.shape[1],
            self.q.shape[2],
        )  # fmt: skip

    def merging(self, segments: int) -> tuple[int, int]:
        rows = self.sizes.segment * self.sizes.rows
        return triton.cdiv(rows, self.MERGED_ROWS), segments
