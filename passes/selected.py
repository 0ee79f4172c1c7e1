"""The selected branch of merge "gate": one choice for a group's heads, or one for each of them."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_compile.passes.choice import Choice, Terms, chosen_blocks
from nsa_compile.passes.config import NSAConfig
from nsa_compile.passes.heads import each_head


def selected_branch(
    q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor, lse: Tensor, options: NSAConfig,
    valid: Tensor | None, ranges: Tensor | None, mask: tuple[float, bool, int],
) -> Tensor:  # fmt: skip
    """[B, Hq, Tq, Dv]: one softmax over the chosen blocks; ``lse`` is the compressed branch's."""
    site = (options, valid, ranges, mask)
    if _is_shared(q, k, options):
        return _branch(q, k, v, k_cmp, lse, *site)

    def branch(mine: Tensor, own_lse: Tensor) -> Tensor:
        return _branch(mine, k, v, k_cmp, own_lse, *site)

    out: Tensor = each_head(branch, k.shape[1], q, lse)
    return out


def is_plain(q: Tensor, k: Tensor, options: NSAConfig) -> bool:
    """Whether the branch is nsa::selected_attention over ``gated_choice``, and nothing else."""
    return _is_shared(q, k, options) and not options.sel_scale


def _is_shared(q: Tensor, k: Tensor, options: NSAConfig) -> bool:
    return bool(options.share_selection) or q.shape[1] == k.shape[1]


def gated_choice(
    q: Tensor, k: Tensor, k_cmp: Tensor, lse: Tensor, options: NSAConfig, valid: Tensor | None,
    ranges: Tensor | None, mask: tuple[float, bool, int],
) -> Tensor:  # fmt: skip
    """int32 [B, Hkv, NT * n]: the chosen blocks; ``lse`` is the compressed branch's."""
    scale, causal, offset = mask
    # Scores see a compressed block that begins before the query's range, the branch does not.
    same = options.scorer == "mean" and ranges is None
    choice = Choice(options.local_window(), 0, k_cmp.detach(), lse.detach() if same else None)
    terms: Terms = (valid, ranges, None, None, None, None)
    return chosen_blocks(q, k, options, terms, (scale, 0.0, causal, offset, None), choice)


def _branch(
    q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor, lse: Tensor, options: NSAConfig,
    valid: Tensor | None, ranges: Tensor | None, mask: tuple[float, bool, int],
) -> Tensor:  # fmt: skip
    blocks = gated_choice(q, k, k_cmp, lse, options, valid, ranges, mask)
    ops, (scale, causal, offset) = torch.ops.nsa, mask
    tiling = (options.query_tile, options.select_block)
    if options.sel_scale:
        scales = ops.selection_scale(
            q, k_cmp, lse, blocks, valid, ranges, *mask, options.compress_block,
            options.compress_stride, k.shape[2], *tiling, options.init_blocks,
            options.local_window(), options.importance,
        )  # fmt: skip
        scaled = (valid, ranges, None, None, scale, causal, offset, None)
        out: Tensor = ops.scaled_attention(q, k, v, blocks, scales, *scaled, *tiling)[0]
        return out
    site = (valid, ranges, *(None,) * 4, scale, 0.0, causal, offset, None)
    out = ops.selected_attention(q, k, v, blocks, *site, *tiling, 0)[0]
    return out
