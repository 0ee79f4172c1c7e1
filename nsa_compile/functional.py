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
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import nsa_compile.kernels.library  # noqa: F401
from nsa_compile.passes.config import NSAConfig

__all__ = [
    "compress",
    "compressed_attention",
    "nsa_attention",
    "select_blocks",
    "selected_attention",
]


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
    _check_sizes(block=block, stride=stride)
    _check_valid(valid, x.shape[0], x.shape[2], "T")
    return torch.ops.nsa.compress(x, valid, block, stride)


def compressed_attention(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, *, block: int, stride: int, causal: bool = True,
    offset: int = 0, scale: float | None = None, valid: Tensor | None = None,
    ranges: Tensor | None = None, return_lse: bool = False,
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
    _check_inputs(q, k_cmp, v_cmp, None, ("k_cmp", "v_cmp", "Nc"))
    _check_sizes(block=block, stride=stride)
    _check_terms(q, k_cmp, ranges, None, None, None, None, 0.0)
    if valid is not None:
        _check_valid(valid, q.shape[0], valid.shape[-1], "Tk")
        blocks = max(0, (valid.shape[1] - block) // stride + 1)
        if blocks != k_cmp.shape[2]:
            raise ValueError(
                f"valid covers {blocks} compressed blocks of block={block} and stride={stride}, "
                f"got k_cmp with {k_cmp.shape[2]}"
            )
    out, lse = torch.ops.nsa.compressed_attention(
        q, k_cmp, v_cmp, valid, ranges, _scale(scale, q.shape[3]), causal, offset, block, stride
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
    lse: Tensor | None = None,
) -> Tensor:  # fmt: skip
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
        score_channels: r; None is a quarter of D, at least 16.
        ranges: int32 [B or 1, Tq, 2]; query i sees the keys ``ranges[b, i, 0] <= j < ranges[b, i,
            1]`` of those it would see.
        query_segments: int32 [B or 1, Tq], with ``key_segments`` [B or 1, Tk]: a key is seen where
            the two are equal. Scorer "mean" does not look at them.
        slopes: float32 [Hq], ALiBi (arXiv 2108.12409): logits gain ``slopes[h] * (x[j] - x[p])``.
        positions: float32 [B or 1, Tk], x of ALiBi; None is the key's index.
        softcap: c of ``c * tanh(logit / c)``, applied to the scaled logit before ALiBi; 0 is none.
        lse: float32 [B, Hq, Tq], with scorer "mean": what ``compressed_attention`` returned for
            the same queries, compressed keys and mask. It saves time and changes nothing.

    Returns:
        int32 [B, Hkv, ceil(Tq / R), n], ascending, -1 at the end. Not differentiable.

    Raises:
        ValueError: a wrong shape, dtype or size, or ``num_selected`` cannot hold the forced blocks.
    """
    _check_inputs(q, k, None, valid)
    _check_sizes(
        query_tile=query_tile, block=block, num_selected=num_selected, local_window=local_window,
        compress_block=compress_block, compress_stride=compress_stride,
    )  # fmt: skip
    _check_mask(window, init_blocks)
    _check_lse(lse, q, scorer)
    _check_terms(q, k, ranges, query_segments, key_segments, slopes, positions, softcap)
    dim = q.shape[3]
    if scorer == "channels":
        channels = max(16, dim // 4) if score_channels is None else score_channels
        _check_sizes(score_channels=channels)
        summary = torch.ops.nsa.channels(q, k, valid, min(channels, dim), 0)
    elif scorer == "mean":
        summary = _pooled(k, k_cmp, valid, block, compress_block, compress_stride)
    else:
        raise ValueError(f"scorer must be 'channels' or 'mean', got {scorer!r}")
    blocks = torch.ops.nsa.select_blocks(
        q, k, summary, valid, ranges, query_segments, key_segments, slopes, positions, scorer,
        _scale(scale, dim), softcap, causal, offset, window, query_tile, block, num_selected,
        init_blocks, local_window, compress_block, compress_stride, 0, lse,
    )  # fmt: skip
    return blocks.unflatten(2, (-(-q.shape[2] // query_tile), num_selected))


def selected_attention(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, *, block: int, query_tile: int,
    causal: bool = True, offset: int = 0, window: int | None = None, scale: float | None = None,
    valid: Tensor | None = None, return_lse: bool = False, ranges: Tensor | None = None,
    query_segments: Tensor | None = None, key_segments: Tensor | None = None,
    slopes: Tensor | None = None, positions: Tensor | None = None, softcap: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """One softmax over the keys of the selected blocks (arXiv 2502.11089, eq. 11-12).

    Args:
        q: [B, Hq, Tq, D].
        k: [B, Hkv, Tk, D], the dtype of q.
        v: [B, Hkv, Tk, Dv], the dtype of q.
        block_indices: integers [B, Hkv, ceil(Tq / R), n], as from ``select_blocks``; -1 is an empty
            slot, and a block named twice counts once.
        block: L, keys in a block.
        query_tile: R, queries that share one choice.
        scale: of the logits; None is ``1 / sqrt(D)``.
        return_lse: also return the log-sum-exp of the logits.

    Returns:
        out [B, Hq, Tq, Dv] in q.dtype; with ``return_lse`` also lse float32 [B, Hq, Tq]. A query
        that sees no key has out 0 and lse -inf. Both are differentiable in q, k and v.

    Raises:
        ValueError: a wrong shape, dtype or size.
    """
    _check_inputs(q, k, v, valid)
    _check_sizes(block=block, query_tile=query_tile)
    _check_mask(window, 0)
    _check_terms(q, k, ranges, query_segments, key_segments, slopes, positions, softcap)
    terms = (valid, ranges, query_segments, key_segments, slopes, positions)
    tiles = -(-q.shape[2] // query_tile)
    shape = tuple(block_indices.shape)
    if len(shape) != 4 or shape[:3] != (k.shape[0], k.shape[1], tiles):
        raise ValueError(
            f"block_indices must be [B, Hkv, ceil(Tq / query_tile), n] = "
            f"[{k.shape[0]}, {k.shape[1]}, {tiles}, n], got {list(shape)}"
        )
    if block_indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"block_indices must be int32 or int64, got {block_indices.dtype}")
    out, lse = torch.ops.nsa.selected_attention(
        q, k, v, block_indices.to(torch.int32), *terms, _scale(scale, q.shape[3]), softcap, causal,
        offset, window, query_tile, block, 0,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def nsa_attention(
    q: Tensor, k: Tensor, v: Tensor, *, config: NSAConfig | Mapping[str, Any] | None = None,
    causal: bool = True, offset: int = 0, window: int | None = None, valid: Tensor | None = None,
    scale: float | None = None, ranges: Tensor | None = None,
    query_segments: Tensor | None = None, key_segments: Tensor | None = None,
    slopes: Tensor | None = None, positions: Tensor | None = None, softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    """The whole converted attention: score, select, attend; what the backend puts into a graph.

    Up to ``config.dense_len`` keys this is dense attention at the cost of SDPA.

    Args:
        q: [B, Hq, Tq, D].
        k: [B, Hkv, Tk, D], the dtype of q.
        v: [B, Hkv, Tk, Dv], the dtype of q.
        config: NSAConfig, a mapping of its options, or None for the defaults.
        window: the site's own sliding window; ``config.window`` is what is always read.
        scale: of the logits; None is ``1 / sqrt(D)``.

    Returns:
        [B, Hq, Tq, Dv] in q.dtype, differentiable in q, k and v.

    Raises:
        ValueError: a wrong shape, dtype or size (NSAConfigError for a wrong option).
        NotImplementedError: ``merge="gate"``, which needs trained gates.
    """
    _check_inputs(q, k, v, valid)
    _check_mask(window, 0)
    _check_terms(q, k, ranges, query_segments, key_segments, slopes, positions, softcap)
    terms = (valid, ranges, query_segments, key_segments, slopes, positions)
    options = NSAConfig.from_options(config)
    if options.merge != "softmax":
        raise NotImplementedError(
            f"nsa_attention computes merge='softmax'; merge={options.merge!r} needs trained gates"
        )
    dim = q.shape[3]
    if options.scorer == "channels":
        summary = torch.ops.nsa.channels(q, k, valid, options.channels(dim), options.dense_len)
    else:
        summary = torch.ops.nsa.compress(
            k, valid, options.compress_block, options.compress_stride, 0, options.dense_len
        )
    logits = (_scale(scale, dim), softcap, causal, offset, window)
    sizes = (options.query_tile, options.select_block)
    blocks = torch.ops.nsa.select_blocks(
        q, k, summary, *terms, options.scorer, *logits, *sizes, options.proposed_blocks(),
        options.init_blocks, options.window, options.compress_block, options.compress_stride,
        options.dense_len,
    )  # fmt: skip
    if options.proposed_blocks() > (options.num_selected or 0):
        blocks = torch.ops.nsa.refine_blocks(
            q, k, blocks, *terms, *logits, *sizes, options.num_selected, options.init_blocks,
            options.window, options.dense_len,
        )  # fmt: skip
    out, _ = torch.ops.nsa.selected_attention(
        q, k, v, blocks, *terms, *logits, *sizes, options.dense_len
    )
    return out


def _scale(scale: float | None, dim: int) -> float:
    return 1 / math.sqrt(dim) if scale is None else scale


def _pooled(
    k: Tensor, k_cmp: Tensor | None, valid: Tensor | None, block: int, length: int, stride: int
) -> Tensor:
    """The compressed keys of scorer "mean", pooled here or given and checked."""
    if block % stride:
        raise ValueError(
            f"block must be a multiple of compress_stride, got block={block} and "
            f"compress_stride={stride}"
        )
    if k_cmp is None:
        return torch.ops.nsa.compress(k, valid, length, stride)
    batch, heads, kv_len, dim = k.shape
    expected = [batch, heads, max(0, (kv_len - length) // stride + 1), dim]
    if list(k_cmp.shape) != expected or k_cmp.dtype != k.dtype:
        raise ValueError(
            f"k_cmp must be [B, Hkv, Nc, D] = {expected} in {k.dtype}, got {list(k_cmp.shape)} in "
            f"{k_cmp.dtype}"
        )
    return k_cmp


def _check_lse(lse: Tensor | None, q: Tensor, scorer: str) -> None:
    if lse is None:
        return
    if scorer != "mean":
        raise ValueError(f"lse is that of scorer 'mean', got scorer {scorer!r}")
    if lse.dtype != torch.float32 or lse.shape != q.shape[:3]:
        raise ValueError(
            f"lse must be float32 [B, Hq, Tq] = {list(q.shape[:3])}, got {lse.dtype} "
            f"{list(lse.shape)}"
        )


def _check_inputs(
    q: Tensor, k: Tensor, v: Tensor | None, valid: Tensor | None,
    names: tuple[str, str, str] = ("k", "v", "Tk"),
) -> None:  # fmt: skip
    key, value, length = names
    named = [("q", q, "[B, Hq, Tq, D]"), (key, k, f"[B, Hkv, {length}, D]")]
    if v is not None:
        named.append((value, v, f"[B, Hkv, {length}, Dv]"))
    for name, tensor, layout in named:
        if tensor.ndim != 4:
            raise ValueError(f"{name} must be {layout}, got {list(tensor.shape)}")
        if tensor.dtype != q.dtype or not tensor.is_floating_point():
            raise ValueError(
                f"q, {key} and {value} must have one floating dtype, got {name} in {tensor.dtype} "
                f"and q in {q.dtype}"
            )
    batch, q_heads, _, dim = q.shape
    if k.shape[0] != batch or k.shape[3] != dim:
        raise ValueError(
            f"{key} must be [B, Hkv, {length}, D] with B={batch} and D={dim} of q, got "
            f"{list(k.shape)}"
        )
    if k.shape[1] == 0 or q_heads % k.shape[1]:
        raise ValueError(f"Hq must be a multiple of Hkv, got Hq={q_heads} and Hkv={k.shape[1]}")
    if v is not None and v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"{value} must be [B, Hkv, {length}, Dv] with {list(k.shape[:3])} of {key}, got "
            f"{list(v.shape)}"
        )
    _check_valid(valid, batch, k.shape[2], length)


def _check_valid(valid: Tensor | None, batch: int, length: int, name: str) -> None:
    if valid is None:
        return
    if valid.dtype != torch.bool or tuple(valid.shape) != (batch, length):
        raise ValueError(
            f"valid must be bool [B, {name}] = [{batch}, {length}], got {valid.dtype} "
            f"{list(valid.shape)}"
        )


def _check_terms(
    q: Tensor, k: Tensor, ranges: Tensor | None, query_segments: Tensor | None,
    key_segments: Tensor | None, slopes: Tensor | None, positions: Tensor | None, softcap: float,
) -> None:  # fmt: skip
    """Shapes and dtypes of the optional terms of mask and logits."""
    if (query_segments is None) != (key_segments is None):
        raise ValueError("query_segments and key_segments go together, got only one of them")
    if positions is not None and slopes is None:
        raise ValueError("positions are those of ALiBi and need slopes, got slopes=None")
    if softcap < 0:
        raise ValueError(f"softcap must be 0 (none) or more, got {softcap!r}")
    (batch, q_heads, q_len, _), kv_len = q.shape, k.shape[2]
    integer, real = torch.int32, torch.float32
    named: tuple[tuple[str, Tensor | None, torch.dtype, str, tuple[int, ...]], ...] = (
        ("ranges", ranges, integer, "[B or 1, Tq, 2]", (batch, q_len, 2)),
        ("query_segments", query_segments, integer, "[B or 1, Tq]", (batch, q_len)),
        ("key_segments", key_segments, integer, "[B or 1, Tk]", (batch, kv_len)),
        ("slopes", slopes, real, "[Hq]", (q_heads,)),
        ("positions", positions, real, "[B or 1, Tk]", (batch, kv_len)),
    )
    for name, tensor, dtype, layout, shape in named:
        if tensor is None:
            continue
        shapes = (shape,) if name == "slopes" else (shape, (1, *shape[1:]))
        if tensor.dtype != dtype or tuple(tensor.shape) not in shapes:
            raise ValueError(
                f"{name} must be {str(dtype).removeprefix('torch.')} {layout} = {list(shape)}, got "
                f"{tensor.dtype} {list(tensor.shape)}"
            )


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")


def _check_mask(window: int | None, init_blocks: int) -> None:
    if window is not None:
        _check_sizes(window=window)
    if init_blocks:
        _check_sizes(init_blocks=init_blocks)
