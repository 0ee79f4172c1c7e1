"""Hand-written models in the spellings that people publish, each with the verdict it must get."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

HEADS, HEAD_DIM, BATCH = 4, 8, 2
WIDTH = HEADS * HEAD_DIM
CONTEXT = 128  # of mask buffers
KEPT = "kept"  # attention, dense for whatever reason
DENSE = ("dense",)  # nothing may be converted; whether it is called attention is left open
UNDECIDED = ("undecided",)  # any verdict is right, as long as the numbers are


@dataclass(frozen=True)
class Specimen:
    """One model of the zoo.

    Attributes:
        build: makes the module.
        verdicts: of each attention, in graph order: ``"causal & padding"``, ``"causal + alibi"``
            (converted, with this mask and these modifiers), a reason code or ``"kept"``. Empty is
            "this is no attention"; ``DENSE`` and ``UNDECIDED`` leave it open.
        training: run in train mode.
        gradients: compare gradients too; False runs without autograd.
        dynamic: also compile with symbolic sizes.
        tolerance: difference to the dense run that is allowed, relative to its largest value.
        pending: why the compiler does not reach this verdict yet; empty when it does.
    """

    build: Callable[[], nn.Module]
    verdicts: tuple[str, ...]
    training: bool = False
    gradients: bool = True
    dynamic: bool = True
    tolerance: float = 1e-4
    pending: str = ""


ZOO: dict[str, Specimen] = {}
Module = TypeVar("Module", bound=type)


def specimen(*verdicts: str, **options: Any) -> Callable[[Module], Module]:
    """Register the decorated module class under its name."""

    def register(cls: Module) -> Module:
        assert cls.__name__ not in ZOO
        ZOO[cls.__name__] = Specimen(cls, verdicts, **options)
        return cls

    return register


class Attention(nn.Module):
    """Projections around ``attend``: x [B, T, WIDTH] -> [B, T, WIDTH]."""

    kv_heads = HEADS

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH)
        self.k, self.v = (nn.Linear(WIDTH, self.kv_heads * HEAD_DIM) for _ in range(2))
        self.out = nn.Linear(WIDTH, WIDTH)
        tril = torch.tril(torch.ones(CONTEXT, CONTEXT))
        self.register_buffer("tril", tril.view(1, 1, CONTEXT, CONTEXT))

    def forward(self, x: torch.Tensor, *extra: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        q = self.q(x).view(b, t, HEADS, HEAD_DIM).transpose(1, 2)
        k = self.k(x).view(b, t, self.kv_heads, HEAD_DIM).transpose(1, 2)
        v = self.v(x).view(b, t, self.kv_heads, HEAD_DIM).transpose(1, 2)
        y = self.attend(q, k, v, *extra)
        return self.out(y.transpose(1, 2).reshape(b, t, WIDTH))

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *extra: torch.Tensor
    ) -> torch.Tensor:
        """q [B, HEADS, T, D]; k, v [B, kv_heads, T, D] -> [B, HEADS, T, D]."""
        raise NotImplementedError

    @staticmethod
    def inputs(length: int) -> tuple[torch.Tensor, ...]:
        """Arguments of forward at one length."""
        return (hidden(length),)


def hidden(length: int) -> torch.Tensor:
    return torch.randn(BATCH, length, WIDTH)


def keep_left(length: int) -> torch.Tensor:
    """Padding mask [B, T], 1 is a real key; the first row ends in padding."""
    mask = torch.ones(BATCH, length, dtype=torch.long)
    mask[0, length - length // 3 :] = 0
    return mask


def documents(length: int) -> torch.Tensor:
    """Document ids [B, T] of packed sequences."""
    cuts = torch.tensor([[length // 3, length // 2], [length // 4, length - 3]])
    return (torch.arange(length)[None, :, None] >= cuts[:, None]).sum(-1)


def build(name: str) -> tuple[nn.Module, Callable[[int], tuple[torch.Tensor, ...]]]:
    """The module with seeded weights, wide enough for attention to prefer keys; and its inputs."""
    torch.manual_seed(0)
    entry = ZOO[name]
    model = entry.build().train(entry.training)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.3)
    return model, getattr(model, "inputs", lambda length: (hidden(length),))
