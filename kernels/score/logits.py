"""From products of keys and queries to probabilities: cap, ALiBi, mask and softmax, in place.

Logits lie [keys, G, rows] or [keys, G * rows]: what goes over keys goes down the columns, a vector
of queries at a time.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from nsa_compile.kernels.attend.plan import Workspace
from nsa_compile.kernels.geometry import Tiling
from nsa_compile.kernels.modifiers import Modifiers
from nsa_compile.kernels.score.half import bits
from nsa_compile.kernels.visibility import Visibility, sees


def cap_(logits: Tensor, modifiers: Modifiers) -> Tensor:
    """The soft cap; what is hidden already stays hidden."""
    if modifiers.softcap:
        hidden = logits == -torch.inf
        modifiers.cap_(logits).masked_fill_(hidden, -torch.inf)
    return logits


def add_alibi_(
    logits: Tensor, modifiers: Modifiers, place: tuple[int, int], query: Tensor, keys: Tensor,
    kv_len: int,
) -> Tensor:  # fmt: skip
    """Slopes times distance from ``query``, one position for all rows; logits [..., keys, G, rows].

    What a row's own position would add to all its logits alike, no softmax sees. ``place`` is the
    batch entry and the kv head; ``query`` and ``keys`` [..., keys] broadcast.
    """
    entry, head = place
    assert modifiers.slopes is not None
    slopes = modifiers.slopes.unflatten(0, (-1, logits.shape[-2]))[head]
    distances = modifiers.distances(entry, query, keys, kv_len)
    return logits.add_(distances[..., None, None] * slopes[:, None])


def softmax_(logits: Tensor, dim: int, factor: float = 1.0) -> Tensor:
    """Softmax of ``factor > 0`` times logits; where all are -inf, or one is NaN, it becomes 0."""
    top = logits.amax(dim=dim, keepdim=True).clamp_(min=torch.finfo(logits.dtype).min)
    torch.add(top.mul_(-factor), logits, alpha=factor, out=logits)
    total = logits.exp_().sum(dim=dim, keepdim=True)
    alive = total > 0.5  # the largest logit adds exp(0), but for a rounding of ``factor``
    if not bool(alive.all()):
        logits.masked_fill_(~alive, 0.0)
        total.masked_fill_(~alive, 1.0)
    return logits.mul_(total.reciprocal_())


def tile_sum(shares: Tensor, query_tile: int) -> Tensor:
    """[X, G, rows] -> [tiles, X]: sum over heads and each tile's rows; the last may be short."""
    short = -shares.shape[2] % query_tile
    if short:
        shares = torch.nn.functional.pad(shares, (0, short))
    return shares.unflatten(2, (-1, query_tile)).sum(dim=(1, 3)).T


class Masks:
    """The mask, but for padding."""

    def __init__(
        self, tiling: Tiling, visibility: Visibility, dtype: torch.dtype, workspace: Workspace
    ) -> None:
        self.tiling, self.dtype, self._workspace = tiling, dtype, workspace
        self.terms = replace(visibility, valid=None)

    def hide_(self, logits: Tensor, entry: int, positions: tuple[int, int], keys: range) -> Tensor:
        """-inf where the queries at ``positions`` of a batch entry do not see a key.

        Logits [keys, G, rows].
        """
        place: tuple[object, ...] = (entry, positions, keys)
        if self.terms.unlimited:  # Along the diagonal all runs of tiles have the same few.
            real = min(keys.stop, self.tiling.kv_len) - keys.start
            place = (positions[0] - keys.start, positions[1] - keys.start, len(keys), real)
        if logits.dtype.itemsize > 2:
            return logits.add_(
                self._workspace.mask(place, lambda: self._bias(entry, positions, keys))
            )
        # 16-bit sums are many times slower than operations on bits.
        keep, hidden = self._workspace.mask(place, lambda: self._bits(entry, positions, keys))
        bits(logits).bitwise_and_(keep).bitwise_or_(hidden)
        return logits

    def _bits(self, entry: int, positions: tuple[int, int], keys: range) -> tuple[Tensor, Tensor]:
        """int16: the bits of logits to keep, and those to set."""
        bias = self._bias(entry, positions, keys).contiguous()
        return -(bias == 0).to(torch.int16), bits(bias)

    def _bias(self, entry: int, positions: tuple[int, int], keys: range) -> Tensor:
        """[keys, 1, rows], 0 or -inf."""
        rows = torch.arange(*positions)
        columns = torch.arange(keys.start, keys.stop, keys.step)[:, None]
        seen = sees(rows, columns, self.tiling)
        seen = seen & self.terms.sees(entry, rows - self.tiling.offset, columns)
        # Without causality or a window no query differs from another.
        return seen.to(self.dtype).log_().expand(-1, len(rows))[:, None]
