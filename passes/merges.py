"""The two ways in which chosen blocks become an output, as calls of the operators."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nsa_compile.passes.choice import Choice, Logits, Terms, chosen_blocks
from nsa_compile.passes.config import NSAConfig
from nsa_compile.passes.selected import selected_branch
from nsa_compile.passes.templates import Learned

# One H100, 65,536 tokens, window 512, blocks of 64, ms forward + backward by queries of a tile.
# 64/4 heads: 16 queries 3.5 + 12.2, 32 queries 3.5 + 12.0, 64 queries 3.5 + 12.8; 32/8 heads: 32
# queries 1.9 + 6.2, 64 queries 2.0 + 6.6, 128 queries 2.2 + 7.2; 32/32 heads: 32 queries 3.5 + 8.1,
# 64 queries 2.3 + 7.0, 128 queries 2.4 + 7.4. Blocks of 128 are slower everywhere.
_WINDOW_BLOCK = 64
# Two rows past the compressed blocks keep their number from ever being 0 or 1, sizes that torch
# compiles separately for: one dynamic compilation serves short sequences too.
SPARE_ROWS = 2


def one_softmax(
    q: Tensor, k: Tensor, v: Tensor, options: NSAConfig, terms: Terms, logits: Logits
) -> Tensor:
    """``merge="softmax"``: one softmax over the keys of the chosen blocks."""
    dense_len = options.dense_len or 0
    blocks = chosen_blocks(q, k, options, terms, logits, Choice(options.window or 0, dense_len))
    sizes = (options.query_tile, options.select_block)
    attention = torch.ops.nsa.selected_attention
    out: Tensor = attention(q, k, v, blocks, *terms, *logits, *sizes, dense_len)[0]
    return out


def pooled(
    gates: Tensor, k: Tensor, v: Tensor, options: NSAConfig, valid: Tensor | None
) -> Learned:
    """Gates, and keys and values compressed by their mean."""
    sizes = (options.compress_block, options.compress_stride, SPARE_ROWS)
    k_cmp, v_cmp = (torch.ops.nsa.compress(x, valid, *sizes) for x in (k, v))
    return Learned(gates, k_cmp, v_cmp, None, None)


def gated(
    q: Tensor, k: Tensor, v: Tensor, learned: Learned, options: NSAConfig, valid: Tensor | None,
    ranges: Tensor | None, scale: float, causal: bool, offset: int,
) -> Tensor:  # fmt: skip
    """``merge="gate"``: the gated sum of three branches (arXiv 2502.11089, eq. 5)."""
    ops, mask = torch.ops.nsa, (scale, causal, offset)
    sizes = (options.compress_block, options.compress_stride)
    gates, k_cmp, v_cmp, k_mem, v_mem = learned
    compressed, lse = ops.compressed_attention(
        q, k_cmp, v_cmp, valid, ranges, *mask, *sizes, k.shape[2]
    )
    window, _ = sliding_window(q, k, v, valid, ranges, *mask, options.window or 1)
    selected = torch.zeros_like(window)
    if options.num_selected:
        selected = selected_branch(q, k, v, k_cmp, lse, options, valid, ranges, mask)
    if k_mem is not None and v_mem is not None:
        compressed = with_memory(q, compressed, lse, k_mem, v_mem, scale)
    out: Tensor = ops.combine(gates, compressed, selected, window)
    return out


def with_memory(
    q: Tensor, out: Tensor, lse: Tensor, k_mem: Tensor, v_mem: Tensor, scale: float
) -> Tensor:
    """``out`` with log-sum-exp ``lse``, as if its softmax also ran over ``k_mem`` [Hkv, M, D]."""
    grouped = q.unflatten(1, (k_mem.shape[0], -1))
    logits = torch.einsum("bhgtd,hmd->bhgtm", grouped, k_mem).to(lse.dtype) * scale
    remembered = torch.einsum("bhgtm,hme->bhgte", logits.softmax(-1), v_mem.to(lse.dtype))
    # A query that sees no block has lse -inf: all of its softmax is memory.
    share = torch.sigmoid(logits.logsumexp(-1).flatten(1, 2) - lse)[..., None]
    return (out * (1 - share) + remembered.flatten(1, 2) * share).to(out.dtype)


def sliding_window(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, ranges: Tensor | None, scale: float,
    causal: bool, offset: int, window: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out and lse over the keys of a window: the blocks it touches are known from the shapes."""
    tile = 32 if q.shape[1] >= 4 * k.shape[1] else 64
    table = _window_table(q, k, tile, causal, offset, window)
    table = table.expand(k.shape[0], k.shape[1], -1)
    out, lse = torch.ops.nsa.selected_attention(
        q, k, v, table, valid, ranges, None, None, None, None, scale, 0.0, causal, offset, window,
        tile, _WINDOW_BLOCK, 0,
    )  # fmt: skip
    return out, lse


def _window_table(
    q: Tensor, k: Tensor, tile: int, causal: bool, offset: int, window: int
) -> Tensor:
    """int32 [NT * n]: the blocks of each tile's window; those past the last key are never read.

    Flat like the result of nsa::select_blocks: torch compiles separately for a dimension NT of 1.
    """
    block, ahead = _WINDOW_BLOCK, 0 if causal else window - 1
    tiles = -(-q.shape[2] // tile)
    reach = tile - 1 + ahead + window - 1  # from the first key of the window to the last
    step = math.gcd(tile, block)
    width = (reach + (offset - (window - 1)) % step + block - step) // block + 1
    if isinstance(k.shape[2], int):
        width = torch.sym_min(width, -(-k.shape[2] // block))
    slots = torch.arange(tiles * width, dtype=torch.int32, device=q.device)
    starts = torch.div(slots, width, rounding_mode="floor") * tile + offset
    first = torch.div(starts - (window - 1), block, rounding_mode="floor").clamp(min=0)
    table = first + slots % width
    last = torch.div(starts + (tile - 1 + ahead), block, rounding_mode="floor")
    return torch.where(table <= last, table, -1).to(torch.int32)
