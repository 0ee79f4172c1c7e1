"""The blocks that tiles of queries read, as calls of the operators."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nsa_compile.passes.config import NSAConfig
from nsa_compile.passes.selectors import choose

Terms = tuple[Tensor | None, ...]
Logits = tuple[float, float, bool, int, int | None]


class Choice(NamedTuple):
    """What the choice of blocks depends on beside the config.

    ``local_window`` most recent keys are always read; up to ``dense_len`` keys all are.
    """

    local_window: int
    dense_len: int
    k_cmp: Tensor | None = None
    lse: Tensor | None = None


def chosen_blocks(
    q: Tensor, k: Tensor, options: NSAConfig, terms: Terms, logits: Logits, choice: Choice
) -> Tensor:
    """int32 [B, Hkv, NT * n]; where the scorer proposes more than n, exact logits choose."""
    ops, valid, dim = torch.ops.nsa, terms[0], q.shape[3]
    if options.selector != "nsa":
        scale, _, causal, offset, _ = logits
        return choose(q, k, valid, options, scale, causal, offset)
    compression = (options.compress_block, options.compress_stride)
    if options.scorer == "channels":
        summary = ops.channels(q, k, valid, options.channels(dim), choice.dense_len)
    elif choice.k_cmp is None:
        summary = ops.compress(k, valid, *compression, 0, choice.dense_len)
    else:
        summary = choice.k_cmp
    sizes = (options.query_tile, options.select_block)
    proposed = options.proposed_blocks(dim)
    forced = (options.init_blocks, choice.local_window)
    blocks: Tensor = ops.select_blocks(
        q, k, summary, *terms, options.scorer, *logits, *sizes, proposed, *forced,
        *compression, choice.dense_len, choice.lse, options.importance,
    )  # fmt: skip
    if proposed > (options.num_selected or 0):
        blocks = ops.refine_blocks(
            q, k, blocks, *terms, *logits, *sizes, options.num_selected, *forced, choice.dense_len
        )
    return blocks
