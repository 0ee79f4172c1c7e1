"""Triton kernels of the gradients of keys and values of block-sparse attention.

    dv_j = sum_i p_ij do_i,  dk_j = scale sum_i ds_ij q_i,  ds_ij as for the queries

A program owns one block and a bounded piece of the list of tiles that chose it; pieces of a long
list meet in float32 buffers that are added in a fixed order, so nothing is atomic and every run
gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nsa_compile.kernels.attend.gate import weights_of
from nsa_compile.kernels.attend.triton_rows import (
    launch_for,
    load_rows,
    modified,
    padded_dim,
    store_rows,
)
from nsa_compile.kernels.triton_site import (
    LOG2_E,
    mask_pointer,
    mask_strides,
    place_of,
    row_range,
    row_segment,
    row_slope,
    visible,
)

# Rows of queries that one key-side program reads at most: long enough that a block's two products
# amortise its load, short enough that the block everybody chose is not the tail.
PIECE_ROWS = 16384


@triton.jit
def _reader_of(readers, row, rows, G: tl.constexpr, R: tl.constexpr):
    """The tile of each row."""
    return tl.load(readers + row // (R * G), mask=row < rows, other=0)


@triton.jit
def _run_of(readers, row, rows, G: tl.constexpr, R: tl.constexpr, WINDOWED: tl.constexpr):
    """Head and query of a row, in scalar arithmetic; the rows of one tile and head go on from it.

    A window's rows come head by head: programs side by side read runs of queries that overlap, and
    those of one head all fit into the L2 cache. Other readers lie anywhere, and the heads of a
    query lie together.
    """
    if WINDOWED:
        span = rows // G
        head = row // span
        tile = tl.load(readers + row % span // R)
    else:
        head = (row // R) % G
        tile = tl.load(readers + row // (R * G))
    return head.to(tl.int64), tile * R + row % R


@triton.jit
def _let_through(
    seen, query, mine, ranges, query_segments, key, key_segment, RANGED: tl.constexpr,
    SEGMENTED: tl.constexpr,
):  # fmt: skip
    """``seen`` [keys, rows] of which ranges and segments let through."""
    if RANGED:
        low, high = row_range(ranges, query, mine, RANGED)
        seen = seen & (key[:, None] >= low[None, :]) & (key[:, None] < high[None, :])
    if SEGMENTED:
        segment = row_segment(query_segments, query, mine, SEGMENTED)
        seen = seen & (key_segment[:, None] == segment[None, :])
    return seen


@triton.jit
def _key_steps(
    dk, dv, k_tile, v_tile, q, do, lse, delta, gate, ranges, query_segments, slopes, positions,
    readers, first_row, rows, steps, key, key_segment, key_place, scale, cap, q_len, kv_len, offset,
    window, q_head, q_row, do_head, do_row, G: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, BM: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr, NEGATIVE: tl.constexpr, GATED: tl.constexpr, RANGED: tl.constexpr,
    SEGMENTED: tl.constexpr, SLOPED: tl.constexpr, PLACED: tl.constexpr, CAPPED: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, BM)
    # Where rows are gathered their tile is read a step ahead: the rows wait for it. Readers of
    # few rows need too many registers for that.
    AHEAD: tl.constexpr = R % BM != 0 and R * G >= 4
    if AHEAD:
        next_tile = _reader_of(readers, first_row + lane, rows, G, R)
    for step in range(0, steps):
        if R % BM == 0:
            head, start = _run_of(readers, first_row + step * BM, rows, G, R, WINDOWED)
            query = start + lane
            mine = query < q_len
            q_base = q + head * q_head + start.to(tl.int64) * q_row
            do_base = do + head * do_head + start.to(tl.int64) * do_row
            q_tile = load_rows(q_base, lane, q_row, mine, D, DP, True)
            do_tile = load_rows(do_base, lane, do_row, mine, DV, DVP, True)
        else:
            here = first_row + step * BM + lane
            if AHEAD:
                tile = next_tile
                next_tile = _reader_of(readers, here + BM, rows, G, R)
            else:
                tile = _reader_of(readers, here, rows, G, R)
            head = ((here // R) % G).to(tl.int64)
            query = tile * R + here % R
            mine = (here < rows) & (query < q_len)
            q_tile = load_rows(q, head * q_head + query.to(tl.int64) * q_row, 1, mine, D, DP, True)
            do_tile = load_rows(
                do, head * do_head + query.to(tl.int64) * do_row, 1, mine, DV, DVP, True
            )
        place = head * q_len + query
        if NEGATIVE:
            q_tile = -q_tile
        log_sum = tl.load(lse + place, mask=mine, other=float("-inf"))
        log_sum = tl.where(log_sum == float("-inf"), float("inf"), log_sum * 1.4426950408889634)
        difference = tl.load(delta + place, mask=mine, other=0.0)
        s = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
        slope = row_slope(slopes, head + query * 0, mine, SLOPED)
        row_place = place_of(query + offset, positions, kv_len, SLOPED, PLACED)
        s, bend = modified(
            s, scale, cap, slope[None, :], row_place[None, :], key_place[:, None], CAPPED, SLOPED
        )
        p = tl.exp2(s - log_sum[None, :])
        if MASKED:
            seen = visible(
                (query + offset)[None, :], key[:, None], kv_len, window, CAUSAL, WINDOWED
            )
            seen = _let_through(
                seen, query, mine, ranges, query_segments, key, key_segment, RANGED, SEGMENTED
            )
            p = tl.where(seen, p, 0.0)
        if GATED:
            p = p * tl.load(gate + place, mask=mine, other=0.0)[None, :]
        dv = tl.dot(p.to(do_tile.dtype), do_tile, dv, input_precision="ieee")
        dp = tl.dot(v_tile, tl.trans(do_tile), input_precision="ieee")
        ds = p * (dp - difference[None, :])
        if CAPPED:
            ds = ds * bend
        dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _key_gradient(
    q, k, v, do, lse, delta, readers, starts, slot_block, slot_end, dk_part, dv_part, valid, dk, dv,
    scale, pairs, kv_heads, q_len, kv_len, offset, window, blocks, slots, entries, q_batch, q_head,
    q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, do_batch, do_head, do_row, dk_batch,
    dk_head, dk_row, dv_batch, dv_head, dv_row, gate, valid_batch, valid_row, ranges, ranges_batch,
    query_segments, query_segments_batch, key_segments, key_segments_batch, slopes, positions,
    positions_batch, cap, G: tl.constexpr, R: tl.constexpr, L: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
    PIECE: tl.constexpr, LEADING: tl.constexpr, PIECES: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr, PADDED: tl.constexpr, NEGATIVE: tl.constexpr, GATED: tl.constexpr,
    ADDED: tl.constexpr, RANGED: tl.constexpr, SEGMENTED: tl.constexpr, SLOPED: tl.constexpr,
    PLACED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """dk and dv of BN keys of one block, summed over one piece of the tiles that read the block.

    Programs come in two kinds: first the slots, pieces of long lists, whose sums go to float32
    buffers; then one program a block, which writes dk and dv unless the list was long.
    """
    pid = tl.program_id(0).to(tl.int64)
    within = (pid % PIECES).to(tl.int32)
    pid = pid // PIECES
    slotted = pid < pairs * slots
    slot = (pid % tl.maximum(slots, 1)).to(tl.int32)
    pair = pid // tl.maximum(slots, 1)
    direct = pid - pairs * slots
    block = (direct % blocks).to(tl.int32)
    if slotted:
        block = tl.load(slot_block + pid).to(tl.int32)
    else:
        pair = direct // blocks
    if block >= blocks:  # an unused slot
        return
    begin = tl.load(starts + pair * (blocks + 1) + block).to(tl.int32)
    end = tl.load(starts + pair * (blocks + 1) + block + 1).to(tl.int32)
    long = end - begin > PIECE
    if long != slotted:
        return
    if slotted:
        piece = slot - tl.load(slot_end + pair * (blocks + 1) + block).to(tl.int32)
        begin = begin + piece * PIECE
        end = tl.minimum(end, begin + PIECE)
    batch = pair // kv_heads
    kv_head = pair % kv_heads
    lane = within * BN + tl.arange(0, BN)
    key = block * L + lane
    inside = (lane < L) & (key < kv_len)
    k_base = k + batch * k_batch + kv_head * k_head
    v_base = v + batch * v_batch + kv_head * v_head
    k_tile = load_rows(k_base, key, k_row, inside, D, DP, True)
    v_tile = load_rows(v_base, key, v_row, inside, DV, DVP, True)
    key_segment = row_segment(key_segments + batch * key_segments_batch, key, inside, SEGMENTED)
    ranges += batch * ranges_batch
    query_segments += batch * query_segments_batch
    positions += batch * positions_batch
    slopes += kv_head * G
    key_place = place_of(key, positions, kv_len, SLOPED, PLACED)
    q_base = q + batch * q_batch + kv_head * G * q_head
    do_base = do + batch * do_batch + kv_head * G * do_head
    row_base = pair * G * q_len
    readers += pair * entries + begin
    rows = (end - begin) * G * R
    # Tiles come in ascending order, so those on the diagonal are among the first LEADING of the
    # list. Under further terms of the mask any tile may need it.
    item = tl.arange(0, LEADING)
    tile = tl.load(readers + item, mask=item < end - begin, other=2147483647)
    masked_rows = rows
    if not (WINDOWED or (RANGED or SEGMENTED)):
        if CAUSAL:
            diagonal = (item < end - begin) & (tile * R + offset < block * L + L - 1)
            masked_rows = tl.sum(diagonal.to(tl.int32)) * G * R
        else:
            masked_rows = rows * 0
    dk_sum = tl.zeros([BN, DP], tl.float32)
    dv_sum = tl.zeros([BN, DVP], tl.float32)
    masked_steps = (masked_rows + BM - 1) // BM
    dk_sum, dv_sum = _key_steps(
        dk_sum, dv_sum, k_tile, v_tile, q_base, do_base, lse + row_base, delta + row_base,
        gate + row_base, ranges, query_segments, slopes, positions, readers, 0, rows, masked_steps,
        key, key_segment, key_place, scale, cap, q_len, kv_len, offset, window, q_head, q_row,
        do_head, do_row, G, R, D, DV, DP, DVP, BM, CAUSAL, WINDOWED, NEGATIVE, GATED, RANGED,
        SEGMENTED, SLOPED, PLACED, CAPPED, True,
    )  # fmt: skip
    done = masked_steps * BM
    steps = (tl.maximum(rows - done, 0) + BM - 1) // BM
    dk_sum, dv_sum = _key_steps(
        dk_sum, dv_sum, k_tile, v_tile, q_base, do_base, lse + row_base, delta + row_base,
        gate + row_base, ranges, query_segments, slopes, positions, readers, done, rows, steps, key,
        key_segment, key_place, scale, cap, q_len, kv_len, offset, window, q_head, q_row, do_head,
        do_row, G, R, D, DV, DP, DVP, BM, CAUSAL, WINDOWED, NEGATIVE, GATED, RANGED, SEGMENTED,
        SLOPED, PLACED, CAPPED, False,
    )  # fmt: skip
    dk_sum = dk_sum * (scale * 0.6931471805599453)
    if PADDED:
        there = valid + batch * valid_batch + key.to(tl.int64) * valid_row
        real = tl.load(there, mask=inside, other=0) != 0
        dk_sum = tl.where(real[:, None], dk_sum, 0.0)
        dv_sum = tl.where(real[:, None], dv_sum, 0.0)
    if slotted:
        store_rows(dk_part, pid * L * D + lane * D, 1, lane < L, dk_sum, D, DP)
        store_rows(dv_part, pid * L * DV + lane * DV, 1, lane < L, dv_sum, DV, DVP)
    else:
        dk += batch * dk_batch + kv_head * dk_head
        dv += batch * dv_batch + kv_head * dv_head
        if ADDED:
            dk_sum += load_rows(dk, key, dk_row, inside, D, DP, True).to(tl.float32)
            dv_sum += load_rows(dv, key, dv_row, inside, DV, DVP, True).to(tl.float32)
        store_rows(dk, key, dk_row, inside, dk_sum, D, DP)
        store_rows(dv, key, dv_row, inside, dv_sum, DV, DVP)


@triton.jit
def _join_pieces(
    part, starts, slot_end, gradient, kv_heads, kv_len, blocks, slots, g_batch, g_head, g_row,
    L: tl.constexpr, L_PAD: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PIECE: tl.constexpr,
    ADDED: tl.constexpr,
):  # fmt: skip
    """The gradient of a block whose readers came in several pieces: their sum, in list order."""
    pid = tl.program_id(0).to(tl.int64)
    pair = pid // blocks
    block = (pid % blocks).to(tl.int32)
    begin = tl.load(starts + pair * (blocks + 1) + block).to(tl.int32)
    count = tl.load(starts + pair * (blocks + 1) + block + 1).to(tl.int32) - begin
    if count <= PIECE:
        return
    slot = pair * slots + tl.load(slot_end + pair * (blocks + 1) + block)
    lane = tl.arange(0, L_PAD)
    total = tl.zeros([L_PAD, DP], tl.float32)
    for piece in range(0, (count + PIECE - 1) // PIECE):
        total += load_rows(part + (slot + piece) * L * D, lane, D, lane < L, D, DP, True)
    key = block * L + lane
    inside = (lane < L) & (key < kv_len)
    base = gradient + (pair // kv_heads) * g_batch + (pair % kv_heads) * g_head
    if ADDED:
        total += load_rows(base, key, g_row, inside, D, DP, True).to(tl.float32)
    store_rows(base, key, g_row, inside, total, D, DP)


def key_gradients(upstream, q, k, v, lse, ids, dk, dv, delta, site, extra):
    """Fills dk and dv; ``ids`` [B, Hkv, NT, n] are the ordered lists."""
    grad_out, gate, (_, added) = upstream.grad_out, upstream.gate, upstream.added
    batch, kv_heads, kv_len, head_dim = k.shape
    value_dim, group, tiles = v.shape[3], q.shape[1] // kv_heads, ids.shape[2]
    query_tile, block = site.query_tile, site.block
    pairs, blocks = batch * kv_heads, triton.cdiv(kv_len, block)
    piece = max(1, PIECE_ROWS // (group * query_tile))
    # A list of c > piece readers takes ceil(c / piece) slots, fewer than 2 c / piece.
    slots = 0 if tiles <= piece else 2 * tiles * ids.shape[3] // piece
    readers, starts, slot_first, slot_block = _invert(ids, blocks, piece, slots)
    launch = launch_for("key", q, v, group, query_tile, block)
    keys = min(launch.keys, max(16, triton.next_power_of_2(block)))
    dk_part = q.new_empty(pairs * slots * block * head_dim, dtype=torch.float32)
    dv_part = q.new_empty(pairs * slots * block * value_dim, dtype=torch.float32)
    shape = {"G": group, "R": query_tile, "L": block, "D": head_dim, "DV": value_dim,
             "DP": padded_dim(head_dim), "DVP": padded_dim(value_dim)}  # fmt: skip
    pieces = triton.cdiv(block, keys)
    _key_gradient[(pairs * (slots + blocks) * pieces,)](
        q, k, v, grad_out, lse, delta, readers, starts, slot_block, slot_first, dk_part, dv_part,
        mask_pointer(site.valid, q), dk, dv, abs(site.scale) * LOG2_E, pairs, kv_heads, q.shape[2],
        kv_len, site.offset, site.window or 0, blocks, slots, readers.shape[1], *q.stride()[:3],
        *k.stride()[:3], *v.stride()[:3], *grad_out.stride()[:3], *dk.stride()[:3],
        *dv.stride()[:3], weights_of(gate, lse), *mask_strides(site.valid), *extra.arguments,
        **shape, BN=keys, BM=launch.rows, PIECE=piece,
        LEADING=triton.next_power_of_2(min(piece, tiles, max(128, block // query_tile + 2))),
        PIECES=pieces, CAUSAL=site.causal, WINDOWED=site.window is not None,
        PADDED=site.valid is not None, NEGATIVE=site.scale < 0,
        GATED=gate is not None, ADDED=added, **extra.flags, num_warps=launch.warps,
        num_stages=launch.stages, maxnreg=launch.registers,
    )  # fmt: skip
    if slots == 0:
        return
    for part, gradient, dim in ((dk_part, dk, head_dim), (dv_part, dv, value_dim)):
        _join_pieces[(pairs * blocks,)](
            part, starts, slot_first, gradient, kv_heads, kv_len, blocks, slots,
            *gradient.stride()[:3], L=block, L_PAD=triton.next_power_of_2(block), D=dim,
            DP=padded_dim(dim), PIECE=piece, ADDED=added, num_warps=4,
        )  # fmt: skip


def _invert(
    ids: torch.Tensor, blocks: int, piece: int, slots: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each block its readers: the tiles that list it, ascending, and where long lists are cut.

    Returns ``readers`` int32 [P, NT * n] (P pairs of batch and kv head), ``starts`` [P, Ns + 1]
    into it, ``slot_first`` [P, Ns + 1] the first slot of a block, and ``slot_block`` [P, slots] the
    block of a slot (Ns and more: unused).
    """
    pairs, width = ids.shape[0] * ids.shape[1], ids.shape[3]
    flat = ids.reshape(pairs, -1)
    small = torch.int16 if blocks < 2**15 else torch.int32  # halves the passes of a radix sort
    chosen, order = torch.where(flat < 0, blocks, flat).to(small).sort(dim=1, stable=True)
    readers = (order // width).to(torch.int32)
    edges = torch.arange(blocks + 1, device=ids.device, dtype=small).expand(pairs, -1)
    starts = torch.searchsorted(chosen, edges.contiguous(), out_int32=True)
    count = starts.diff(dim=1)
    needed = torch.where(count > piece, (count + piece - 1) // piece, 0)
    slot_first = torch.nn.functional.pad(needed.cumsum(1, dtype=torch.int32), (1, 0))
    slot = torch.arange(max(slots, 1), device=ids.device, dtype=torch.int32).expand(pairs, -1)
    slot_block = torch.searchsorted(
        slot_first[:, 1:].contiguous(), slot.contiguous(), right=True, out_int32=True
    )
    return readers, starts, slot_first, slot_block
