"""The operators as functions, for people who build their own modules; layout is SDPA's.

Shapes: B batch, Hq query heads, Hkv key/value heads (Hq a multiple of Hkv, G = Hq // Hkv; query
head h reads kv head h // G), Tq and Tk lengths, D query/key width, Dv value width, L selection
block, R query tile, n selected blocks, Nc compressed blocks. Query i stands at position
``i + offset``; a ``window`` of W keeps the keys ``p - W < j <= p`` (``|p - j| < W`` when not
causal); ``valid`` is bool [B, Tk], True for a real key. Inputs may have any strides.

Further terms of the mask, on top of the others: ``ranges`` int32 [B or 1, Tq, 2] keeps the keys
``ranges[b, i, 0] <= j < ranges[b, i, 1]``; ``query_segments`` int32 [B or 1, Tq] and
``key_segments`` int32 [B or 1, Tk] keep the keys of the query's own segment. What is done to a
scaled logit s: ``softcap`` makes it ``softcap * tanh(s / softcap)``, then ALiBi adds ``slopes[h] *
(positions[j] - positions[p])``, slopes float32 [Hq] and positions float32 [B or 1, Tk] (None: the
key's index); both are constants to autograd.

Sequences of several lengths, one after another in one row: ``cu_seqlens``, integers [S + 1], holds
their boundaries ``[0, len_0, len_0 + len_1, ...]``, Tk at the end. Tq is Tk then, and a query sees
keys of its own sequence alone. It stands in the place of ``ranges``.

Under ``torch.autocast`` queries, keys and values are cast to its dtype, as those of
``scaled_dot_product_attention`` are; that is the ``q.dtype`` of a result then.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import nsa_compile.kernels.library  # noqa: F401
from nsa_compile.checks import (
    check_blocks,
    check_gated_terms,
    check_gates,
    check_inputs,
    check_lse,
    check_mask,
    check_scales,
    check_scorer,
    check_sel_scale,
    check_sizes,
    check_terms,
    check_unlearned,
    check_valid,
    logit_scale,
    pooled_keys,
)
from nsa_compile.kernels.autocast import autocast_dtype
from nsa_compile.kernels.geometry import num_tiles
from nsa_compile.masked_blocks import blocks_from_mask
from nsa_compile.packed import packed_ranges
from nsa_compile.passes import merges
from nsa_compile.passes.config import DEFAULT_CHANNELS, NSAConfig
from nsa_compile.passes.heads import each_head

__all__ = [
    "blocks_from_mask",
    "compress",
    "compressed_attention",
    "nsa_attention",
    "select_blocks",
    "selected_attention",
    "sliding_window_attention",
]

_DEFAULTS = NSAConfig()  # made here: compiled code cannot make one


def compress(x: Tensor, *, block: int, stride: int, valid: Tensor | None = None) -> Tensor:
    """Mean-pool keys (or values) into compressed blocks (arXiv 2502.11089, eq. 7, mean as phi).

    Args:
        x: [B, H, T, D], any floating dtype.
        block: l, tokens in a compressed block.
        stride: d, tokens between the starts of neighbours.
        valid: bool [B, T]; padding is left out of the mean.

    Returns:
        [B, H, Nc, D] in x.dtype with ``Nc = max(0, (T - l) // d + 1)``: block c is the mean of the
        valid tokens of ``[c * d, c * d + l)``, 0 when it has none. Differentiable.

    Raises:
        ValueError: a wrong shape, dtype or size.
    """
    if x.ndim != 4:
        raise ValueError(f"x must be [B, H, T, D], got {list(x.shape)}")
    check_sizes(block=block, stride=stride)
    check_valid(valid, x.shape[0], x.shape[2], "T")
    return torch.ops.nsa.compress(x, valid, block, stride)


def compressed_attention(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, *, block: int, stride: int, causal: bool = True,
    offset: int = 0, scale: float | None = None, valid: Tensor | None = None,
    ranges: Tensor | None = None, cu_seqlens: Tensor | None = None, return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Attention over compressed keys (arXiv 2502.11089, eq. 5 with eq. 7's keys and values).

    A query sees compressed block c if it is complete, ``c * d + l - 1 <= p``, lies inside the
    query's range, and holds a valid key: a block that straddles two documents is seen by neither.

    Args:
        q: [B, Hq, Tq, D].
        k_cmp: [B, Hkv, Nc, D], as from ``compress``, the dtype of q.
        v_cmp: [B, Hkv, Nc, Dv], the dtype of q.
        block: l, tokens in a compressed block.
        stride: d, tokens between the starts of neighbours.
        causal: False sees every block, complete or not.
        scale: of the logits; None is ``1 / sqrt(D)``.
        valid: bool [B, Tk] with ``(Tk - l) // d + 1 == Nc``, of the tokens that were pooled.
        ranges: int32 [B or 1, Tq, 2], in tokens.
        return_lse: also return the log-sum-exp of the logits, which ``select_blocks`` can use.

    Returns:
        out [B, Hq, Tq, Dv] in q.dtype; with ``return_lse`` also lse float32 [B, Hq, Tq]. A query
        that sees no block has out 0 and lse -inf. Both are differentiable in q, k_cmp and v_cmp.

    Raises:
        ValueError: a wrong shape, dtype or size.
    """
    check_inputs(q, k_cmp, v_cmp, None, ("k_cmp", "v_cmp", "Nc"))
    check_sizes(block=block, stride=stride)
    ranges = packed_ranges(cu_seqlens, ranges, q.shape[2], q.shape[2], offset)
    check_terms(q, k_cmp, ranges, None, None, None, None, 0.0)
    if valid is not None:
        check_valid(valid, q.shape[0], valid.shape[-1], "Tk")
        blocks = max(0, (valid.shape[1] - block) // stride + 1)
        if blocks != k_cmp.shape[2]:
            raise ValueError(
                f"valid covers {blocks} compressed blocks of block={block} and stride={stride}, "
                f"got k_cmp with {k_cmp.shape[2]}"
            )
    out, lse = torch.ops.nsa.compressed_attention(
        q,
        k_cmp,
        v_cmp,
        valid,
        ranges,
        logit_scale(scale, q.shape[3]),
        causal,
        offset,
        block,
        stride,
    )
    return (out, lse) if return_lse else out


def select_blocks(
    q: Tensor, k: Tensor, *, scorer: str = "channels", k_cmp: Tensor | None = None,
    scale: float | None = None, causal: bool = True, offset: int = 0, window: int | None = None,
    valid: Tensor | None = None, query_tile: int = 64, block: int = 64, num_selected: int = 16,
    init_blocks: int = 1, local_window: int = 512, compress_block: int = 32,
    compress_stride: int = 16, score_channels: int | None = None, ranges: Tensor | None = None,
    query_segments: Tensor | None = None, key_segments: Tensor | None = None,
    slopes: Tensor | None = None, positions: Tensor | None = None, softcap: float = 0.0,
    lse: Tensor | None = None, cu_seqlens: Tensor | None = None,
    importance: str = "overlap", share_selection: bool = True, sel_scale: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Choose the blocks of keys that each tile of queries reads.

    A tile always reads the first ``init_blocks`` blocks and those its ``local_window`` touches, if
    it sees them at all; the remaining slots go to the highest scores, ties to the lower index.

    Scorer "channels" (docs/semantics.md): a block's logit for a query is the largest product of the
    query with its keys on the ``score_channels`` channels with the largest ``E[q_c^2] * Var[k_c]``;
    softmax over blocks, summed over the group's heads and the tile's queries. Scorer "mean"
    (arXiv 2502.11089, eq. 8-10): softmax over mean-pooled keys, each probability shared among the
    blocks it overlaps.

    Args:
        q: [B, Hq, Tq, D].
        k: [B, Hkv, Tk, D], the dtype of q.
        k_cmp: [B, Hkv, Nc, D], the pooled keys of scorer "mean"; None pools ``k``.
        scale: of the logits; None is ``1 / sqrt(D)``.
        query_tile: R, queries that share one choice.
        block: L, keys in a block.
        num_selected: n, blocks a tile reads, the forced ones included.
        local_window: most recent keys that are always read (centred when not causal).
        score_channels: r; None is all, at most 128. On a GPU that multiplies 8-bit numbers, 16-bit
            inputs are scored in them (e4m3) from 33 channels on.
        ranges: int32 [B or 1, Tq, 2]; query i sees the keys ``ranges[b, i, 0] <= j < ranges[b, i,
            1]`` of those it would see.
        query_segments: int32 [B or 1, Tq], with ``key_segments`` [B or 1, Tk]: a key is seen where
            the two are equal. Scorer "mean" does not look at them.
        slopes: float32 [Hq], ALiBi (arXiv 2108.12409): logits gain ``slopes[h] * (x[j] - x[p])``.
        positions: float32 [B or 1, Tk], x of ALiBi; None is the key's index.
        softcap: c of ``c * tanh(logit / c)``, applied to the scaled logit before ALiBi; 0 is none.
        lse: float32 [B, Hq, Tq], with scorer "mean": what ``compressed_attention`` returned for
            the same queries, compressed keys and mask. It saves time and changes nothing.
        importance: how scorer "mean" carries probabilities over to blocks: "overlap" by the tokens
            shared, "interpolate" linearly between the centres of compressed blocks, which tells
            blocks apart that are smaller than these (formulas in docs/semantics.md).
        share_selection: False lets each query head choose blocks of its own.
        sel_scale: with scorer "mean", also return the straight-through scales of the chosen blocks,
            for ``selected_attention``: 1, and differentiable in q, ``k_cmp`` and ``lse``.

    Returns:
        int32 [B, Hkv, ceil(Tq / R), n], ascending, -1 at the end; [B, Hq, ceil(Tq / R), n] without
        ``share_selection``. Not differentiable. With ``sel_scale`` also float32 scales of that
        shape (formula in docs/semantics.md).

    Raises:
        ValueError: a wrong shape, dtype or size, or ``num_selected`` cannot hold the forced blocks.
    """
    check_inputs(q, k, None, valid)
    check_sizes(
        query_tile=query_tile, block=block, num_selected=num_selected, local_window=local_window,
        compress_block=compress_block, compress_stride=compress_stride,
    )  # fmt: skip
    check_mask(window, init_blocks)
    check_lse(lse, q, scorer)
    ranges = packed_ranges(cu_seqlens, ranges, q.shape[2], k.shape[2], offset)
    check_terms(q, k, ranges, query_segments, key_segments, slopes, positions, softcap)
    check_scorer(scorer, importance)
    pooled = None
    if scorer == "mean":
        pooled = pooled_keys(k, k_cmp, valid, compress_block, compress_stride)
    factor, dim = logit_scale(scale, q.shape[3]), q.shape[3]
    if sel_scale:
        check_sel_scale(scorer, window, query_segments, slopes, softcap)
        if lse is None:
            pooled_sizes = (factor, causal, offset, compress_block, compress_stride)
            lse = torch.ops.nsa.compressed_attention(
                q, pooled, pooled, valid, ranges, *pooled_sizes, k.shape[2]
            )[1]
    channels = DEFAULT_CHANNELS if score_channels is None else score_channels
    check_sizes(score_channels=channels)

    def choose(q: Tensor, lse: Tensor | None, slopes: Tensor | None) -> tuple[Tensor, ...]:
        summary = pooled
        if summary is None:
            summary = torch.ops.nsa.channels(q, k, valid, min(channels, dim), 0)
        blocks = torch.ops.nsa.select_blocks(
            q, k, summary, valid, ranges, query_segments, key_segments, slopes, positions, scorer,
            factor, softcap, causal, offset, window, query_tile, block, num_selected, init_blocks,
            local_window, compress_block, compress_stride, 0,
            None if lse is None else lse.detach(), importance,
        )  # fmt: skip
        results = [blocks]
        if sel_scale:
            scales = torch.ops.nsa.selection_scale(
                q, summary, lse, blocks, valid, ranges, factor, causal, offset, compress_block,
                compress_stride, k.shape[2], query_tile, block, init_blocks, local_window,
                importance,
            )  # fmt: skip
            results.append(scales)
        tiles = num_tiles(q.shape[2], query_tile)
        return tuple(x.unflatten(2, (tiles, num_selected)) for x in results)

    if share_selection:
        results = choose(q, lse, slopes)
    else:
        results = each_head(choose, k.shape[1], q, lse, slopes)
    return results if sel_scale else results[0]


def selected_attention(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, *, block: int, query_tile: int,
    causal: bool = True, offset: int = 0, window: int | None = None, scale: float | None = None,
    valid: Tensor | None = None, return_lse: bool = False, ranges: Tensor | None = None,
    query_segments: Tensor | None = None, key_segments: Tensor | None = None,
    slopes: Tensor | None = None, positions: Tensor | None = None, softcap: float = 0.0,
    cu_seqlens: Tensor | None = None, sel_scale: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """One softmax over the keys of the selected blocks (arXiv 2502.11089, eq. 11-12).

    Args:
        q: [B, Hq, Tq, D].
        k: [B, Hkv, Tk, D], the dtype of q.
        v: [B, Hkv, Tk, Dv], the dtype of q.
        block_indices: integers [B, Hkv, ceil(Tq / R), n], as from ``select_blocks``; -1 is an empty
            slot, and a block named twice counts once. [B, Hq, ceil(Tq / R), n] lists blocks for
            each query head.
        block: L, keys in a block.
        query_tile: R, queries that share one choice.
        scale: of the logits; None is ``1 / sqrt(D)``.
        return_lse: also return the log-sum-exp of the logits.
        sel_scale: floating, shaped like ``block_indices``: what the logits of each listed block are
            multiplied by. It must be 1 and is there for its gradient; ``select_blocks`` makes it.

    Returns:
        out [B, Hq, Tq, Dv] in q.dtype; with ``return_lse`` also lse float32 [B, Hq, Tq]. A query
        that sees no key has out 0 and lse -inf. Both are differentiable in q, k, v and sel_scale.

    Raises:
        ValueError: a wrong shape, dtype or size; ``sel_scale`` that is not 1 (on the GPU an
            assertion on the device), or beside ALiBi or a softcap.
    """
    check_inputs(q, k, v, valid)
    check_sizes(block=block, query_tile=query_tile)
    check_mask(window, 0)
    ranges = packed_ranges(cu_seqlens, ranges, q.shape[2], k.shape[2], offset)
    check_terms(q, k, ranges, query_segments, key_segments, slopes, positions, softcap)
    terms = (valid, ranges, query_segments, key_segments)
    check_blocks(block_indices, q, k, query_tile)
    check_scales(sel_scale, block_indices, slopes, softcap)
    factor, site = logit_scale(scale, q.shape[3]), (causal, offset, window, query_tile, block)

    def attend(
        q: Tensor, listed: Tensor, slopes: Tensor | None, scales: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        listed, ops = listed.to(torch.int32).flatten(2), torch.ops.nsa
        if scales is None:
            more = (slopes, positions, factor, softcap)
            out, lse = ops.selected_attention(q, k, v, listed, *terms, *more, *site, 0)
        else:
            scales = scales.flatten(2)
            out, lse = ops.scaled_attention(q, k, v, listed, scales, *terms, factor, *site)
        return out, lse

    if block_indices.shape[1] == k.shape[1]:
        out, lse = attend(q, block_indices, slopes, sel_scale)
    else:
        out, lse = each_head(attend, k.shape[1], q, block_indices, slopes, sel_scale)
    return (out, lse) if return_lse else out


def sliding_window_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int, causal: bool = True, offset: int = 0,
    scale: float | None = None, valid: Tensor | None = None, return_lse: bool = False,
    ranges: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Softmax attention over the nearest keys: the window branch of arXiv 2502.11089, section 3.3.

    Args:
        q: [B, Hq, Tq, D].
        k: [B, Hkv, Tk, D], the dtype of q.
        v: [B, Hkv, Tk, Dv], the dtype of q.
        window: W, keys a query sees, its own included: ``0 <= p - j < W``; when not causal
            ``|p - j| < W``.
        scale: of the logits; None is ``1 / sqrt(D)``.
        return_lse: also return the log-sum-exp of the logits.

    Returns:
        out [B, Hq, Tq, Dv] in q.dtype; with ``return_lse`` also lse float32 [B, Hq, Tq]. A query
        that sees no key has out 0 and lse -inf. Both are differentiable in q, k and v. Work is
        linear in Tq.

    Raises:
        ValueError: a wrong shape, dtype or size.
    """
    check_inputs(q, k, v, valid)
    check_sizes(window=window)
    ranges = packed_ranges(cu_seqlens, ranges, q.shape[2], k.shape[2], offset)
    check_terms(q, k, ranges, None, None, None, None, 0.0)
    out, lse = torch.ops.nsa.sliding_window_attention(
        q, k, v, valid, ranges, logit_scale(scale, q.shape[3]), causal, offset, window
    )
    return (out, lse) if return_lse else out


def nsa_attention(
    q: Tensor, k: Tensor, v: Tensor, *, gates: Tensor | None = None,
    config: NSAConfig | Mapping[str, Any] | None = None,
    causal: bool = True, offset: int = 0, window: int | None = None, valid: Tensor | None = None,
    scale: float | None = None, ranges: Tensor | None = None,
    query_segments: Tensor | None = None, key_segments: Tensor | None = None,
    slopes: Tensor | None = None, positions: Tensor | None = None, softcap: float = 0.0,
    cu_seqlens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The whole attention: score, select, attend, and with ``merge="gate"`` the paper's branches.

    ``merge="softmax"`` is what the backend puts into a graph: one softmax over the chosen blocks;
    up to ``config.dense_len`` keys it is dense attention at the cost of SDPA. ``merge="gate"``
    (arXiv 2502.11089, eq. 5) is ``g_cmp * O_cmp + g_slc * O_slc + g_win * O_win`` over mean-pooled,
    selected and nearest keys, at every length: trained gates weigh three branches, and dense
    attention would be another function, so ``dense_len`` has no part in it. Its selection forces
    the first ``init_blocks`` blocks, the query's own and the one before.

    Args:
        q: [B, Hq, Tq, D].
        k: [B, Hkv, Tk, D], the dtype of q.
        v: [B, Hkv, Tk, Dv], the dtype of q.
        gates: [B, Hq, Tq, 3], floating, of the compressed, selected and window branch, used as
            they are: a sigmoid is the caller's. For ``merge="gate"`` alone.
        config: NSAConfig, a mapping of its options, or None for the defaults; a function compiled
            with ``fullgraph=True`` takes an NSAConfig that was made outside of it, or None.
        window: the site's own sliding window; ``config.window`` is what is always read.
        scale: of the logits; None is ``1 / sqrt(D)``.

    Returns:
        [B, Hq, Tq, Dv] in q.dtype, differentiable in q, k, v and gates.

    Raises:
        ValueError: a wrong shape, dtype or size (NSAConfigError for a wrong option); gates missing
            or without ``merge="gate"``; with it a window, segments, ALiBi or a cap.
    """
    check_inputs(q, k, v, valid)
    check_mask(window, 0)
    ranges = packed_ranges(cu_seqlens, ranges, q.shape[2], k.shape[2], offset)
    check_terms(q, k, ranges, query_segments, key_segments, slopes, positions, softcap)
    options = _DEFAULTS if config is None else NSAConfig.from_options(config)
    check_gates(gates, q, options.merge)
    q, k, v = (x.to(autocast_dtype(x)) for x in (q, k, v))  # once, not in each operator
    factor = logit_scale(scale, q.shape[3])
    if gates is not None:
        check_gated_terms(window, query_segments, slopes, softcap)
        check_unlearned(options)
        learned = merges.pooled(gates, k, v, options, valid)
        return merges.gated(q, k, v, learned, options, valid, ranges, factor, causal, offset)
    terms = (valid, ranges, query_segments, key_segments, slopes, positions)
    return merges.one_softmax(q, k, v, options, terms, (factor, softcap, causal, offset, window))
