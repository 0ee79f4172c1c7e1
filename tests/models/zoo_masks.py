"""Zoo: one spelling, many masks; converted where the mask is proven, kept where it cannot be."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.models.zoo import (
    BATCH,
    CONTEXT,
    HEAD_DIM,
    HEADS,
    KEPT,
    UNDECIDED,
    WIDTH,
    Attention,
    documents,
    hidden,
    keep_left,
    specimen,
)
from tests.models.zoo_spellings import SCALE


class Biased(Attention):
    """Scores plus an additive ``bias`` that subclasses build."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *extra: Tensor) -> Tensor:
        att = q @ k.transpose(-1, -2) * SCALE + self.bias(q, *extra)
        return att.softmax(-1) @ v

    def bias(self, q: Tensor, *extra: Tensor) -> Tensor:
        raise NotImplementedError


class Allowed(Attention):
    """SDPA under a boolean mask that subclasses build from positions."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *extra: Tensor) -> Tensor:
        i = torch.arange(q.shape[-2], device=q.device)
        mask = self.allowed(i[:, None], i[None], *extra)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def allowed(self, i: Tensor, j: Tensor, *extra: Tensor) -> Tensor:
        raise NotImplementedError


class Padded(Allowed):
    @staticmethod
    def inputs(length: int) -> tuple[Tensor, ...]:
        return hidden(length), keep_left(length)


class Documents(Allowed):
    @staticmethod
    def inputs(length: int) -> tuple[Tensor, ...]:
        return hidden(length), documents(length)


@specimen("padding")
class ExtendedMask(Biased):
    """The encoder's (1 - mask) * -10000."""

    inputs = staticmethod(Padded.inputs)

    def bias(self, q: Tensor, keep: Tensor) -> Tensor:
        return (1.0 - keep[:, None, None, :].to(q.dtype)) * -10000.0


@specimen("padding")
class ExtendedMaskFinfo(Biased):
    inputs = staticmethod(Padded.inputs)

    def bias(self, q: Tensor, keep: Tensor) -> Tensor:
        inverted = 1.0 - keep[:, None, None, :].to(q.dtype)
        return inverted.masked_fill(inverted.to(torch.bool), torch.finfo(q.dtype).min)


@specimen("document & padding")
class BothSides(Padded):
    """Only pairs of real tokens see each other; the rows of padding hold one number."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *extra: Tensor) -> Tensor:
        (keep,) = extra
        pair = keep[:, None, None, :] * keep[:, None, :, None]
        att = (q @ k.mT * SCALE).masked_fill(~pair.bool(), torch.finfo(q.dtype).min)
        return att.softmax(-1) @ v


@specimen("causal & padding")
class TwoBiases(Biased):
    """A causal and a padding term, added one after the other."""

    inputs = staticmethod(Padded.inputs)

    def bias(self, q: Tensor, keep: Tensor) -> Tensor:
        t = q.shape[-2]
        causal = torch.full((t, t), -1e9, device=q.device).triu(1)
        return causal + (1.0 - keep[:, None, None, :].to(q.dtype)) * -1e9


@specimen(KEPT)
class MildPenalty(Biased):
    """-5 discourages a key and does not hide it: no mask."""

    def bias(self, q: Tensor) -> Tensor:
        t = q.shape[-2]
        return torch.full((t, t), -5.0, device=q.device).triu(1)


@specimen("causal & window(20)")
class SlidingWindow(Allowed):
    def allowed(self, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i - j < 20)


@specimen("window(9)")
class Band(Allowed):
    def allowed(self, i: Tensor, j: Tensor) -> Tensor:
        return (i - j).abs() <= 8


@specimen("causal & window(20)")
class WindowFromTriu(Allowed):
    def allowed(self, i: Tensor, j: Tensor) -> Tensor:
        full = torch.ones(i.shape[0], j.shape[1], dtype=torch.bool)
        return full.tril() & full.triu(-19)


@specimen("causal & chunk(16)")
class Chunked(Allowed):
    def allowed(self, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i // 16 == j // 16)


@specimen("causal & prefix(12)")
class PrefixLM(Allowed):
    def allowed(self, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) | (j < 12)


@specimen("causal & document")
class PackedDocuments(Documents):
    def allowed(self, i: Tensor, j: Tensor, ids: Tensor) -> Tensor:
        return (j <= i) & (ids[:, None, :, None] == ids[:, None, None, :])


@specimen("document")
class PackedEncoder(Documents):
    def allowed(self, i: Tensor, j: Tensor, ids: Tensor) -> Tensor:
        return (ids[:, :, None] == ids[:, None, :])[:, None]


@specimen("causal & document")
class DocumentsFromStarts(Documents):
    """Documents numbered by a cumulative sum over their first tokens."""

    def allowed(self, i: Tensor, j: Tensor, ids: Tensor) -> Tensor:
        number = F.pad(ids.diff(dim=1) != 0, (1, 0)).long().cumsum(1)
        return (j <= i) & (number[:, None, :, None] == number[:, None, None, :])


@specimen("causal & padding")
class PaddedCausal(Padded):
    def allowed(self, i: Tensor, j: Tensor, keep: Tensor) -> Tensor:
        return (j <= i) & keep[:, None, None].bool()


@specimen("causal & padding")
class InvertedPadding(Padded):
    def allowed(self, i: Tensor, j: Tensor, keep: Tensor) -> Tensor:
        return ~((j > i) | keep[:, None, None].eq(0))


@specimen(*UNDECIDED)
class DiagonalRescue(Padded):
    """Padded queries see themselves: differs from padding only in rows that nobody reads."""

    def allowed(self, i: Tensor, j: Tensor, keep: Tensor) -> Tensor:
        return ((j <= i) & keep[:, None, None].bool()) | (i == j)


@specimen(KEPT)
class PairwisePadding(Padded):
    """A padded query sees nothing but padding."""

    def allowed(self, i: Tensor, j: Tensor, keep: Tensor) -> Tensor:
        return (j <= i) & (keep[:, None, :, None] == keep[:, None, None, :]) & (j % 5 != 2)


@specimen(KEPT)
class Strided(Allowed):
    """Every third key: no window."""

    def allowed(self, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & ((i - j) % 3 == 0)


@specimen(KEPT)
class AntiCausal(Allowed):
    def allowed(self, i: Tensor, j: Tensor) -> Tensor:
        return j >= i


@specimen(KEPT)
class WithHole(Allowed):
    """Causal but for one pair."""

    def allowed(self, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & ~((i == 30) & (j == 7))


@specimen("causal(offset=-1)")
class StrictlyPast(Allowed):
    """The first query sees no key; its row is NaN in PyTorch, so a key is added."""

    def allowed(self, i: Tensor, j: Tensor) -> Tensor:
        return j <= i - 1

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, 1:]


@specimen(KEPT)
class MaskOfAnotherGraph(Attention):
    """The mask arrives as an argument: nothing can be proven."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    @staticmethod
    def inputs(length: int) -> tuple[Tensor, ...]:
        return hidden(length), torch.ones(BATCH, 1, length, length).tril().bool()


