"""NativeSparseAttention: an attention layer that is sparse and learned from the start."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch
from torch import Tensor, nn

from nsa_compile.checks import check_valid
from nsa_compile.nn.parameters import NSAParameters
from nsa_compile.nn.rotary import rotate
from nsa_compile.packed import packed_ranges
from nsa_compile.passes import merges
from nsa_compile.passes.config import NSAConfig, NSAConfigError

Cache = tuple[Tensor, Tensor]
# The query's own block and the one before it, or after where the layer is not causal: they are
# always read, beside those that are chosen.
_OWN_BLOCKS = 2
# Fields of NSAConfig by the names that they have here.
_ARGUMENTS = {
    "window": "sliding_window_size",
    "compress_block": "compress_block_size",
    "compress_stride": "compress_block_sliding_stride",
    "select_block": "selection_block_size",
    "num_mem_kv": "num_compressed_mem_kv",
    "compression": "compress_mlp",
    "compress_expand": "compress_mlp_expand_factor",
    "gate": "strategy_combine_mlp",
    "share_selection": "query_heads_share_selected_kv",
    "sel_scale": "use_diff_topk",
    "importance": "interpolated_importance_score",
}


class NativeSparseAttention(nn.Module):
    """Norm, projections, the three gated branches of arXiv 2502.11089 and the output projection.

    What is learned beside the projections is an :class:`NSAParameters`, as ``nsa_compile.prepare``
    adds it to a model's own attention: gates, compression and memory stand under ``nsa.*``. Gates
    see the normed hidden states, and all branches the rotated queries and keys.

    Args:
        dim: C, width of the hidden states.
        dim_head: D, width of a head.
        heads: Hq, query heads.
        kv_heads: Hkv, key and value heads, a divisor of ``heads``; None is ``heads``.
        sliding_window_size: w, nearest keys of the window branch, the query's own included.
        compress_block_size: l, tokens in a compressed block.
        compress_block_sliding_stride: d, tokens between the starts of compressed blocks; None is l,
            without overlap.
        selection_block_size: l', tokens in a selected block.
        num_selected_blocks: blocks that a query chooses beside its own and the one before (or
            after, where not causal), which it always reads; 0 leaves out the selected branch.
        num_compressed_mem_kv: learned keys and values that every query of the compressed branch
            sees.
        causal: whether a query sees only keys up to its own.
        norm: RMSNorm of the hidden states ahead of the projections.
        use_diff_topk: let a chosen block pass a gradient to the scores that chose it.
        query_heads_share_selected_kv: the query heads of a group share one choice of blocks; False
            lets each query head choose its own.
        interpolated_importance_score: interpolate the probabilities of compressed blocks between
            their centres to score selection blocks, which tells those apart that are smaller than
            compressed ones; False weighs them by the tokens they share.
        compress_mlp: module that maps [B, Hkv, Nc, l, D] to [B, Hkv, Nc, D], of which keys and
            values get a copy each, or one of the names of :class:`NSAParameters`; None is
            ``"mlp"``.
        compress_mlp_expand_factor: hidden layer of ``"mlp"``, in block lengths times head width.
        strategy_combine_mlp: module, of which the layer gets a copy, that maps hidden states
            [B, T, C] to [B, T, 3 * Hq] logits of the gates, for each head compressed, selected and
            window; None is a linear layer.
        rotary: rotate queries and keys by their positions (arXiv 2104.09864).
        rotary_base: base of the rotation's wavelengths.

    Raises:
        NSAConfigError: a wrong size, or two options that do not go together.
    """

    def __init__(
        self, dim: int, dim_head: int, heads: int, *, sliding_window_size: int,
        compress_block_size: int, selection_block_size: int, num_selected_blocks: int,
        compress_block_sliding_stride: int | None = None, kv_heads: int | None = None,
        num_compressed_mem_kv: int = 1, causal: bool = False, norm: bool = True,
        use_diff_topk: bool = False, query_heads_share_selected_kv: bool = True,
        interpolated_importance_score: bool = False,
        compress_mlp: nn.Module | str | None = None, compress_mlp_expand_factor: float = 1.0,
        strategy_combine_mlp: nn.Module | None = None, rotary: bool = True,
        rotary_base: float = 10000.0,
    ) -> None:  # fmt: skip
        super().__init__()
        stride = compress_block_sliding_stride
        config = _config(
            num_selected_blocks,
            window=sliding_window_size,
            compress_block=compress_block_size,
            compress_stride=compress_block_size if stride is None else stride,
            select_block=selection_block_size,
            num_mem_kv=num_compressed_mem_kv,
            compression="mlp" if compress_mlp is None else compress_mlp,
            compress_expand=compress_mlp_expand_factor,
            gate=strategy_combine_mlp,
            share_selection=query_heads_share_selected_kv,
            sel_scale=use_diff_topk,
            importance="interpolate" if interpolated_importance_score else "overlap",
        )
        self.heads, self.kv_heads = heads, heads if kv_heads is None else kv_heads
        self.dim_head, self.causal = dim_head, causal
        self.rotary_base = rotary_base if rotary else None
        _check_heads(dim, dim_head, heads, self.kv_heads, rotary)
        self.norm = nn.RMSNorm(dim) if norm else nn.Identity()
        self.to_qkv = nn.Linear(dim, (heads + 2 * self.kv_heads) * dim_head, bias=False)
        self.nsa = NSAParameters(
            config, width=dim, q_heads=heads, kv_heads=self.kv_heads, head_dim=dim_head
        )
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(
        self, x: Tensor, *, valid: Tensor | None = None, cu_seqlens: Tensor | None = None,
        cache: Cache | None = None, return_cache: bool = False,
    ) -> Tensor | tuple[Tensor, Cache]:  # fmt: skip
        """Attention of ``x`` to itself, and to the tokens of ``cache`` before it.

        Args:
            x: [B, T, C], any T.
            valid: bool [B, T], True for a real token; None says all are.
            cu_seqlens: integers [S + 1], boundaries of sequences that stand one after another in
                every row: [0, .., T]. Each attends to itself alone, and its positions begin at 0.
            cache: what an earlier call returned, for decoding; the compressed keys are computed
                anew from it.
            return_cache: also return the cache of the tokens so far.

        Returns:
            [B, T, C], or that and the cache.

        Raises:
            ValueError: a wrong shape or dtype, or arguments that do not go together.
        """
        _check_call(x, self.to_qkv.in_features, valid, self.causal, cache, return_cache)
        x = self.norm(x)
        offset = 0 if cache is None else cache[0].shape[2]
        length = x.shape[1]
        ranges = packed_ranges(cu_seqlens, None, length, length + offset, offset)
        q, k, v = self._projected(x, offset, ranges)
        if cache is not None:
            k, v = torch.cat((cache[0], k), 2), torch.cat((cache[1], v), 2)
        learned = self.nsa(x, k, v, valid)
        out = merges.gated(
            q, k, v, learned, self.nsa.config, valid, ranges, self.dim_head**-0.5, self.causal,
            offset,
        )  # fmt: skip
        out = self.to_out(out.transpose(1, 2).flatten(2))
        return (out, (k, v)) if return_cache else out

    def extra_repr(self) -> str:
        return f"causal={self.causal}, rotary={self.rotary_base is not None}"

    def _projected(
        self, x: Tensor, offset: int, ranges: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, H, T, D] of tokens from position ``offset`` on."""
        sizes = (self.heads, self.kv_heads, self.kv_heads)
        heads = self.to_qkv(x).unflatten(2, (sum(sizes), self.dim_head)).transpose(1, 2)
        q, k, v = heads.split(sizes, 1)
        if self.rotary_base is not None:
            at = torch.arange(x.shape[1], device=x.device) + offset
            if ranges is not None:
                at = at - ranges[0, :, 0]
            q, k = (rotate(each, at, self.rotary_base) for each in (q, k))
        return q, k, v


