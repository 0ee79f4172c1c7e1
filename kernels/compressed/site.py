"""What an attention over compressed keys is told beside its tensors, in the operators' order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_compile.kernels import geometry
from nsa_compile.kernels.visibility import holds_valid_key


@dataclass(frozen=True)
class Site:
    """Mask and sizes; the fields are the operators' arguments behind the tensors.

    Compressed block c covers the keys ``[c * stride, c * stride + block)``; a causal query at
    position p sees it once it is complete, ``c * stride + block - 1 <= p``. With ``ranges`` int32
    [B or 1, Tq, 2] query i sees those that lie in ``[ranges[b, i, 0], ranges[b, i, 1])``: a block
    that straddles two documents belongs to neither.
    """

    valid: Tensor | None
    ranges: Tensor | None
    scale: float
    causal: bool
    offset: int
    block: int
    stride: int
    kv_len: int | None = None

    def count(self, rows: int) -> int:
        """Compressed blocks among ``rows`` rows; those behind the last block are spare."""
        kv_len = self.kv_len if self.valid is None else self.valid.shape[1]
        if kv_len is None:
            return rows
        return min(rows, geometry.num_compressed(kv_len, self.block, self.stride))

    def complete(self, position: int, count: int) -> int:
        """Compressed blocks that the query at ``position`` sees, but for padding."""
        if not self.causal:
            return count
        return geometry.complete_compressed(position, self.block, self.stride, count)

    def spans(self, count: int) -> Tensor | None:
        """int32 [B or 1, Tq, 2]: the blocks each query sees but for padding; None without ranges.

        Half-open, within ``count``; the first is never above the second.
        """
        if self.ranges is None:
            return None
        low, high = self.ranges.unbind(-1)
        if self.causal:
            positions = torch.arange(low.shape[1], dtype=torch.int32, device=low.device)
            high = torch.minimum(high, positions + (self.offset + 1))
        first = low.clamp(0, count * self.stride).add_(self.stride - 1)
        stop = high.clamp(min=0).sub_(self.block)
        first, stop = (x.div_(self.stride, rounding_mode="floor") for x in (first, stop))
        stop = stop.add_(1).clamp_(0, count)
        return torch.stack((torch.minimum(first, stop), stop), dim=-1)

    def holds(self, count: int) -> Tensor | None:
        """bool [B, count]: the compressed block holds a valid key; None if all do."""
        if self.valid is None:
            return None
        return holds_valid_key(self.valid, self.block, self.stride)[:, :count]
