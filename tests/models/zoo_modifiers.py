"""Zoo: what models do to their scores besides masking, and weights that leave the attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.zoo import DENSE, HEADS, KEPT, UNDECIDED, WIDTH, Attention, specimen
from tests.models.zoo_spellings import SCALE


class Modified(Attention):
    """Causal attention with changed scores."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.transpose(-1, -2) * SCALE

    def causal(self, scores: Tensor) -> Tensor:
        t = scores.shape[-1]
        return scores.masked_fill(self.tril[:, :, :t, :t] == 0, -torch.inf)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.causal(self.scores(q, k)).softmax(-1) @ v


@specimen("causal + softcap(5.0)")
class Softcap(Modified):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.tanh(super().scores(q, k) / 5.0) * 5.0


@specimen(*DENSE)
class CapAfterMask(Modified):
    """tanh makes -inf finite: no mask is left."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = self.causal(self.scores(q, k))
        return (torch.tanh(scores / 5.0) * 5.0).softmax(-1) @ v


@specimen("causal + softcap(3.0)")
class UnequalCap(Modified):
    """Divided by 5, multiplied by 3: a cap of 3, of scores 3/5 as large."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.tanh(super().scores(q, k) / 5.0) * 3.0


def alibi_slopes() -> Tensor:
    return 2.0 ** -(8.0 / HEADS * torch.arange(1, HEADS + 1))


@specimen("causal + alibi")
class AlibiFromKeys(Modified):
    """slope * key index: the query's part cancels in the softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("slopes", alibi_slopes().view(1, HEADS, 1, 1))

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        j = torch.arange(k.shape[-2], device=q.device)
        return super().scores(q, k) + self.slopes * j.view(1, 1, 1, -1)


@specimen("causal + alibi")
class AlibiFromDistances(AlibiFromKeys):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        i = torch.arange(k.shape[-2], device=q.device)
        distance = (i[None] - i[:, None]).to(q.dtype)
        return Modified.scores(self, q, k) + self.slopes * distance


@specimen(*DENSE)
class AlibiOfAbsoluteDistance(AlibiFromKeys):
    """An encoder's ALiBi, -|i - j|: not linear in the key's position."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        i = torch.arange(k.shape[-2], device=q.device)
        return Modified.scores(self, q, k) - self.slopes * (i[None] - i[:, None]).abs()

    def causal(self, scores: Tensor) -> Tensor:
        return scores


@specimen("causal + sinks")
class Sinks(Modified):
    """One more logit a head, dropped after the softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.linspace(-1, 2, HEADS))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = self.causal(self.scores(q, k))
        sinks = self.sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
        combined = torch.cat([scores, sinks], dim=-1)
        combined = combined - combined.max(dim=-1, keepdim=True).values
        probabilities = F.softmax(combined, dim=-1, dtype=combined.dtype)
        return probabilities[..., :-1] @ v


@specimen(*UNDECIDED)
class SinkInFront(Sinks):
    """The sink is the first column: the slice after the softmax starts at 1."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = self.causal(self.scores(q, k))
        sinks = self.sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
        return torch.cat([sinks, scores], dim=-1).softmax(-1)[..., 1:] @ v


@specimen(*DENSE)
class SinkSliceOffByOne(Sinks):
    """Concatenated behind, sliced in front: keys are shifted by one. No sink."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = self.causal(self.scores(q, k))
        sinks = self.sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
        return torch.cat([scores, sinks], dim=-1).softmax(-1)[..., 1:] @ v


@specimen(KEPT)
class RelativeBias(Modified):
    """A learned bias for each bucket of distances, as T5 has it."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Embedding(16, HEADS)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        i = torch.arange(k.shape[-2], device=q.device)
        bucket = (i[:, None] - i[None]).clamp(0, 15)
        return super().scores(q, k) + self.bias(bucket).permute(2, 0, 1)[None]


@specimen(KEPT, dynamic=False)
class RelativeBiasSdpa(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Embedding(16, HEADS)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(k.shape[-2], device=q.device)
        bias = self.bias((i[:, None] - i[None]).clamp(0, 15)).permute(2, 0, 1)[None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)


@specimen(*UNDECIDED)
class HeadTemperature(Modified):
    """A learned temperature for each head, on the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.linspace(0.5, 2, HEADS).view(1, -1, 1, 1))

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return super().scores(q, k) * self.temperature.exp()


@specimen("causal")
class Cosine(Modified):
    """Normalised q and k, and a constant logit scale."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-1, -2) * 10.0


@specimen(*DENSE)
class NegativeScale(Modified):
    """Prefers the least similar key."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return -super().scores(q, k)


@specimen(KEPT)
class TalkingHeads(Modified):
    """Heads are mixed before the softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.eye(HEADS) + 0.1)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.einsum("b h i j, h g -> b g i j", super().scores(q, k), self.mix)


@specimen(KEPT)
class MixedAfterSoftmax(Modified):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.eye(HEADS) + 0.1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = self.causal(self.scores(q, k)).softmax(-1)
        return torch.einsum("b h i j, h g -> b g i j", weights, self.mix) @ v


