"""Zoo: softmaxes and products that are no attention over positions, or not quite attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.zoo import DENSE, HEAD_DIM, HEADS, KEPT, UNDECIDED, WIDTH, Attention, specimen
from tests.models.zoo_spellings import SCALE


@specimen(*DENSE)
class SoftmaxOverQueries(Attention):
    """dim=-2: every key's weights sum to one over the queries."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * SCALE).softmax(-2) @ v


@specimen(*DENSE)
class SoftmaxOverQueriesMasked(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t = q.shape[-2]
        att = (q @ k.mT * SCALE).masked_fill(self.tril[..., :t, :t] == 0, -1e9)
        return F.softmax(att, dim=2) @ v


@specimen(*DENSE)
class SoftmaxOverHeads(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * SCALE).softmax(1) @ v


@specimen(*UNDECIDED)
class TransposedAttention(Attention):
    """Keys first, softmax over dim -2, weights transposed: attention after all."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (k @ q.mT * SCALE).softmax(-2).mT @ v


@specimen(*UNDECIDED)
class TransposedScores(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (k @ q.mT * SCALE).mT.softmax(-1) @ v


@specimen(*DENSE)
class WeightsOnTheRight(Attention):
    """v^T times the weights: sums over queries."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (v.mT @ (q @ k.mT * SCALE).softmax(-1)).mT


@specimen(*UNDECIDED)
class ValuesTransposedTwice(Attention):
    """v^T times the transposed weights, transposed: attention."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (v.mT @ (q @ k.mT * SCALE).softmax(-1).mT).mT


@specimen()
class LinearAttention(Attention):
    """softmax on q and on k, k^T v first: there is no [T, T] matrix."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = q.softmax(-1), k.softmax(-2)
        return q @ (k.mT @ v)


@specimen()
class ChannelAttention(Attention):
    """Softmax over channels, [D, D] (cross-covariance)."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = q.mT, k.mT, v.mT
        return ((F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT).softmax(-1) @ v).mT


@specimen()
class Router(nn.Module):
    """Mixture of experts: softmax over experts, top two."""

    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, experts, bias=False)
        self.experts = nn.Parameter(torch.randn(experts, WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        weights = F.softmax(self.gate(x), dim=-1, dtype=torch.float)
        best, index = weights.topk(2, dim=-1)
        every = torch.einsum("b t c, e c d -> b t e d", x, self.experts)
        chosen = every.gather(2, index[..., None].expand(-1, -1, -1, WIDTH))
        return (best[..., None, :] @ chosen)[..., 0, :]


@specimen()
class DenseRouter(nn.Module):
    """Softmax between two products, over experts: gate(x) = x @ W."""

    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(WIDTH, experts))
        self.experts = nn.Parameter(torch.randn(experts, WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        weights = (x @ self.gate).softmax(-1)
        every = torch.einsum("b t c, e c d -> b t e d", x, self.experts)
        return torch.einsum("b t e, b t e d -> b t d", weights, every)


@specimen()
class DepthPooling(nn.Module):
    """A learned mixture of the outputs of all layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.weights = nn.Parameter(torch.zeros(1, 3))

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for layer in self.layers:
            x = layer(x).tanh()
            outputs.append(x)
        stacked = torch.stack(outputs, dim=-2)
        return (self.weights.softmax(-1) @ stacked)[..., 0, :]


@specimen(*DENSE)
class DepthAttention(nn.Module):
    """Each token attends over the outputs of all layers at its own position."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.query = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        outputs = [x]
        for layer in self.layers:
            outputs.append(layer(outputs[-1]).tanh())
        stacked = torch.stack(outputs, dim=-2)
        scores = self.query(x)[..., None, :] @ stacked.mT
        return (scores.softmax(-1) @ stacked)[..., 0, :]


@specimen()
class Gating(nn.Module):
    """Softmax over channels as a gate between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).softmax(-1) * x)


