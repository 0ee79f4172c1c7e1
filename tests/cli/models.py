"""A file of small models and builders that nsa-convert is tried on; never imported."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    def __init__(self, breaks: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.breaks, self.dropout = breaks, dropout
        self.register_buffer("bias", torch.tril(torch.ones(64, 64)).view(1, 1, 64, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        q, k, v = (y.view(b, t, 4, 8).transpose(1, 2) for y in self.qkv(x).split(32, 2))
        if self.breaks:
            torch._dynamo.graph_break()
        mask = self.bias[:, :, :t, :t] == 1
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return y.transpose(1, 2).reshape(b, t, 32)


class Model(nn.Module):
    def __init__(self, layers: int = 2, **kwargs: object) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 32)
        self.layers = nn.ModuleList(Attention(**kwargs) for _ in range(layers))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x)
        return x


class Random(Model):
    """Its mask is drawn at random in the forward: nothing can be proven about it."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        q = self.embed(ids)[:, None]
        mask = torch.rand(ids.shape[1], ids.shape[1], device=ids.device) > 0.5
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)


class NoDevice(Model):
    """Makes a tensor without naming a device, as code that only ever ran on one does."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids + torch.arange(ids.shape[1]))


class ReadsValues(Model):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = super().forward(ids)
        return x * 2 if ids.max() > 50 else x


def ids(batch: int = 1, seq_len: int = 48) -> torch.Tensor:
    return torch.randint(0, 100, (batch, seq_len))


def build(seq_len: int = 48, batch: int = 1):
    return Model(), ids(batch, seq_len)


def on_cuda():
    return Model().to("cuda").half(), ids().cuda()


def by_keyword():
    return Model(), {"ids": ids()}


def by_position():
    return Model(), (ids(),)


def just_a_model():
    return Model()


def breaks():
    return Model(breaks=True), ids()


def dropout():
    return Model(dropout=0.1), ids()


def random_mask():
    return Random(), ids()


def no_device():
    return NoDevice(), ids()


def reads_values():
    return ReadsValues(), ids()


def convolution():
    return nn.Conv2d(3, 3, 3), torch.randn(1, 3, 8, 8)


def mixed():
    """A weight made of a random part and a fixed one."""
    model = Model()
    model.scale = nn.Parameter(torch.rand(32) * torch.arange(32.0))
    return model, ids()


def only_on_meta():
    """In-place: a known tensor takes values that nobody knows."""
    model = Model()
    model.table = torch.zeros(32)
    model.table[:4] = torch.rand(4)
    return model, ids()
