"""Zoo: traps: one detail away from a form that converts, or converted only with care."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.zoo import (
    BATCH,
    DENSE,
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
from tests.models.zoo_masks import Allowed, Cross
from tests.models.zoo_spellings import SCALE


class Filled(Attention):
    """Written out; keys outside ``allowed`` get ``value``."""

    value = -1e9

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *extra: Tensor) -> Tensor:
        i = torch.arange(q.shape[-2], device=q.device)
        allowed = self.allowed(i[:, None], i[None], *extra)
        scores = q @ k.transpose(-1, -2) * SCALE
        return scores.masked_fill(~allowed, self.value).softmax(-1) @ v

    def allowed(self, i: Tensor, j: Tensor, *extra: Tensor) -> Tensor:
        return j <= i


@specimen(KEPT)
class FilledWithZero(Filled):
    """A hidden key scores 0, which is not hidden."""

    value = 0.0


@specimen(KEPT)
class FilledWithLarge(Filled):
    """+1e9: only hidden keys are read."""

    value = 1e9


@specimen(KEPT)
class FilledWithMinusTwenty(Filled):
    value = -20.0


@specimen(KEPT)
class NothingToSee(Filled):
    """The first query sees no key: with a finite fill it reads all of them alike."""

    def allowed(self, i: Tensor, j: Tensor) -> Tensor:
        return j < i


@specimen(KEPT)
class DistantOnly(Filled):
    """Keys 5 to 12 back: five queries see none, and read all alike."""

    def allowed(self, i: Tensor, j: Tensor) -> Tensor:
        return (i - j >= 5) & (i - j < 13)


@specimen(KEPT)
class ForeignDocuments(Filled):
    """A query whose document has no key reads all keys alike."""

    def allowed(self, i: Tensor, j: Tensor, ids: Tensor) -> Tensor:
        return (ids[:, None, :, None] + 1) == ids[:, None, None, :]

    @staticmethod
    def inputs(length: int) -> tuple[Tensor, ...]:
        return hidden(length), documents(length)


@specimen(KEPT)
class ProductMask(Attention):
    """scores * mask: a hidden key scores 0."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t = q.shape[-2]
        return (q @ k.mT * SCALE * self.tril[..., :t, :t]).softmax(-1) @ v


@specimen("causal", "causal")
class MaskWrittenBetween(nn.Module):
    """The second layer's mask is the first one's, written in place and restored."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = MaskArgument(), MaskArgument()

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        x = x + self.first(x, mask)
        return x + self.second(x, mask)


class MaskArgument(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@specimen(*UNDECIDED)
class MaskNarrowedBetween(MaskWrittenBetween):
    """A key is hidden in place after the first layer has read the mask."""

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        x = x + self.first(x, mask)
        mask[9:, 4] = False
        return x + self.second(x, mask)


@specimen(*UNDECIDED)
class MaskWrittenThroughView(MaskWrittenBetween):
    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
        view = mask.view(-1)
        x = x + self.first(x, mask)
        view[::2] = False
        mask.fill_diagonal_(True)
        return x + self.second(x, mask)


@specimen("full")
class ValuesWrittenBetween(Attention):
    """v changes between the scores and the product."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        v = v.clone()
        weights = (q @ k.mT * SCALE).softmax(-1)
        v[:, :, 0] = 0.0
        return weights @ v


@specimen(*UNDECIDED, gradients=False)
class CacheBuffer(Attention):
    """Keys and values are written into a static buffer and read back."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(BATCH, HEADS, 96, HEAD_DIM))
        self.register_buffer("values", torch.zeros(BATCH, HEADS, 96, HEAD_DIM))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        position = torch.arange(q.shape[-2], device=q.device)
        self.keys.index_copy_(2, position, k)
        self.values.index_copy_(2, position, v)
        mask = torch.arange(96, device=q.device)[None] <= position[:, None]
        return F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=mask)


@specimen("causal", tolerance=2e-2, dynamic=False)
class Autocast(Filled):
    """Products in bfloat16, softmax in float32, as mixed precision has it."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = super().forward(x)
        return y.float()


