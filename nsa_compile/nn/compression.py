"""How the keys or values of a block become one: every choice maps [B, Hkv, Nc, l, D] to [.., D].

Where a choice can begin as the mean of the block it does: training then starts from keys that
mean something to the model. Weights are per key/value head; padding never enters.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nsa_compile.passes.config import NSAConfig


class Weighted(nn.Module):
    """A learned weighted mean: one weight a head and place in the block."""

    def __init__(self, heads: int, block: int, dim: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(heads, block))

    def forward(self, blocks: Tensor, real: Tensor | None) -> Tensor:
        weights = _softmax(self.logits[:, None, :, None], real)
        return (blocks * weights).sum(-2)


class Linear(nn.Module):
    """A linear map of the block's l * D numbers; begins as the mean."""

    def __init__(self, heads: int, block: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter((torch.eye(dim) / block).repeat(heads, block, 1, 1))
        self.bias = nn.Parameter(torch.zeros(heads, 1, dim))

    def forward(self, blocks: Tensor, real: Tensor | None) -> Tensor:
        return torch.einsum("bhnld,hlde->bhne", blocks, self.weight) + self.bias


class MLP(nn.Module):
    """The paper's: a position embedding within the block, and one hidden layer of e * l * D."""

    def __init__(self, heads: int, block: int, dim: int, expand: float) -> None:
        super().__init__()
        hidden = max(1, int(expand * block * dim))
        self.positions = nn.Parameter(torch.zeros(heads, block, dim))
        self.weight_in = _uniform(block * dim, heads, block, dim, hidden)
        self.bias_in = _uniform(block * dim, heads, 1, hidden)
        self.weight_out = _uniform(hidden, heads, hidden, dim)
        self.bias_out = _uniform(hidden, heads, 1, dim)

    def forward(self, blocks: Tensor, real: Tensor | None) -> Tensor:
        blocks = blocks + self.positions[:, None]
        if real is not None:
            blocks = blocks.masked_fill(~real, 0.0)
        hidden = torch.einsum("bhnld,hlde->bhne", blocks, self.weight_in) + self.bias_in
        return F.relu(hidden) @ self.weight_out + self.bias_out


class Conv(nn.Module):
    """A depthwise convolution over the tokens, its stride the blocks'; begins as the mean."""

    def __init__(self, heads: int, block: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((heads, block, dim), 1 / block))
        self.bias = nn.Parameter(torch.zeros(heads, 1, dim))

    def forward(self, blocks: Tensor, real: Tensor | None) -> Tensor:
        return (blocks * self.weight[:, None]).sum(-2) + self.bias


class AttentionPool(nn.Module):
    """Each channel is a weighted mean whose logits are a linear map of the token; begins even."""

    def __init__(self, heads: int, block: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads, dim, dim))

    def forward(self, blocks: Tensor, real: Tensor | None) -> Tensor:
        logits = torch.einsum("bhnld,hde->bhnle", blocks, self.weight)
        return (blocks * _softmax(logits, real)).sum(-2)


class Module(nn.Module):
    """A module of the user's; padding reaches it as zeros."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, blocks: Tensor, real: Tensor | None) -> Tensor:
        out: Tensor = self.module(blocks)
        expected = [*blocks.shape[:3], blocks.shape[4]]
        if not isinstance(out, Tensor) or list(out.shape) != expected:
            found = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(
                f"compression must map [B, Hkv, Nc, l, D] = {list(blocks.shape)} to [B, Hkv, Nc, D]"
                f" = {expected}, got {found}"
            )
        return out


_KINDS: dict[str, Any] = {
    "weighted": Weighted,
    "linear": Linear,
    "conv": Conv,
    "attention": AttentionPool,
}


def build(config: NSAConfig, heads: int, dim: int) -> nn.Module | None:
    """The compression of ``config`` for ``heads`` heads of width ``dim``; None is the mean."""
    kind, block = config.compression, config.compress_block
    if kind == "mean":
        return None
    if kind == "mlp":
        return MLP(heads, block, dim, config.compress_expand)
    if isinstance(kind, str):
        module: nn.Module = _KINDS[kind](heads, block, dim)
        return module
    return Module(kind)


def cut(x: Tensor, block: int, stride: int) -> Tensor:
    """[B, H, T, D] -> the compressed blocks [B, H, T // d + 2, l, D], more than there are.

    Those behind the last complete block hold zeros from past the end and are for nobody to read:
    like this one compilation serves every length, down to those without a single block.
    """
    overlap = -(-block // stride)
    count = x.shape[2] // stride + 2
    batch, heads, length, dim = x.shape
    rows = count + overlap - 1
    # Not F.pad: torch would compile it for one length alone.
    beyond = x.new_zeros(batch, heads, rows * stride - length, dim)
    strides = torch.cat((x, beyond), 2).unflatten(2, (rows, stride))
    blocks = torch.cat([strides[:, :, at : at + count] for at in range(overlap)], 3)
    return blocks[..., :block, :]


def _softmax(logits: Tensor, real: Tensor | None) -> Tensor:
    """Over the tokens of a block, dimension -2, without padding."""
    if real is not None:
        logits = logits.masked_fill(~real, torch.finfo(logits.dtype).min)
    return torch.softmax(logits, dim=-2)


def _uniform(fan_in: int, *shape: int) -> nn.Parameter:
    bound = 1 / math.sqrt(fan_in)
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