@specimen("dropout", training=True, gradients=False)
class DropoutInTraining(Attention):
    """Seeded alike, both runs drop the same weights."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dropout = 0.1 if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)


@specimen(KEPT, training=True, gradients=False)
class DropoutWrittenOut(Modified):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = F.dropout(self.causal(self.scores(q, k)).softmax(-1), 0.1, self.training)
        return weights @ v


@specimen(KEPT)
class WeightsEscape(Modified):
    """The attention map is returned as well."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen: list[Tensor] = []
        y = super().forward(x)
        return torch.cat([y.flatten(), self.seen[0].flatten()])

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = self.causal(self.scores(q, k)).softmax(-1)
        self.seen.append(weights)
        return weights @ v


@specimen(KEPT)
class ScoresEscape(WeightsEscape):
    """The scores feed the next layer's scores, as in residual attention."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = self.scores(q, k)
        self.seen.append(scores * 2)
        return self.causal(scores).softmax(-1) @ v


@specimen("causal", "causal")
class Differential(nn.Module):
    """Two softmaxes, subtracted."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Modified(), Modified()
        self.weight = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) - self.weight * self.second(x)


@specimen(*DENSE)
class DifferenceOfWeights(Modified):
    """One product with v for the difference of two attention maps."""

    def __init__(self) -> None:
        super().__init__()
        self.q2 = nn.Linear(WIDTH, WIDTH)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first = self.causal(self.scores(q, k)).softmax(-1)
        second = self.causal(self.scores(k, q)).softmax(-1)
        return (first - 0.3 * second) @ v


@specimen(*UNDECIDED)
class RowScaledAfterSoftmax(Modified):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = self.causal(self.scores(q, k)).softmax(-1)
        return (weights * 2.0) @ v


@specimen(*UNDECIDED)
class Renormalised(Modified):
    """Masked after the softmax instead of before, and normalised again."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t = q.shape[-2]
        weights = self.scores(q, k).softmax(-1) * self.tril[..., :t, :t]
        return weights / weights.sum(-1, keepdim=True) @ v


@specimen(*DENSE)
class MaskedOnlyAfterSoftmax(Modified):
    """Rows do not sum to one: no causal attention."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t = q.shape[-2]
        return (self.scores(q, k).softmax(-1) * self.tril[..., :t, :t]) @ v


class ReadsLogSumExp(Modified):
    """The row's log-sum-exp leaves the attention: the operators answer with theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.linspace(-1, 2, HEADS))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = self.causal(self.scores(q, k))
        lse = torch.logsumexp(scores, dim=-1)
        share = (lse - self.sinks.view(1, -1, 1)).to(torch.float32).sigmoid()
        out = scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v
        return self.use(out, share, lse)

    def use(self, out: Tensor, share: Tensor, lse: Tensor) -> Tensor:
        return out * share.unsqueeze(-1).to(out.dtype)


@specimen("causal")
class SinkFromLogSumExp(ReadsLogSumExp):
    """exp(sink) in the denominator is a factor sigmoid(lse - sink)."""


@specimen("causal")
class OtherFunctionOfLogSumExp(ReadsLogSumExp):
    def use(self, out: Tensor, share: Tensor, lse: Tensor) -> Tensor:
        return out * torch.tanh(lse)[..., None] + lse.mean(1)[:, None, :, None]


@specimen("causal")
class TwoSoftmaxesMerged(Modified):
    """Half of the keys each, merged by their log-sum-exps, as ring attention does."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = self.causal(self.scores(q, k)).float()
        first = torch.logsumexp(scores, -1, keepdim=True)
        second = torch.cat([torch.zeros_like(first), q.sum(-1, keepdim=True)], -1)
        second = torch.logsumexp(second, -1, keepdim=True)
        total = torch.logaddexp(first, second)
        return (scores.softmax(-1).to(v.dtype) @ v) * torch.exp(first - total)


@specimen(*UNDECIDED)
class ValuesFromLogSumExp(Modified):
    """The values wait for the log-sum-exp, so the operators cannot answer with it."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = self.causal(self.scores(q, k))
        v = v * torch.logsumexp(scores, -1, keepdim=True).sigmoid()
        return scores.softmax(-1) @ v


@specimen("weights_escape")
class LogSumExpOfOtherScores(Modified):
    """That of the scores before the mask."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = self.scores(q, k)
        lse = torch.logsumexp(scores, -1, keepdim=True)
        return (self.causal(scores).softmax(-1) @ v) * lse.sigmoid()


@specimen("weights_escape")
class LogSumExpOverQueries(Modified):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = self.causal(self.scores(q, k))
        return (scores.softmax(-1) @ v) * torch.logsumexp(scores, -2)[..., None].sigmoid()


@specimen("weights_escape")
class ShiftedLogSumExp(Modified):
    """A shift of whole rows changes no weights, but the log-sum-exp."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = self.causal(self.scores(q, k) + 3.0)
        lse = torch.logsumexp(scores, -1, keepdim=True)
        return (scores.softmax(-1) @ v) * (lse - 2.0).sigmoid()
