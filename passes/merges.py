"""The two ways in which chosen blocks become an output, as calls of the operators."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_compile.passes.choice import Choice, Logits, Terms, chosen_blocks
from nsa_compile.passes.config import NSAConfig
from nsa_compile.passes.selected import gated_choice, is_plain, selected_branch
from nsa_compile.passes.templates import Learned

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
    # nsa::gated_attention differentiates branches that are attention and nothing else; those that
    # more is done to have gradients of their own.
    remembers, plain = k_mem is not None and v_mem is not None, is_plain(q, k, options)
    own = not remembers and (plain or not options.sel_scale)
    inputs = (q.detach(), k_cmp.detach(), v_cmp.detach()) if own else (q, k_cmp, v_cmp)
    compressed, lse = ops.compressed_attention(*inputs, valid, ranges, *mask, *sizes, k.shape[2])
    blocks = selected = None
    if not options.num_selected:
        selected = torch.zeros_like(compressed)
    elif plain:
        blocks = gated_choice(q, k, k_cmp, lse, options, valid, ranges, mask)
    else:
        selected = selected_branch(q, k, v, k_cmp, lse, options, valid, ranges, mask)
    branch = (k_cmp, v_cmp, compressed, lse) if own else (None, None, compressed, None)
    if k_mem is not None and v_mem is not None:
        branch = (None, None, with_memory(q, compressed, lse, k_mem, v_mem, scale), None)
    tiling = (options.window or 1, options.query_tile, options.select_block)
    tensors = (gates, q, k, v, *branch, blocks, selected)
    differentiable = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in tensors
    )
    out: Tensor = ops.gated_attention(
        *tensors, valid, ranges, *mask, *sizes, *tiling, differentiable
    )[0]
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
