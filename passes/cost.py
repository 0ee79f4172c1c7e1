"""What a site costs, dense and sparse.

FLOPs count a multiply and an add as two, forward only, for the whole batch. Only the (query, key)
pairs that the mask's structure lets through are counted: causality halves, a sliding window counts
its keys, a chunk half of itself. Padding and documents depend on the data and are not subtracted,
a prefix adds none; a mask that was not understood counts every pair. Sizes of a dynamic graph stay
symbolic: the arithmetic runs on sympy expressions and never compares or converts a SymInt, which
would install a guard.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import sympy
import torch
from torch import fx

from nsa_compile.passes.config import NSAConfig
from nsa_compile.passes.site import AttentionSite, Mask

Size = Any  # an int, or a sympy expression in a dynamic graph


def flops_dense(site: AttentionSite) -> int | str:
    """FLOPs of softmax(q k^T) v over the pairs that the mask lets through."""
    return text(_dense(site))


def flops_sparse(site: AttentionSite, config: NSAConfig) -> int | str:
    """FLOPs of choosing blocks and attending to them; those of dense up to ``dense_len`` keys.

    With gates they are those of three branches at any length, without what the model's own
    compression costs. Attending is bounded by n blocks of L keys for a query. Under dynamic lengths
    the text is a Python expression in the graph's symbols.
    """
    dense, keys = _dense(site), size(site.kv_len)
    again = 2 * site.head_dim * second_look_pairs(site, config)
    attending = 2 * (site.head_dim + site.value_dim) * attended_pairs(site, config)
    sparse = _scoring(site, config) + _heads(site) * (again + attending)
    if config.merge == "gate":
        return text(sparse + _other_branches(site, config))
    if isinstance(keys, int):
        assert config.dense_len is not None
        return text(dense if keys <= config.dense_len else sparse)
    if not config.dense_len:
        return text(sparse)
    return f"{text(sparse)} if {text(keys)} > {config.dense_len} else {text(dense)}"


@lru_cache(maxsize=256)
def visible_pairs(
    q_len: Size, kv_len: Size, causal: bool, offset: Size = 0, window: Size | None = None
) -> Size:
    """How many (query, key) pairs the mask lets through; position of query i is ``i + offset``.

    Query i sees ``clamp(high) - clamp(low)`` keys, where both ends move by one a query, so each end
    sums to a difference of :func:`_ramp`.
    """
    if not causal and window is None:
        return q_len * kv_len
    high = offset if causal else offset + window - 1
    pairs = _ramp(q_len + high, kv_len) - _ramp(high, kv_len)
    if window is not None:
        low = offset - window
        pairs -= _ramp(q_len + low, kv_len) - _ramp(low, kv_len)
    return pairs


def _ramp(count: Size, limit: Size) -> Size:
    """sum of min(x, limit) for x = 1 .. count; 0 when count is negative."""
    count = _max(count, 0)
    rising = _min(count, limit)
    return _half(rising * (rising + 1)) + (count - rising) * limit


def _dense(site: AttentionSite) -> Size:
    return _heads(site) * 2 * (site.head_dim + site.value_dim) * pairs(site)


def _scoring(site: AttentionSite, config: NSAConfig) -> Size:
    """Every visible key on r channels, or every compressed block on all of them."""
    scored = pairs(site)
    if config.selector != "nsa":  # by position, unless it looks at everything
        return _heads(site) * 2 * site.head_dim * scored if config.selector == "topk" else 0
    if config.scorer == "channels":
        return _heads(site) * 2 * config.channels(site.head_dim) * scored
    return _heads(site) * 2 * site.head_dim * (scored // config.compress_stride)


def second_look_pairs(site: AttentionSite, config: NSAConfig) -> Size:
    """Pairs in the proposed blocks that are not forced; none without a second look."""
    proposed = config.proposed_blocks(site.head_dim)
    if proposed == config.num_selected:
        return 0
    free = max(proposed - config.forced_blocks(), 0)
    return _pairs_read(site, free * config.select_block)


def attended_pairs(site: AttentionSite, config: NSAConfig) -> Size:
    """Pairs in the chosen blocks."""
    assert config.num_selected is not None
    return _pairs_read(site, config.num_selected * config.select_block)


def _other_branches(site: AttentionSite, config: NSAConfig) -> Size:
    """Attention over the compressed keys, whose logits the scores share, and over the window."""
    compressed = _pairs(site, _own_window(site)) // config.compress_stride
    dims = site.value_dim if config.scorer == "mean" else site.head_dim + site.value_dim
    seen = dims * compressed
    seen += (site.head_dim + site.value_dim) * _pairs_read(site, config.window or 0)
    return _heads(site) * 2 * seen


def _pairs_read(site: AttentionSite, budget: int) -> Size:
    """Visible pairs when a query reads at most ``budget`` keys."""
    own = _own_window(site)
    if isinstance(site.mask, Mask) and site.mask.causal:
        return _pairs(site, budget if own is None else min(own, budget))
    return _min(_pairs(site, own), size(site.q_len) * budget)


def _own_window(site: AttentionSite) -> int | None:
    return site.mask.window if isinstance(site.mask, Mask) else None


def pairs(site: AttentionSite) -> Size:
    """Pairs that the site's own mask lets through."""
    return _pairs(site, _own_window(site))


def _pairs(site: AttentionSite, window: int | None) -> Size:
    causal, offset, chunk = False, 0, None
    if isinstance(site.mask, Mask):
        causal, offset = site.mask.causal, _offset(site.mask.offset)
        chunk = site.mask.chunk
    q_len = size(site.q_len)
    pairs = visible_pairs(q_len, size(site.kv_len), causal, offset, window)
    if chunk is None:
        return pairs
    return _min(pairs, _half(q_len * (chunk + 1)) if causal else q_len * chunk)


def _heads(site: AttentionSite) -> Size:
    return size(site.batch) * site.q_heads


def _offset(offset: int | fx.Node) -> Size:
    if isinstance(offset, int):
        return offset
    value = offset.meta.get("example_value")
    if isinstance(value, (int, torch.SymInt)):
        return size(value)
    return sympy.Symbol(offset.name, integer=True)


def size(extent: int | torch.SymInt) -> Size:
    """An int, or the sympy expression behind a SymInt (reading it installs no guard)."""
    if isinstance(extent, int):
        return extent
    expression = extent.node.expr
    return int(expression) if expression.is_number else expression


def _min(left: Size, right: Size) -> Size:
    both_known = isinstance(left, int) and isinstance(right, int)
    return min(left, right) if both_known else sympy.Min(left, right)


def _max(left: Size, right: Size) -> Size:
    both_known = isinstance(left, int) and isinstance(right, int)
    return max(left, right) if both_known else sympy.Max(left, right)


def _half(even: Size) -> Size:
    return even // 2 if isinstance(even, int) else even / 2


def text(count: Size) -> int | str:
    """An int as it is; an expression as Python text over the graph's symbols."""
    if isinstance(count, int):
        return count
    if count.is_Integer:
        return int(count)
    return str(count).replace("Min(", "min(").replace("Max(", "max(").replace("floor(", "int(")
