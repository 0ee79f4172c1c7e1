"""The ways to get a trained sparse model, each a model and its compiled form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import nsa_compile
from training.model import GPT
from training.settings import Settings


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        name: on the command line and in files.
        text: what it is, for people.
        start: the variant whose trained weights it begins with; None begins untrained.
        prepared: learns gates and compression through ``nsa_compile.prepare``.
        backend: ``"nsa"``, or None for torch.compile's own.
        tuned: trains ``tune_steps`` at ``tune_rate`` instead of ``steps`` at ``learning_rate``.
        trained: whether it trains at all.
    """

    name: str
    text: str
    start: str | None = None
    prepared: bool = False
    backend: str | None = "nsa"
    tuned: bool = False
    trained: bool = True

    def steps(self, settings: Settings) -> int:
        if not self.trained:
            return 0
        return settings.tune_steps if self.tuned else settings.all_steps

    def rate(self, settings: Settings) -> float:
        return settings.tune_rate if self.tuned else settings.learning_rate


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("dense", "dense", backend=None),
        Variant("nsa", "NSA from scratch", prepared=True),
        Variant("converted", "dense, converted, not trained", start="dense", trained=False),
        Variant("tuned", "dense, prepared, fine-tuned", start="dense", prepared=True, tuned=True),
        Variant("longer", "dense, as many steps more", start="dense", backend=None, tuned=True),
    )
}
DEFAULT = ("dense", "nsa", "converted", "tuned")


@dataclass(frozen=True)
class Made:
    """``weights`` hold the parameters; ``model`` is their compiled form, ids [B, T] -> logits."""

    weights: GPT
    model: Callable[[Tensor], Tensor]


def make(
    variant: Variant, settings: Settings, device: str, inner: str, start: dict[str, Tensor] | None
) -> Made:
    """Build ``variant`` with the weights ``start``, or the seed's where it begins untrained."""
    torch.manual_seed(settings.seed)
    weights = GPT(settings).to(device)
    if start is not None:
        weights.load_state_dict(start)
    if variant.prepared:
        nsa_compile.prepare(weights, settings.nsa)
    if variant.backend is None:
        return Made(weights, torch.compile(weights, backend=inner, dynamic=False))
    options = {"inner": inner, "strict": True, **({} if variant.prepared else settings.converted)}
    fast = torch.compile(weights, backend=variant.backend, dynamic=False, options=options)
    return Made(weights, fast)


def branches(weights: nn.Module) -> list[nsa_compile.NSAParameters]:
    """The learned parts of the prepared layers."""
    return [part for part in weights.modules() if isinstance(part, nsa_compile.NSAParameters)]
