"""What the gated sum is told beside its tensors, in the operators' order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nsa_compile.kernels.attend.site import Site as AttentionSite


@dataclass(frozen=True)
class Site:
    """Mask and sizes; ``query_tile`` and ``block`` are those of the selected branch."""

    valid: Tensor | None
    ranges: Tensor | None
    scale: float
    causal: bool
    offset: int
    compress_block: int
    compress_stride: int
    window: int
    query_tile: int
    block: int

    @property
    def mask(self) -> tuple[Any, ...]:
        return self.valid, self.ranges, self.scale, self.causal, self.offset

    def compressed(self, kv_len: int) -> tuple[Any, ...]:
        """Arguments of nsa::compressed_attention behind its tensors."""
        return *self.mask, self.compress_block, self.compress_stride, kv_len

    @property
    def windowed(self) -> tuple[Any, ...]:
        """Arguments of nsa::sliding_window_attention behind its tensors."""
        return *self.mask, self.window

    @property
    def selected(self) -> AttentionSite:
        terms = (self.valid, self.ranges, None, None, None, None)
        logits = (self.scale, 0.0, self.causal, self.offset, None)
        return AttentionSite(*terms, *logits, self.query_tile, self.block)
