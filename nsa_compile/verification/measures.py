"""How far two tensors are apart, and what two sets of logits say about the same tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nsa_compile.verification.coverage import coverage

# Rows of logits looked at in one go: a vocabulary is wide.
_ROWS = 1024
# Up to this relative error two results are the same but for rounding.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def rounding(*dtypes: torch.dtype) -> float:
    """The relative error that rounding to the coarsest of ``dtypes`` explains."""
    return max((_ROUNDING.get(dtype, 0.0) for dtype in dtypes), default=0.0)


@dataclass
class Distance:
    """Sums over all elements seen so far of a dense result and one that stands for it."""

    error: float = 0.0
    dense: float = 0.0
    sparse: float = 0.0
    product: float = 0.0
    largest: float = 0.0

    def add(self, dense: Tensor, sparse: Tensor) -> None:
        """Take in two tensors of one shape; float64 sums of some rows at a time."""
        for a, b in zip(_rows(dense), _rows(sparse), strict=True):
            a, b = a.double(), b.double()
            difference = a - b
            self.error += float(difference.square().sum())
            self.dense += float(a.square().sum())
            self.sparse += float(b.square().sum())
            self.product += float((a * b).sum())
            if difference.numel():
                self.largest = max(self.largest, float(difference.abs().max()))

    @property
    def relative(self) -> float:
        """Norm of the difference over the norm of the dense result."""
        if self.error == 0:
            return 0.0
        return math.sqrt(self.error / self.dense) if self.dense else math.inf

    @property
    def cosine(self) -> float:
        norms = math.sqrt(self.dense * self.sparse)
        return min(1.0, self.product / norms) if norms else float(self.error == 0)


@dataclass
class Observation:
    """One layer's attention, dense and sparse on the same inputs, over all its runs.

    Attributes:
        shares: sum and number of the queries' covered shares; None where nothing is chosen.
        worst: the least share of any query.
    """

    distance: Distance = field(default_factory=Distance)
    shares: tuple[float, int] | None = None
    worst: float = 1.0
    runs: int = 0
    dtype: torch.dtype = torch.float32

    def add(
        self, dense: Tensor, sparse: Tensor, lse: Tensor | None, arguments: tuple[Any, ...] | None
    ) -> None:
        """Take in one run of the layer."""
        self.distance.add(dense, sparse)
        self.runs += 1
        self.dtype = dense.dtype
        if lse is None or arguments is None:
            return
        seen = coverage(lse, arguments)
        seen = seen[~seen.isnan()].double()
        total, count = self.shares or (0.0, 0)
        self.shares = (total + float(seen.sum()), count + seen.numel())
        if seen.numel():
            self.worst = min(self.worst, float(seen.min()))

    @property
    def coverage(self) -> float | None:
        if self.shares is None or not self.shares[1]:
            return None
        return self.shares[0] / self.shares[1]


@dataclass(frozen=True)
class Predictions:
    """What logits [N, V] say, dense and sparse: KL in nats a token, agreement of the best one."""

    kl: float
    top1: float
    tokens: int


def predictions(dense: Tensor, sparse: Tensor) -> Predictions | None:
    """KL(dense || sparse) and how often both rank the same token first; None of no tokens."""
    divergence, same, tokens = 0.0, 0, 0
    for a, b in zip(_rows(dense), _rows(sparse), strict=True):
        log_a, log_b = (x.float().log_softmax(-1) for x in (a, b))
        divergence += float(F.kl_div(log_b, log_a, reduction="sum", log_target=True))
        same += int((a.argmax(-1) == b.argmax(-1)).sum())
        tokens += a.shape[0]
    return Predictions(max(0.0, divergence / tokens), same / tokens, tokens) if tokens else None


def perplexity(logits: Tensor, labels: Tensor) -> float | None:
    """exp of the mean cross entropy of the next token: logits [B, T, V], labels [B, T].

    Logits at position t are for the label at t + 1; labels of -100 do not count.
    """
    rows, targets = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(logits.device)
    loss, count = 0.0, int((targets != -100).sum())
    for part, target in zip(rows.split(_ROWS), targets.split(_ROWS), strict=True):
        loss += float(F.cross_entropy(part.float(), target, ignore_index=-100, reduction="sum"))
    if not count:
        return None
    mean = loss / count
    return math.exp(mean) if mean < 700 else math.inf


def _rows(x: Tensor) -> tuple[Tensor, ...]:
    """Pieces of ``x`` as [N, last dimension]."""
    flat = x.reshape(-1, x.shape[-1]) if x.dim() > 1 else x.reshape(1, -1)
    pieces: tuple[Tensor, ...] = flat.split(_ROWS)
    return pieces