@specimen()
class SoftmaxFeedForward(nn.Module):
    """linear, softmax, linear: the weights are parameters, not positions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).softmax(-1))


@specimen()
class Contrastive(nn.Module):
    """Softmax of a similarity matrix that multiplies nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        similarity = F.normalize(self.a(x), dim=-1) @ F.normalize(self.b(x), dim=-1).mT
        return -similarity.log_softmax(-1).diagonal(dim1=-2, dim2=-1)


@specimen(*UNDECIDED)
class PoolingByQuery(nn.Module):
    """One learned query pools the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return (self.query @ x.mT).softmax(-1) @ x


@specimen(*UNDECIDED)
class SoftEmbedding(nn.Module):
    """softmax over a vocabulary, times its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(50, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.embedding.mT).softmax(-1) @ self.embedding


@specimen(*DENSE)
class SigmoidAttention(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t = q.shape[-2]
        return (torch.sigmoid(q @ k.mT * SCALE) * self.tril[..., :t, :t]) @ v


@specimen(KEPT)
class MaskFromScores(Attention):
    """Scores below a row's mean are hidden: the mask is computed from activations."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT * SCALE
        return scores.masked_fill(scores < scores.mean(-1, keepdim=True), -1e9).softmax(-1) @ v


@specimen(*DENSE)
class ScoresWrittenAfterwards(Attention):
    """The scores are changed in place through a view before the softmax."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT * SCALE
        scores[:, :, :, 0] += 1.0
        return scores.softmax(-1) @ v


@specimen(*DENSE)
class WeightsWrittenAfterwards(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.mT * SCALE).softmax(-1)
        weights = weights.clone()
        weights[..., 3] = 0.25
        return weights @ v


@specimen(*UNDECIDED)
class KeysWrittenBetween(Attention):
    """k changes after the scores are computed and v is a view of it."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k = k.clone()
        scores = q @ k.mT * SCALE
        k.mul_(0.5)
        return scores.softmax(-1) @ (v + k)


@specimen(*UNDECIDED)
class QueryWrittenBetween(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            buffer = q.detach().clone()
        scores = buffer @ k.mT * SCALE
        buffer.zero_()
        return scores.softmax(-1) @ v + buffer


@specimen(*DENSE)
class ValuesRolled(Attention):
    """Weights applied to values of other positions."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t = q.shape[-2]
        att = (q @ k.mT * SCALE).masked_fill(self.tril[..., :t, :t] == 0, -torch.inf)
        return att.roll(1, -1).softmax(-1) @ v


@specimen(*DENSE)
class FlippedKeys(Attention):
    """Keys and values reversed: the mask holds for flipped positions."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t = q.shape[-2]
        mask = self.tril[0, 0, :t, :t].bool()
        return F.scaled_dot_product_attention(q, k.flip(-2), v.flip(-2), attn_mask=mask.flip(-1))


@specimen(*DENSE)
class HeadMask(Attention):
    """A different window for each head."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(q.shape[-2], device=q.device)
        width = torch.tensor([4, 8, 16, 32]).view(HEADS, 1, 1)
        distance = i[:, None] - i[None]
        return F.scaled_dot_product_attention(q, k, v, (distance >= 0) & (distance < width))


@specimen()
class PoolingOverDepth(nn.Module):
    """Each position mixes the outputs of several layers by one learned query."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.query = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        states = x.unsqueeze(-2)
        for layer in self.layers:
            states = torch.cat([states, layer(x).tanh().unsqueeze(-2)], -2)
        query = self.query.view(-1, WIDTH).expand(*states.shape[:-2], -1, -1)
        return F.scaled_dot_product_attention(query, states, states).squeeze(-2)


@specimen("decode_step")
class PoolingOverPositions(nn.Module):
    """A learned query of each head that reads all positions is attention."""

    def __init__(self) -> None:
        super().__init__()
        self.kv = nn.Linear(WIDTH, 2 * WIDTH)
        self.query = nn.Parameter(torch.randn(1, HEADS, 1, HEAD_DIM))

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.kv(x).unflatten(-1, (2, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        query = self.query.expand(x.shape[0], -1, -1, -1)
        return F.scaled_dot_product_attention(query, k, v).transpose(1, 2).flatten(2)
