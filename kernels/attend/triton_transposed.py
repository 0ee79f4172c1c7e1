"""Triton kernels of token-granular selected attention for large groups: a program a query.

The tensor cores multiply at least 64 rows, and a query with the heads of its group has 16. So the
keys of a block stand on the long side and the heads on the short one:

    s^T = K q^T,  p^T = exp(s^T - max),  o^T = V^T p^T;   dq^T = K^T ds^T

Gathering readers leaves G rows of output behind for every (query, block) pair; here a block's L
rows of keys and values are read instead, which costs the same whatever G is, so it suits large G.
Blocks that neighbouring queries share have gone to the tile kernel; its result is what a program
starts from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from nsa_compile.kernels.attend.site import Site
from nsa_compile.kernels.attend.triton_readers import Split, sizes_of, split_lists
from nsa_compile.kernels.attend.triton_rows import (
    load_rows,
    order_blocks,
    padded_dim,
    store_rows,
)
from nsa_compile.kernels.triton_site import LOG2_E, mask_pointer, mask_strides, visible


class Launch(NamedTuple):
    """Warps, pipeline stages and most registers of a kernel."""

    warps: int
    stages: int
    registers: int | None = None


# By kernel and the widest head dim padded to a power of two. One H100, 65,536 tokens, 64/4 heads
# of 128, bfloat16, 16 blocks of 64 of which 3 are shared, ms. Forward: 15.2, 3 stages 15.1, one
# 17.6, 96 registers 16.5, 8 warps 38. Query side: 15.0, 3 stages 15.2, one 20.4, 8 warps 37. Both
# read 110 GB of keys and values, 7 TB/s: the L2 cache is the likely limit (no counters were read).
LAUNCHES: dict[tuple[str, int], Launch] = {
    ("forward", 64): Launch(4, 2),
    ("forward", 128): Launch(4, 2),
    ("query", 64): Launch(4, 2),
    ("query", 128): Launch(4, 2),
}
LEAST_QUERIES = 1024
# At 16 rows gathering takes 15.5 ms forward and 19.1 on the query side, this 15.2 and 15.0; the
# former is taken to be linear in the rows, which puts the crossing at 14. More than 16 go to the
# tile kernel.
LEAST_ROWS, MOST_ROWS = 14, 16
BLOCKS = (64, 128)
MOST_BYTES = 2
# At 192 and 256 an H100 reported an illegal memory access whose cause is not found (the interpreter
# is right); such heads gather their readers.
MOST_DIM = 128


def serves(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, site: Site) -> bool:
    """Whether a program a query is the fastest, and the terms are known to it."""
    rows = q.shape[1] // k.shape[1] * site.query_tile
    return (
        site.like_sdpa and LEAST_ROWS <= rows <= MOST_ROWS and site.block in BLOCKS
        and q.shape[2] >= LEAST_QUERIES and q.element_size() <= MOST_BYTES
        and max(q.shape[3], v.shape[3]) <= MOST_DIM and k.shape[2] > 0 and q.numel() > 0
    )  # fmt: skip


@triton.jit
def _keys(
    ids, step, valid, kv_len, valid_row, L: tl.constexpr, PADDED: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Where a listed block begins, its lanes, its keys, and which of them are there."""
    lane = tl.arange(0, L)
    origin = tl.load(ids + step).to(tl.int64) * L
    key = (origin + lane).to(tl.int32)
    inside = key < kv_len
    if MASKED and PADDED:
        inside = inside & (tl.load(valid + key.to(tl.int64) * valid_row, mask=inside, other=0) != 0)
    return origin, lane, key, inside


