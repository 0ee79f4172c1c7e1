"""What a model does to its logits between scaling and softmax: softcap, and ALiBi's slopes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Modifiers:
    """Score modifiers; ``slopes`` float32 [Hq], ``positions`` float32 [B or 1, Tk].

    A scaled logit s becomes ``softcap * tanh(s / softcap)`` (0.0: stays as it is), and then
    ``+ slopes[h] * (positions[j] - positions[p])`` with the query's position p held inside
    [0, Tk - 1]; None stands for ``positions[j] = j``.
    """

    slopes: Tensor | None = None
    positions: Tensor | None = None
    softcap: float = 0.0

    def cap_(self, scores: Tensor) -> Tensor:
        """Cap scaled logits in place."""
        if self.softcap:
            scores.div_(self.softcap).tanh_().mul_(self.softcap)
        return scores

    def cap_slope(self, capped: Tensor) -> Tensor | None:
        """The cap's derivative where it gave ``capped``; None stands for 1."""
        if not self.softcap:
            return None
        return (capped / self.softcap).square_().neg_().add_(1.0)

    def distances(
        self,
        batch: int,
        positions: Tensor,
        keys: Tensor,
        kv_len: int,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """What ``slopes`` multiply: the keys' places less those of the query positions."""
        at = positions.clamp(0, kv_len - 1), keys.clamp(0, kv_len - 1)
        if self.positions is not None:
            places = self.positions[batch % len(self.positions)].to(dtype)
            at = places[at[0]], places[at[1]]
        return (at[1] - at[0]).to(dtype)