@specimen(KEPT)
class LearnedMask(Allowed):
    """Which keys are seen depends on activations."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        strong = k.detach().norm(dim=-1).gt(2.0)[:, :, None]
        mask = strong | torch.eye(q.shape[-2], dtype=torch.bool)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@specimen(KEPT)
class TopKeys(Attention):
    """Keeps the eight largest scores of a row."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t = q.shape[-2]
        scores = (q @ k.mT * SCALE).masked_fill(self.tril[..., :t, :t] == 0, -1e9)
        least = scores.topk(8, dim=-1).values[..., -1:]
        mask = scores >= least
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask & (scores > -1e8))


@specimen(KEPT, dynamic=False)
class RandomBuffer(Attention):
    """A buffer that is nearly causal."""

    def __init__(self) -> None:
        super().__init__()
        mask = torch.ones(CONTEXT, CONTEXT).tril().bool()
        mask[40, 3] = False
        self.register_buffer("mask", mask)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t = q.shape[-2]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask[:t, :t])


class Cross(Attention):
    """Queries from x [B, T, WIDTH], keys from a longer memory [B, T + 23, WIDTH]."""

    def forward(self, x: Tensor, memory: Tensor, *extra: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q(x).view(b, t, HEADS, HEAD_DIM).transpose(1, 2)
        k, v = (f(memory).view(b, -1, HEADS, HEAD_DIM).transpose(1, 2) for f in (self.k, self.v))
        return self.out(self.attend(q, k, v, *extra).transpose(1, 2).reshape(b, t, WIDTH))

    @staticmethod
    def inputs(length: int) -> tuple[Tensor, ...]:
        return hidden(length), hidden(length + 23)


@specimen("full")
class CrossAttention(Cross):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


@specimen("padding")
class CrossPadded(Cross):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        att = (q @ k.mT * SCALE).masked_fill(keep[:, None, None] == 0, -torch.inf)
        return att.softmax(-1) @ v

    @staticmethod
    def inputs(length: int) -> tuple[Tensor, ...]:
        return hidden(length), hidden(length + 23), keep_left(length + 23)


@specimen("causal(offset=23)", dynamic=False)
class CachedPrefill(Cross):
    """The queries are the last positions of a longer sequence."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q_len, k_len = q.shape[-2], k.shape[-2]
        mask = torch.ones(q_len, k_len, dtype=torch.bool).tril(k_len - q_len)
        att = (q @ k.mT * SCALE).masked_fill(~mask, -torch.inf)
        return att.softmax(-1) @ v


@specimen("decode_step", gradients=False, dynamic=False)
class DecodeStep(Cross):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    @staticmethod
    def inputs(length: int) -> tuple[Tensor, ...]:
        return hidden(1), hidden(length)


@specimen("decode_step", gradients=False, dynamic=False)
class DecodeStepWrittenOut(DecodeStep):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * SCALE).softmax(-1) @ v
