"""A small modern GPT over bytes: rotary positions, grouped key/value heads, RMSNorm, SwiGLU.

Two choices make retrieval quick to learn. Keys also see the byte before theirs, so that one layer
finds what stood after a byte; and only half the channels turn with the position, so that what is
found near is found far away.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.settings import Settings

BYTES = 256
_ROTARY_BASE = 50_000.0


class Attention(nn.Module):
    """Causal self-attention, [B, T, width] -> [B, T, width]."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.head_dim = dim = settings.head_dim
        self.q = nn.Linear(settings.width, settings.q_heads * dim, bias=False)
        self.k = nn.Linear(settings.width, settings.kv_heads * dim, bias=False)
        self.v = nn.Linear(settings.width, settings.kv_heads * dim, bias=False)
        self.out = nn.Linear(settings.q_heads * dim, settings.width, bias=False)
        self.before = nn.Parameter(torch.full((settings.width,), 0.5))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        mixed = torch.lerp(x, F.pad(x, (0, 0, 1, -1)), self.before)
        q, k, v = (
            part.view(batch, length, -1, self.head_dim).transpose(1, 2)
            for part in (self.q(x), self.k(mixed), self.v(x))
        )
        q, k = (_rotate(part, cos, sin) for part in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).reshape(batch, length, -1))


class Block(nn.Module):
    def __init__(self, settings: Settings) -> None:
        super().__init__()
        width, hidden = settings.width, 8 * settings.width // 3 // 64 * 64 or 64
        self.norm_attention, self.norm_mlp = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = Attention(settings)
        self.up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.norm_attention(x), cos, sin)
        gate, up = self.up(self.norm_mlp(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class GPT(nn.Module):
    """Byte ids [B, T] -> logits [B, T, 256]."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.embed = nn.Embedding(BYTES, settings.width)
        self.blocks = nn.ModuleList(Block(settings) for _ in range(settings.layers))
        self.norm = nn.RMSNorm(settings.width)
        self.head = nn.Linear(settings.width, BYTES, bias=False)
        dim = settings.head_dim // 2
        rates = _ROTARY_BASE ** (-torch.arange(0, dim, 2) / dim)
        angles = torch.arange(settings.context)[:, None] * rates.repeat(2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self._initialise(settings)

    def forward(self, ids: Tensor) -> Tensor:
        x, length = self.embed(ids), ids.shape[1]
        for block in self.blocks:
            x = block(x, self.cos[:length], self.sin[:length])
        return self.head(self.norm(x))

    def _initialise(self, settings: Settings) -> None:
        for name, weight in self.named_parameters():
            if weight.dim() < 2:
                continue
            # Layers that write to the residual stream begin smaller, or depth adds up its noise.
            writes = name.endswith(("out.weight", "down.weight"))
            scale = (2 * settings.layers) ** -0.5 if writes else 1.0
            nn.init.normal_(weight, std=scale * weight.shape[1] ** -0.5)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (arXiv 2104.09864) for the first channels; keeps the dtype of x."""
    turning = cos.shape[-1]
    first, second = x[..., :turning].chunk(2, dim=-1)
    turned = x[..., :turning] * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned.to(x.dtype), x[..., turning:]), dim=-1)
