"""What an attention over selected blocks is told beside its tensors, in the operators' order."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from nsa_compile.kernels.geometry import Tiling, num_blocks, num_tiles
from nsa_compile.kernels.modifiers import Modifiers
from nsa_compile.kernels.visibility import Visibility

# Most blocks in a table of all blocks; longer sequences get wider blocks.
_ALL_BLOCKS = 512


@dataclass(frozen=True)
class Site:
    """Mask, modifiers and sizes; the fields are the operators' arguments up to ``block``."""

    valid: Tensor | None
    ranges: Tensor | None
    query_segments: Tensor | None
    key_segments: Tensor | None
    slopes: Tensor | None
    positions: Tensor | None
    scale: float
    softcap: float
    causal: bool
    offset: int
    window: int | None
    query_tile: int
    block: int

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The fields in the operators' order."""
        return tuple(getattr(self, field.name) for field in fields(self))

    @property
    def visibility(self) -> Visibility:
        return Visibility(self.valid, self.ranges, self.query_segments, self.key_segments)

    @property
    def modifiers(self) -> Modifiers:
        return Modifiers(self.slopes, self.positions, self.softcap)

    @property
    def like_sdpa(self) -> bool:
        """scaled_dot_product_attention can compute it, with a mask that needs no [Tq, Tk] bias."""
        terms = (self.ranges, self.query_segments, self.slopes)
        return not self.softcap and all(term is None for term in terms)

    def tiling(self, q: Tensor, k: Tensor) -> Tiling:
        lengths = q.shape[2], k.shape[2]
        mask = self.causal, self.offset, self.window
        return Tiling(*lengths, *mask, self.query_tile, self.block)

    def reading_everything(self, q: Tensor, k: Tensor) -> tuple[Site, Tensor]:
        """A site of its own tile and block, and the table [B, Hkv, NT, Ns] of the blocks seen."""
        q_len, kv_len, block = q.shape[2], k.shape[2], 64
        while num_blocks(kv_len, block) > _ALL_BLOCKS:
            block *= 2
        tile = min(128, 1 << max(0, q_len - 1).bit_length())
        tiles, blocks = num_tiles(q_len, tile), num_blocks(kv_len, block)
        index = torch.arange(blocks, dtype=torch.int32, device=q.device)
        table = index.expand(tiles, -1)
        first = torch.arange(tiles, device=q.device)[:, None] * tile + self.offset
        if self.causal:
            table = table.where(index * block < first + tile, -1)
        if self.window is not None:
            table = table.where(index * block + block > first - self.window, -1)
        table = table.expand(q.shape[0], k.shape[1], -1, -1)
        return replace(self, query_tile=tile, block=block), table