@specimen("causal", tolerance=2e-2)
class AutocastSdpa(MaskArgument):
    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = super().forward(x, mask)
        return y.float()


@specimen("causal")
class AutocastDtype(MaskArgument):
    """What follows depends on the dtype that attention returns."""

    def forward(self, x: Tensor) -> Tensor:
        q = x.view(*x.shape[:2], HEADS, HEAD_DIM).transpose(1, 2)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = F.scaled_dot_product_attention(q, q, q, is_causal=True)
        return torch.full_like(x, float(y.element_size())) + 0 * x


@specimen("causal(offset=1)", dynamic=False)
class NullKey(Attention):
    """A learned key in front that every query sees."""

    def __init__(self) -> None:
        super().__init__()
        self.null = nn.Parameter(torch.randn(2, 1, HEADS, 1, HEAD_DIM))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        nk, nv = (y.expand(q.shape[0], -1, -1, -1) for y in self.null)
        k, v = torch.cat([nk, k], -2), torch.cat([nv, v], -2)
        t = q.shape[-2]
        mask = F.pad(torch.ones(t, t, dtype=torch.bool).tril(), (1, 0), value=True)
        return (q @ k.mT * SCALE).masked_fill(~mask, -torch.inf).softmax(-1) @ v


@specimen(*UNDECIDED)
class RecurrentMemory(Cross):
    """Keys are a memory and then the sequence; the mask is triu(1 + its length)."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q_len, k_len = q.shape[-2], k.shape[-2]
        mask = torch.ones(q_len, k_len, device=q.device).triu(1 + k_len - q_len).bool()
        scores = torch.einsum("bhid,bhjd->bhij", q, k) * SCALE
        return scores.masked_fill(mask, -1e30).softmax(-1) @ v


@specimen("causal")
class Axial(Attention):
    """Five axes: a sequence of short sequences."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, h, t, d = q.shape
        q, k, v = (y.view(b, h, 1, t, d).expand(b, h, 2, t, d) for y in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).mean(2)


@specimen("causal", dynamic=False)
class Unbatched(nn.Module):
    """No batch: q is [H, T, D]."""

    def forward(self, x: Tensor) -> Tensor:
        q = x[0].view(-1, HEADS, HEAD_DIM).transpose(0, 1)
        y = F.scaled_dot_product_attention(q, q * 2, q + 1, is_causal=True)
        return y.transpose(0, 1).flatten(1)


@specimen("causal")
class SingleHead(Attention):
    """One head of the whole width, three axes."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        t = x.shape[1]
        scores = q @ k.transpose(1, 2) / math.sqrt(WIDTH)
        return self.out(scores.masked_fill(self.tril[0, :, :t, :t] == 0, -torch.inf).softmax(2) @ v)


@specimen("full", dynamic=False)
class BroadcastBatch(Attention):
    """Keys of the first sequence serve the whole batch."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k[:1], v[:1])


@specimen("full")
class LatentQueries(nn.Module):
    """Learned queries read the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(24, WIDTH))
        self.kv = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.latents.view(1, -1, HEADS, HEAD_DIM).transpose(1, 2).expand(b, -1, -1, -1)
        k, v = self.kv(x).view(b, t, 2, HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v)


@specimen("causal")
class TopLeft(Cross):
    """is_causal of a wide product starts at the first key."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@specimen("causal")
class LearnedScale(Filled):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t = q.shape[-2]
        scores = q @ k.mT * self.scale.exp()
        return scores.masked_fill(self.tril[..., :t, :t] == 0, -torch.inf).softmax(-1) @ v


