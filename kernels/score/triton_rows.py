"""How the score kernels are launched, and how rows of queries are dealt to tiles and heads."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class Launch(NamedTuple):
    """Rows of queries, keys a step, warps, stages, programs a processor, most registers."""

    rows: int
    keys: int
    warps: int
    stages: int
    programs: int = 1
    registers: int | None = None


class Rows(NamedTuple):
    """How M rows are dealt to tiles and heads of a group: (tile, head, query), query fastest."""

    lanes: int  # queries of one tile and head, padded to a power of two
    heads: int
    tiles: int
    parts: int  # programs that share a tile


def deal_rows(rows: int, group: int, query_tile: int) -> Rows:
    """Whole heads of a tile first, then more tiles; a tile longer than ``rows`` is cut."""
    padded = triton.next_power_of_2(query_tile)
    if padded >= rows:
        return Rows(rows, 1, 1, group * (padded // rows))
    heads = min(rows // padded, group & -group)
    return Rows(padded, heads, rows // padded // heads, group // heads)


@triton.jit
def dealt_rows(
    step, first_tile, tiles, q_len, R: tl.constexpr, G: tl.constexpr, M: tl.constexpr,
    LANES: tl.constexpr, HEADS: tl.constexpr, TILES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Head and first query (scalars where they can be), each row's query, rows in use; see Rows."""
    row = tl.arange(0, M)
    piece = step % PARTS
    tile_group = step // PARTS
    cuts: tl.constexpr = PARTS * HEADS // G
    if TILES * HEADS == 1 and R % M == 0:  # neighbouring queries of one head
        head = piece // cuts
        start = (first_tile + tile_group) * R + piece % cuts * LANES
        query = start + row
        mine = query < q_len
    else:
        lane = piece % cuts * LANES + row % LANES
        head = piece // cuts * HEADS + row // LANES % HEADS
        tile = tile_group * TILES + row // (LANES * HEADS)
        start = step * 0
        query = (first_tile + tile) * R + lane
        mine = (lane < R) & (tile < tiles) & (query < q_len)
    return head, start, query, mine
