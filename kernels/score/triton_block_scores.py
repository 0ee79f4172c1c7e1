"""Triton kernel of scorer "mean" for tiles of few queries: straight to the scores of blocks.

    worth_tb = sum_delta w_delta sum_{i in t, heads} exp(scale q_i.y_{b step + delta} - lse_i)

A program owns a few tiles of one kv head: M columns (member of the tile, tile; tile fastest), so
that the sum over a tile's members stays inside a thread. It goes through the blocks a chunk at a
time, and within a chunk through the compressed keys at the same place ``delta`` of every block, so
that a compressed key's share lands in its block's row. One that reaches into the next block too is
computed for both, or, where sums over members make a share small beside its logits, handed one row
down at the end of the chunk. Probabilities of single compressed keys never reach memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nsa_compile.kernels.score.triton_rows import Launch
from nsa_compile.kernels.triton_site import LOG2_E, dense_rows

# By whether inputs have sixteen bits, the members of a tile (at least) and the head dim (at most).
# One H100, 65,536 tokens, heads of 128, bfloat16, 32/16/64, one query a tile, ms. 32/8 heads:
# 128x64 3.05, in 168 registers 3.17, 64x64 3.70, 128x128 4.6, 8 warps 9.5. 64/4: 128x64 in 168
# registers with 2 stages 5.13, 3 stages 5.75, 128x128 7.9, 64x64 8.1, 256x64 10.6. 32/32: 64x64
# 4.89, 128x64 5.34, 32x64 6.44. Keys through tensor descriptors: 64/4 3% less.
LAUNCHES: dict[tuple[bool, int, int], Launch] = {
    (True, 1, 128): Launch(64, 64, 4, 3),
    (True, 4, 128): Launch(128, 64, 4, 3),
    (True, 16, 128): Launch(128, 64, 4, 2, registers=168),
    (True, 1, 256): Launch(64, 64, 4, 2),
    (False, 1, 256): Launch(32, 32, 4, 1),
}
# Least members of a tile for which shares are handed to the next block; ms as above, best launch:
# 1 member 6.41, computed twice 4.89; 4 members 3.04 and 3.05; 16 members 5.13 and 6.25.
LEAST_HANDED = 16
# Most members (heads x queries) of a tile that is scored here.
MOST_MEMBERS = 64


@triton.jit
def _steps(
    carry, q_tile, shifts, y, some, out, start, stop, bound, scale, count, blocks, y_row, own,
    D: tl.constexpr, DP: tl.constexpr, NB: tl.constexpr, MEMBERS: tl.constexpr,
    TILES: tl.constexpr, CB: tl.constexpr, CD: tl.constexpr, L: tl.constexpr,
    HANDED: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The chunks [start, stop): a step is one place of a chunk, the last one stores the chunk.

    ``carry`` [TILES] is what the block before hands to the first one; the result, what the last one
    hands on.
    """
    # The first places are those of compressed keys that begin in the block before.
    back: tl.constexpr = 0 if HANDED else (CB - 1) // CD
    places: tl.constexpr = L // CD + back
    lane = tl.arange(0, NB)
    column = tl.arange(0, DP)
    row_offsets = (lane * (L // CD)).to(tl.int64)[:, None] * y_row + column[None, :]
    above = tl.broadcast_to(tl.maximum(lane - 1, 0)[:, None], [NB, TILES])
    worth = tl.zeros([NB, TILES], tl.float32)
    over = tl.zeros([NB, TILES], tl.float32)
    for step in range(start * places, stop * places):
        chunk = step // places
        place = step % places
        delta = place - back
        c = (chunk * NB + lane) * (L // CD) + delta
        inside = (c >= 0) & (c < count)
        if PADDED:  # what stands in a hidden block may be NaN: it must not be read
            inside = inside & (tl.load(some + c, mask=inside, other=0) != 0)
        here = y + (chunk * (NB * (L // CD)) + delta).to(tl.int64) * y_row
        wanted = inside[:, None]
        if D != DP:
            wanted = wanted & (column < D)[None, :]
        keys = tl.load(here + row_offsets, mask=wanted, other=0.0)
        s = tl.dot(keys, tl.trans(q_tile), input_precision="ieee")
        p = tl.exp2(s * scale + shifts[None, :])
        if MASKED:
            p = tl.where(c[:, None] < bound[None, :], p, 0.0)
        share = tl.sum(tl.reshape(p, [NB, MEMBERS, TILES]), 1)
        share = tl.where(inside[:, None], share, 0.0)
        tokens = tl.minimum(delta * CD + CB, L) - tl.maximum(delta * CD, 0)
        worth += share * (tokens.to(tl.float32) / CD)
        if HANDED:
            over += share * ((CB - tokens).to(tl.float32) / CD)
        if place == places - 1:
            block = chunk * NB + lane
            if HANDED:
                worth += tl.where(lane[:, None] == 0, carry[None, :], tl.gather(over, above, 0))
                carry = tl.sum(tl.where(lane[:, None] == NB - 1, over, 0.0), 0)
                over = tl.zeros([NB, TILES], tl.float32)
            tl.store(out + block[:, None], worth, mask=(block < blocks)[:, None] & own[None, :])
            worth = tl.zeros([NB, TILES], tl.float32)
    return carry


@triton.jit
def _block_scores(
    q, y, some, shifts, scores, scale, kv_heads, q_len, offset, blocks, count, first_tile, tiles,
    groups, q_batch, q_head, q_row, y_batch, y_head, y_row, G: tl.constexpr, R: tl.constexpr,
    CB: tl.constexpr, CD: tl.constexpr, L: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    NB: tl.constexpr, HEADS: tl.constexpr, QUERIES: tl.constexpr, TILES: tl.constexpr,
    HANDED: tl.constexpr, CAUSAL: tl.constexpr, PADDED: tl.constexpr, NEGATIVE: tl.constexpr,
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
    at = group * TILES + column % TILES
    query = (first_tile + at) * R + within
    mine = (head < G) & (within < R) & (at < tiles) & (query < q_len)
    q_base = q + batch * q_batch + pair % kv_heads * G * q_head
    q_rows = head.to(tl.int64) * q_head + query.to(tl.int64) * q_row
    inside = mine[:, None] & (dim < D)[None, :]
    q_tile = tl.load(q_base + q_rows[:, None] + dim[None, :], mask=inside, other=0.0)
    if NEGATIVE:
        q_tile = -q_tile
    own_shifts = shifts + (pair * G + head) * q_len + query
    shift = tl.load(own_shifts, mask=mine, other=float("-inf"))
    position = query + offset
    bound = position * 0 + count
    if CAUSAL:
        bound = tl.minimum(bound, tl.maximum(position + 1 - CB + CD, 0) // CD)
    start = (first_tile + group * TILES) * R
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
    own = group * TILES + tl.arange(0, TILES)
    out = scores + (pair * tiles + own)[None, :] * blocks
    carry = tl.zeros([TILES], tl.float32)
    carry = _steps(
        carry, q_tile, shift, y_base, some_base, out, 0, full, bound, scale, count, blocks, y_row,
        own < tiles, D, DP, NB, members, TILES, CB, CD, L, HANDED, PADDED,
        False,
    )  # fmt: skip
    if CAUSAL:
        _steps(
            carry, q_tile, shift, y_base, some_base, out, full, chunks, bound, scale, count,
            blocks, y_row, own < tiles, D, DP, NB, members, TILES, CB, CD, L, HANDED, PADDED,
            True,
        )  # fmt: skip


def fits(group: int, query_tile: int, dim: int) -> bool:
    """Tiles that are scored here; longer ones sum their queries' mass in memory."""
    members = triton.next_power_of_2(group) * triton.next_power_of_2(query_tile)
    return members <= MOST_MEMBERS and dim <= 256


def launch_for(half: bool, members: int, dim: int) -> Launch:
    """The table's entry of the smallest head dim that holds ``dim``, then of the most members."""
    fitting = [key for key in LAUNCHES if key[0] == half and key[1] <= members and dim <= key[2]]
    return LAUNCHES[min(fitting, key=lambda key: (key[2], -key[1]))]


def block_scores(
    q: torch.Tensor, compressed: torch.Tensor, some: torch.Tensor | None, shifts: torch.Tensor,
    kv_heads: int, scale: float, causal: bool, offset: int, query_tile: int, block: int,
    compress_block: int, compress_stride: int, blocks: int, first_tile: int, tiles: int,
) -> torch.Tensor:  # fmt: skip
    """float32 [B, Hkv, tiles, blocks]; blocks that begin after a tile's last query are unwritten.

    ``shifts`` as ``row_shifts`` returns them.
    """
    q, compressed = dense_rows(q), dense_rows(compressed)
    batch, q_heads, q_len, dim = q.shape
    group, count = q_heads // kv_heads, compressed.shape[2]
    heads, queries = triton.next_power_of_2(group), triton.next_power_of_2(query_tile)
    members = heads * queries
    launch = launch_for(q.element_size() == 2, members, dim)
    columns = max(16, launch.rows, members)
    groups = triton.cdiv(tiles, columns // members)
    # Handed on, a share must reach no further than into the next block.
    handed = members >= LEAST_HANDED and compress_block <= block
    scores = q.new_empty(batch, kv_heads, tiles, blocks, dtype=torch.float32)
    _block_scores[(batch * kv_heads * groups,)](
        q, compressed, q if some is None else some, shifts, scores, abs(scale) * LOG2_E,
        kv_heads, q_len, offset, blocks, count, first_tile, tiles, groups, *q.stride()[:3],
        *compressed.stride()[:3], G=group, R=query_tile, CB=compress_block, CD=compress_stride,
        L=block, D=dim, DP=max(16, triton.next_power_of_2(dim)), NB=launch.keys, HEADS=heads,
        QUERIES=queries, TILES=columns // members, HANDED=handed, CAUSAL=causal,
        PADDED=some is not None, NEGATIVE=scale < 0, num_warps=launch.warps,
        num_stages=launch.stages, maxnreg=launch.registers,
    )  # fmt: skip
    return scores