@specimen(*UNDECIDED)
class ZeroRows(Filled):
    """nan_to_num after a softmax whose first row is all -inf."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t = q.shape[-2]
        mask = torch.ones(t, t, dtype=torch.bool).tril(-1)
        scores = torch.where(mask, q @ k.mT * SCALE, -torch.inf)
        return torch.where(mask.any(-1, keepdim=True), scores, 0.0).softmax(-1) @ v


@specimen(*DENSE)
class DoubleSoftmax(Filled):
    """softmax of a softmax."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t = q.shape[-2]
        scores = (q @ k.mT * SCALE).softmax(-1)
        return scores.masked_fill(self.tril[..., :t, :t] == 0, -torch.inf).softmax(-1) @ v


@specimen(*DENSE)
class Quiet(Attention):
    """exp(s) / (1 + sum exp(s)): a softmax with one more, invisible key of score 0, by hand."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.mT * SCALE).exp()
        return weights / (1 + weights.sum(-1, keepdim=True)) @ v


@specimen(*UNDECIDED)
class ZeroSink(Attention):
    """The same by a column of zeros."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = F.pad(q @ k.mT * SCALE, (0, 1))
        return scores.softmax(-1)[..., :-1] @ v


@specimen("causal")
class PositionTemperature(Attention):
    """Queries grow with the logarithm of their position."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(q.shape[-2], device=q.device)
        growth = (i + 2).log()[:, None]
        scores = q @ k.mT * SCALE * growth
        t = q.shape[-2]
        return scores.masked_fill(self.tril[..., :t, :t] == 0, -torch.inf).softmax(-1) @ v


@specimen(KEPT)
class KeyTemperature(Attention):
    """Scores are scaled for each key."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        j = torch.arange(k.shape[-2], device=q.device)
        return (q @ k.mT * SCALE * (j + 1).rsqrt()).softmax(-1) @ v


@specimen("causal & padding", dynamic=False)
class FloatPadding(Filled):
    """The padding mask is float, and not always 0 or 1."""

    def allowed(self, i: Tensor, j: Tensor, keep: Tensor) -> Tensor:
        return (j <= i) & (keep[:, None, None] > 0.5)

    @staticmethod
    def inputs(length: int) -> tuple[Tensor, ...]:
        keep = keep_left(length).float()
        keep[1, length // 2] = 0.25
        return hidden(length), keep


@specimen("padding")
class GradedPadding(Filled):
    """(1 - keep) * -10000 with keep 2 somewhere: runs dense, as such keys are preferred by far."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        bias = (1.0 - keep[:, None, None].to(q.dtype)) * -10000.0
        return (q @ k.mT * SCALE + bias).softmax(-1) @ v

    @staticmethod
    def inputs(length: int) -> tuple[Tensor, ...]:
        keep = keep_left(length)
        keep[1, length // 2] = 2
        return hidden(length), keep


@specimen(KEPT)
class WrongLengthPadding(Allowed):
    """The padding mask pads queries, not keys: column and row are swapped."""

    def allowed(self, i: Tensor, j: Tensor, keep: Tensor) -> Tensor:
        return (j <= i) & (keep[:, None, :, None].bool() | (j == i))

    @staticmethod
    def inputs(length: int) -> tuple[Tensor, ...]:
        return hidden(length), keep_left(length)


@specimen("padding")
class ChannelsFirst(nn.Module):
    """Projections by convolution: q, k and v are transposed views of [B, H, D, T]."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Conv1d(WIDTH, WIDTH, 1) for _ in range(3))

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = (f(x.mT).view(b, HEADS, HEAD_DIM, t).mT for f in (self.q, self.k, self.v))
        bias = torch.zeros(b, 1, 1, t).masked_fill(keep[:, None, None] == 0, -1e9)
        return ((q @ k.mT * SCALE + bias).softmax(-1) @ v).transpose(1, 2).reshape(b, t, c)

    @staticmethod
    def inputs(length: int) -> tuple[Tensor, ...]:
        return hidden(length), keep_left(length)
