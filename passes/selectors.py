"""Selectors: other ways to choose the blocks of keys that a tile of queries reads.

"nsa" is the scorer's choice, made by nsa::select_blocks and not here. The others force no block:
what they name is what is read, under the model's own mask.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nsa_compile.passes.config import NSAConfig

# Slot, blocks of the tile (its last one, and the last that it may see), n -> block.
_Rule = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def _local(slot: Tensor, own: Tensor, last: Tensor, n: int) -> Tensor:
    """The n blocks up to the query's own; around it when later ones are seen, too."""
    ahead = torch.minimum(last - own, torch.full_like(own, n // 2))
    return own + ahead - slot


def _strided(slot: Tensor, own: Tensor, last: Tensor, n: int) -> Tensor:
    """n blocks at equal distances, from the last that may be seen to the first."""
    return last - torch.div(slot * (last + 1), n, rounding_mode="floor")


def _block_diagonal(slot: Tensor, own: Tensor, last: Tensor, n: int) -> Tensor:
    """The sequence cut into pieces of n blocks: those of the query's own piece."""
    return torch.div(own, n, rounding_mode="floor") * n + slot


_RULES: dict[str, _Rule] = {
    "local": _local,
    "strided": _strided,
    "block_diagonal": _block_diagonal,
}


def choose(
    q: Tensor, k: Tensor, valid: Tensor | None, config: NSAConfig, scale: float, causal: bool,
    offset: int,
) -> Tensor:  # fmt: skip
    """int32 [B, Hkv, NT * n] by ``config.selector``; slots may be empty (-1) or name a block twice.

    Raises:
        ValueError: a selector of the user's that returns another shape.
    """
    n, tile, block = config.num_selected or 0, config.query_tile or 1, config.select_block
    if callable(config.selector):
        return _chosen_by_user(q, k, valid, config, offset)
    if config.selector == "topk":
        best: Tensor = torch.ops.nsa.topk_blocks(q, k, valid, scale, causal, offset, tile, block, n)
        return best
    slots = torch.arange(-(-q.shape[2] // tile) * n, device=q.device)
    tiles = torch.div(slots, n, rounding_mode="floor")
    position = ((tiles + 1) * tile).clamp(max=q.shape[2]) - 1 + offset
    end = k.shape[2] - 1
    own = torch.div(position.clamp(max=end), block, rounding_mode="floor")
    last = own if causal else torch.full_like(own, end // block)
    blocks = _RULES[config.selector](slots % n, own, last, n)
    blocks = torch.where((blocks >= 0) & (blocks <= last), blocks, -1).to(torch.int32)
    return blocks.expand(k.shape[0], k.shape[1], -1)


def bound(config: NSAConfig) -> Callable[..., Tensor]:
    """:func:`choose` under ``config`` as a function that a graph can call."""

    def chosen_blocks(
        q: Tensor, k: Tensor, valid: Tensor | None, scale: float, causal: bool, offset: int
    ) -> Tensor:
        return choose(q, k, valid, config, scale, causal, offset)

    return chosen_blocks


def _chosen_by_user(
    q: Tensor, k: Tensor, valid: Tensor | None, config: NSAConfig, offset: int
) -> Tensor:
    tiles = -(-q.shape[2] // (config.query_tile or 1))
    with torch.no_grad():
        blocks = config.selector(q, k, config=config, offset=offset, valid=valid)
    shape = tuple(blocks.shape)
    if len(shape) != 4 or shape[:3] != (k.shape[0], k.shape[1], tiles):
        raise ValueError(
            f"selector must return block indices [B, Hkv, ceil(Tq / query_tile), n] = "
            f"[{k.shape[0]}, {k.shape[1]}, {tiles}, n], got {list(shape)}"
        )
    return blocks.flatten(2).to(torch.int32)
