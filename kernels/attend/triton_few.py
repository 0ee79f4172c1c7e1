"""Token-granular attention of large groups: shared blocks by the tile kernel, then query by query.

Gathering readers leaves G rows of output behind for every (query, block) pair; here a block's L
rows of keys and values are read instead, which costs the same whatever G is, so it suits large G.
Blocks that all of a few neighbouring queries list are read once for all of them; the kernel then
goes on from that result with a program for the G rows of one query and what is left of its list.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch

from nsa_compile.kernels.attend.site import Site
from nsa_compile.kernels.attend.triton_readers import Split, sizes_of, split_lists

LEAST_QUERIES = 1024
# One H100, 65,536 tokens, heads of 128, bfloat16, 16 blocks of 64: at 16 rows gathering takes 15.5
# ms forward and 19.1 on the query side, this 13.7 and 14.6; the former is taken to be linear in
# the rows, which puts the crossing at 14. More than 16 rows feed the tensor cores themselves.
LEAST_ROWS, MOST_ROWS = 14, 16
BLOCKS = (64, 128)
MOST_BYTES = 2
# Wider heads gather their readers; they have not been measured here.
MOST_DIM = 128


def serves(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, site: Site) -> bool:
    """Whether a program a query is the fastest, and the terms are known to ``split_lists``."""
    rows = q.shape[1] // k.shape[1] * site.query_tile
    return (
        site.like_sdpa and LEAST_ROWS <= rows <= MOST_ROWS and site.block in BLOCKS
        and q.shape[2] >= LEAST_QUERIES and q.element_size() <= MOST_BYTES
        and max(q.shape[3], v.shape[3]) <= MOST_DIM and k.shape[2] > 0 and q.numel() > 0
    )  # fmt: skip


class Parts(NamedTuple):
    """The two lists, each with the site that reads it, and both together.

    ``kept`` is ``block_indices`` without what is repeated or seen by nobody, if it was asked for.
    """

    shared: tuple[torch.Tensor, Site]
    left: tuple[torch.Tensor, Site]
    kept: torch.Tensor


def parts_of(
    q: torch.Tensor, k: torch.Tensor, block_indices: torch.Tensor, site: Site, kept: bool
) -> Parts:
    """Blocks that groups of neighbouring tiles share, and what each tile reads besides."""
    batch, kv_heads, tiles, width = block_indices.shape
    # Nothing is left behind, so a pair needs no segments.
    sizes = sizes_of(block_indices, q.shape[1] // kv_heads, site.query_tile, 0, 1 << 62)
    split: Split = split_lists(block_indices, q.shape[2], k.shape[2], site, sizes, kept)
    left = split.left.view(batch, kv_heads, -1, width)[:, :, :tiles].to(torch.int32)
    grouped = dataclasses.replace(site, query_tile=sizes.together * site.query_tile)
    return Parts((split.shared, grouped), (left, site), split.kept)