@triton.jit
def _forward_steps(
    acc, top, total, q_t, k, v, valid, ids, steps, position, scale, kv_len, window, k_row, v_row,
    valid_row, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    L: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PADDED: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    for step in range(0, steps):
        origin, lane, key, inside = _keys(ids, step, valid, kv_len, valid_row, L, PADDED, MASKED)
        k_tile = load_rows(k + origin * k_row, lane, k_row, inside, D, DP, MASKED)
        s = tl.dot(k_tile, q_t, input_precision="ieee")
        if MASKED:
            seen = visible(position[None, :], key[:, None], kv_len, window, CAUSAL, WINDOWED)
            s = tl.where(seen & inside[:, None], s * scale, float("-inf"))
            new_top = tl.maximum(top, tl.max(s, 0))
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            p = tl.exp2(s - base[None, :])
        else:
            new_top = tl.maximum(top, tl.max(s, 0) * scale)
            base = new_top
            p = tl.exp2(s * scale - base[None, :])
        fade = tl.exp2(top - base)
        total = total * fade[None, :] + p  # added up once, at the end: keys lie in many warps
        v_tile = load_rows(v + origin * v_row, lane, v_row, inside, DV, DVP, MASKED)
        acc = tl.dot(
            tl.trans(v_tile), p.to(v_tile.dtype), acc * fade[None, :], input_precision="ieee"
        )
        top = new_top
    return acc, top, total


@triton.jit
def _program(tiles, kv_heads, q_len, G: tl.constexpr, R: tl.constexpr, M: tl.constexpr):
    """The list, batch, kv head, and of each row its head, query, and whether there is one."""
    entry = tl.program_id(0).to(tl.int64)
    pair = entry // tiles
    batch, kv_head = pair // kv_heads, pair % kv_heads
    row = tl.arange(0, M)
    query = (entry % tiles).to(tl.int32) * R + row % R
    mine = (row < G * R) & (query < q_len)
    return entry, batch, kv_head, kv_head * G + row // R, query, mine


@triton.jit
def _forward(
    q, k, v, ids, counts, valid, out, lse, scale, tiles, kv_heads, q_len, kv_len, offset, window,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, o_batch, o_head, o_row,
    valid_batch, valid_row, G: tl.constexpr, N: tl.constexpr, R: tl.constexpr, L: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, M: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PADDED: tl.constexpr, NEGATIVE: tl.constexpr,
):  # fmt: skip
    """Adds the listed blocks to ``out`` and ``lse`` of the shared ones."""
    entry, batch, kv_head, head, query, mine = _program(tiles, kv_heads, q_len, G, R, M)
    full = tl.load(counts + entry * 2)
    count = tl.load(counts + entry * 2 + 1)
    if count == 0:
        return
    q_rows = head * q_head + query.to(tl.int64) * q_row
    q_tile = load_rows(q + batch * q_batch, q_rows, 1, mine, D, DP, True)
    if NEGATIVE:
        q_tile = -q_tile
    q_t = tl.trans(q_tile)
    k += batch * k_batch + kv_head * k_head
    v += batch * v_batch + kv_head * v_head
    valid += batch * valid_batch
    ids += entry * N
    place = (batch * kv_heads * G + head) * q_len + query
    o_rows = head * o_head + query.to(tl.int64) * o_row
    out += batch * o_batch
    top = tl.load(lse + place, mask=mine, other=float("-inf")) * 1.4426950408889634
    # exp(lse - top) = 1 for what the shared blocks add up to; it stands in the first lane.
    first_lane = (tl.arange(0, L) == 0)[:, None] & (top > float("-inf"))[None, :]
    total = tl.where(first_lane, 1.0, 0.0)
    acc = tl.trans(load_rows(out, o_rows, 1, mine, DV, DVP, True).to(tl.float32))
    position = query + offset
    acc, top, total = _forward_steps(
        acc, top, total, q_t, k, v, valid, ids, full, position, scale, kv_len, window, k_row, v_row,
        valid_row, D, DV, DP, DVP, L, CAUSAL, WINDOWED, PADDED, False,
    )  # fmt: skip
    acc, top, total = _forward_steps(
        acc, top, total, q_t, k, v, valid, ids + full, count - full, position, scale, kv_len,
        window, k_row, v_row, valid_row, D, DV, DP, DVP, L, CAUSAL, WINDOWED, PADDED, True,
    )  # fmt: skip
    summed = tl.sum(total, 0)
    alive = summed > 0
    summed = tl.where(alive, summed, 1.0)
    store_rows(out, o_rows, 1, mine, tl.trans(acc / summed[None, :]), DV, DVP)
    log_sum = tl.where(alive, (top + tl.log2(summed)) * 0.6931471805599453, float("-inf"))
    tl.store(lse + place, log_sum, mask=mine)


@triton.jit
def _query_steps(
    acc, q_t, do_t, lse, delta, k, v, valid, ids, steps, position, scale, kv_len, window, k_row,
    v_row, valid_row, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    L: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, PADDED: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    for step in range(0, steps):
        origin, lane, key, inside = _keys(ids, step, valid, kv_len, valid_row, L, PADDED, MASKED)
        k_tile = load_rows(k + origin * k_row, lane, k_row, inside, D, DP, MASKED)
        v_tile = load_rows(v + origin * v_row, lane, v_row, inside, DV, DVP, MASKED)
        s = tl.dot(k_tile, q_t, input_precision="ieee")
        dp = tl.dot(v_tile, do_t, input_precision="ieee")
        p = tl.exp2(s * scale - lse[None, :])
        ds = p * (dp - delta[None, :])
        if MASKED:
            seen = visible(position[None, :], key[:, None], kv_len, window, CAUSAL, WINDOWED)
            ds = tl.where(seen & inside[:, None], ds, 0.0)
        acc = tl.dot(tl.trans(k_tile), ds.to(k_tile.dtype), acc, input_precision="ieee")
    return acc


@triton.jit
def _query_gradient(
    q, k, v, do, lse, delta, ids, counts, valid, dq, scale, signed_scale, tiles, kv_heads, q_len,
    kv_len, offset, window, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    do_batch, do_head, do_row, dq_batch, dq_head, dq_row, valid_batch, valid_row, G: tl.constexpr,
    N: tl.constexpr, R: tl.constexpr, L: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    DP: tl.constexpr, DVP: tl.constexpr, M: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr, PADDED: tl.constexpr, NEGATIVE: tl.constexpr,
):  # fmt: skip
    """Adds the listed blocks to the ``dq`` of the shared ones."""
    entry, batch, kv_head, head, query, mine = _program(tiles, kv_heads, q_len, G, R, M)
    full = tl.load(counts + entry * 2)
    count = tl.load(counts + entry * 2 + 1)
    if count == 0:
        return
    at = query.to(tl.int64)
    q_tile = load_rows(q + batch * q_batch, head * q_head + at * q_row, 1, mine, D, DP, True)
    if NEGATIVE:
        q_tile = -q_tile
    do_rows = head * do_head + at * do_row
    do_tile = load_rows(do + batch * do_batch, do_rows, 1, mine, DV, DVP, True)
    place = (batch * kv_heads * G + head) * q_len + query
    log_sum = tl.load(lse + place, mask=mine, other=float("-inf"))
    log_sum = tl.where(log_sum == float("-inf"), float("inf"), log_sum * 1.4426950408889634)
    difference = tl.load(delta + place, mask=mine, other=0.0)
    k += batch * k_batch + kv_head * k_head
    v += batch * v_batch + kv_head * v_head
    valid += batch * valid_batch
    ids += entry * N
    position = query + offset
    q_t, do_t = tl.trans(q_tile), tl.trans(do_tile)
    acc = tl.zeros([DP, M], tl.float32)
    acc = _query_steps(
        acc, q_t, do_t, log_sum, difference, k, v, valid, ids, full, position, scale, kv_len,
        window, k_row, v_row, valid_row, D, DV, DP, DVP, L, CAUSAL, WINDOWED, PADDED, False,
    )  # fmt: skip
    acc = _query_steps(
        acc, q_t, do_t, log_sum, difference, k, v, valid, ids + full, count - full, position,
        scale, kv_len, window, k_row, v_row, valid_row, D, DV, DP, DVP, L, CAUSAL, WINDOWED, PADDED,
        True,
    )  # fmt: skip
    dq += batch * dq_batch
    dq_rows = head * dq_head + at * dq_row
    shared = load_rows(dq, dq_rows, 1, mine, D, DP, True).to(tl.float32)
    store_rows(dq, dq_rows, 1, mine, shared + tl.trans(acc) * signed_scale, D, DP)


Tiled = Callable[[torch.Tensor, Site], Any]


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_indices: torch.Tensor, site: Site,
    tiled: Tiled,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """out and lse; ``tiled(lists, site)`` is the tile kernel's answer for the shared blocks."""
    work = _Work(q, k, v, block_indices, site, "forward")
    out, lse = tiled(work.split.shared, work.grouped_site)
    _forward[(work.lists[0].shape[:3].numel(),)](
        q, k, v, *work.lists, mask_pointer(site.valid, q), out, lse, work.scale, *work.sizes,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        *mask_strides(site.valid), **work.constants,
    )  # fmt: skip
    return out, lse


def query_gradient(
    grad_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lse: torch.Tensor,
    delta: torch.Tensor, dq: torch.Tensor, block_indices: torch.Tensor, site: Site, tiled: Tiled,
) -> torch.Tensor:  # fmt: skip
    """Fills dq and delta; returns the lists without repeated blocks and those that nobody sees.

    ``tiled(lists, site)`` does it for the shared blocks.
    """
    work = _Work(q, k, v, block_indices, site, "query")
    tiled(work.split.shared, work.grouped_site)
    _query_gradient[(work.lists[0].shape[:3].numel(),)](
        q, k, v, grad_out, lse, delta, *work.lists, mask_pointer(site.valid, q), dq, work.scale,
        site.scale, *work.sizes, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        *grad_out.stride()[:3], *dq.stride()[:3], *mask_strides(site.valid), **work.constants,
    )  # fmt: skip
    return work.split.kept


class _Work:
    """Lists and the arguments of the kernel of one direction."""

    def __init__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_indices: torch.Tensor,
        site: Site, kernel: str,
    ) -> None:  # fmt: skip
        group, q_len, kv_len = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
        batch, kv_heads, tiles, width = block_indices.shape
        # Nothing is left behind, so a pair needs no segments.
        sizes = sizes_of(block_indices, group, site.query_tile, 0, 1 << 62)
        self.split: Split = split_lists(
            block_indices, q_len, kv_len, site, sizes, kernel == "query"
        )
        left = self.split.left.view(batch, kv_heads, -1, width)[:, :, :tiles].to(torch.int32)
        self.lists = order_blocks(left, q_len, kv_len, site)
        query_tile = sizes.together * site.query_tile
        self.grouped_site = dataclasses.replace(site, query_tile=query_tile)
        self.scale = abs(site.scale) * LOG2_E
        self.sizes = (tiles, kv_heads, q_len, kv_len, site.offset, site.window or 0)
        dim, value_dim = q.shape[3], v.shape[3]
        padded = padded_dim(dim), padded_dim(value_dim)
        launch = LAUNCHES[kernel, max(64, *padded)]
        self.constants: dict[str, Any] = {
            "G": group, "N": width, "R": site.query_tile, "L": site.block, "D": dim,
            "DV": value_dim, "DP": padded[0], "DVP": padded[1], "M": max(16, triton.next_power_of_2(
            group * site.query_tile)), "CAUSAL": site.causal, "WINDOWED": site.window is not None,
            "PADDED": site.valid is not None, "NEGATIVE": site.scale < 0,
            "num_warps": launch.warps, "num_stages": launch.stages, "maxnreg": launch.registers,
        }  # fmt: skip