def _config(num_selected_blocks: int, **fields: Any) -> NSAConfig:
    """The config of ``fields``; what it refuses is told by the names of the arguments."""
    if isinstance(num_selected_blocks, bool) or not isinstance(num_selected_blocks, int):
        raise NSAConfigError(f"num_selected_blocks must be an integer, got {num_selected_blocks!r}")
    if num_selected_blocks < 0:
        raise NSAConfigError(f"num_selected_blocks must be at least 0, got {num_selected_blocks}")
    selected = num_selected_blocks and num_selected_blocks + _OWN_BLOCKS
    known = {field.name for field in dataclasses.fields(NSAConfig)}
    assert known.issuperset(fields)
    try:
        return NSAConfig(merge="gate", num_selected=selected, init_blocks=0, **fields)
    except NSAConfigError as error:
        text = re.sub(r"\w+", lambda word: _ARGUMENTS.get(word[0], word[0]), str(error))
        raise NSAConfigError(text) from None


def _check_heads(dim: int, dim_head: int, heads: int, kv_heads: int, rotary: bool) -> None:
    for name, value in (("dim", dim), ("dim_head", dim_head), ("heads", heads)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise NSAConfigError(f"{name} must be a positive integer, got {value!r}")
    if kv_heads < 1 or heads % kv_heads:
        raise NSAConfigError(
            f"heads must be a multiple of kv_heads, got heads={heads} and kv_heads={kv_heads}"
        )
    if rotary and dim_head % 2:
        raise NSAConfigError(
            f"rotary=True turns pairs of channels, got dim_head={dim_head}: make it even, or "
            "rotary=False"
        )


def _check_call(
    x: Tensor, dim: int, valid: Tensor | None, causal: bool, cache: Cache | None, keep: bool
) -> None:
    if x.ndim != 3 or x.shape[2] != dim:
        raise ValueError(f"x must be [B, T, C] with C={dim}, got {list(x.shape)}")
    if cache is None and not keep:
        check_valid(valid, x.shape[0], x.shape[1], "T")
        return
    name = "return_cache=True" if cache is None else "cache"
    if not causal:
        raise ValueError(f"{name} needs causal=True, got causal=False: earlier tokens would change")
    if valid is not None:
        raise ValueError(f"{name} and valid do not go together: a cache holds real tokens alone")
