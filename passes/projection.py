"""What a site would cost at other lengths: FLOPs, bytes, memory, and where sparse begins to pay.

All of it is counted, none of it measured. FLOPs are those of :mod:`nsa_compile.passes.cost`. Bytes
are what kernels ask for: a query is read and its output written once, and each tile of queries
(128 in a fused dense kernel and in scoring, ``query_tile`` in sparse attention) reads the keys and
values of its kv head that it attends to once; caches may serve part of it. Memory is what attention
holds beside its operands: output, log-sum-exp, the chosen blocks, and the scores with their softmax
where a model writes them out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import fx

from nsa_compile.passes import cost
from nsa_compile.passes.config import NSAConfig
from nsa_compile.passes.site import AttentionSite, Decision, Mask

LENGTHS = tuple(1 << power for power in range(12, 19))
_DENSE_TILE = 128
_WRITTEN_OUT = "eager"
_LONGEST = 1 << 24


def projection(decision: Decision, lengths: Iterable[int] = LENGTHS) -> dict[str, Any]:
    """``costs`` at ``lengths`` and ``predicted_break_even``; empty where lengths are not free.

    Queries and keys must be equally many: attention to something of another length (an image, a
    cache) does not grow with the sequence alone. The mask is taken to keep its form. A batch that
    is symbolic counts as 1.
    """
    site, config = decision.site, decision.config
    offset = site.mask.offset if isinstance(site.mask, Mask) else 0
    if cost.size(site.q_len) != cost.size(site.kv_len) or isinstance(offset, fx.Node):
        return {}
    if not isinstance(site.batch, int):
        site = replace(site, batch=1)
    sparse = config if decision.converted else None
    return {
        "costs": [_costs(_at(site, length), sparse) for length in lengths],
        "predicted_break_even": _break_even(site, config) if decision.converted else None,
    }


def _at(site: AttentionSite, length: int) -> AttentionSite:
    return replace(site, q_len=length, kv_len=length)


def _costs(site: AttentionSite, config: NSAConfig | None) -> dict[str, Any]:
    dense = config is not None and site.kv_len <= (config.dense_len or 0)
    row = {
        "length": site.kv_len,
        "flops_dense": cost.flops_dense(site),
        "flops_sparse": None if config is None else cost.flops_sparse(site, config),
        "bytes_dense": _bytes_dense(site),
        "bytes_sparse": None,
        "memory_dense": _memory_dense(site),
        "memory_sparse": None,
    }
    if config is not None:
        row["bytes_sparse"] = row["bytes_dense"] if dense else _bytes_sparse(site, config)
        row["memory_sparse"] = _result(site) + (0 if dense else _blocks(site, config))
    return row


def _break_even(site: AttentionSite, config: NSAConfig) -> int | None:
    """The least length at which the sparse count is below the dense one, None if there is none."""
    always = replace(config, dense_len=0)

    def pays(length: int) -> bool:
        there = _at(site, length)
        return int(cost.flops_sparse(there, always)) < int(cost.flops_dense(there))

    if not pays(_LONGEST):
        return None
    low, high = 0, _LONGEST
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if pays(middle) else (middle, high)
    return max(high, (config.dense_len or 0) + 1)


def _bytes_dense(site: AttentionSite) -> int:
    read = _tiles(cost.pairs(site), _DENSE_TILE) * (site.head_dim + site.value_dim)
    return int(_own_bytes(site) + site.batch * site.kv_heads * read * site.dtype.itemsize)


def _bytes_sparse(site: AttentionSite, config: NSAConfig) -> int:
    width = config.channels(site.head_dim)
    scored = cost.pairs(site)
    if config.scorer != "channels":
        width, scored = site.head_dim, scored // config.compress_stride
    again = cost.second_look_pairs(site, config)
    read = site.kv_heads * _tiles(scored, _DENSE_TILE) * width
    attended = cost.attended_pairs(site, config)
    chosen = _tiles(again, config.query_tile or 1) * site.head_dim
    chosen += _tiles(attended, config.query_tile or 1) * (site.head_dim + site.value_dim)
    keys = site.batch * (read + _choices(site, config) * chosen) * site.dtype.itemsize
    return int(_own_bytes(site) + keys + 2 * _blocks(site, config))


def _own_bytes(site: AttentionSite) -> int:
    rows = site.batch * site.q_heads * site.q_len
    return int(rows * (site.head_dim + site.value_dim) * site.dtype.itemsize)


def _memory_dense(site: AttentionSite) -> int:
    scores = 0
    if site.spelling == _WRITTEN_OUT:
        scores = 2 * site.batch * site.q_heads * site.q_len * site.kv_len * site.dtype.itemsize
    return int(_result(site) + scores)


def _result(site: AttentionSite) -> int:
    """Output and float32 log-sum-exp."""
    rows = site.batch * site.q_heads * site.q_len
    return int(rows * (site.value_dim * site.dtype.itemsize + 4))


def _blocks(site: AttentionSite, config: NSAConfig) -> int:
    """The int32 numbers of the blocks that each tile reads."""
    blocks = min(config.num_selected or 0, _tiles(int(site.kv_len), config.select_block))
    tiles = site.batch * _choices(site, config) * _tiles(int(site.q_len), config.query_tile or 1)
    return int(tiles * blocks * 4)


def _choices(site: AttentionSite, config: NSAConfig) -> int:
    """Choices of blocks that a tile makes."""
    return site.kv_heads if config.share_selection else site.q_heads


def _tiles(count: int, tile: int) -> int:
    return -(-count // tile)
