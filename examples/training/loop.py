"""The training loop: AdamW on a cosine schedule, with checkpoints that a run goes on from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor

from training.settings import Settings
from training.text import Batch, Corpus
from training.variants import Made, Variant, branches

_WARMUP = 25  # steps at most; the first phase is short
_SHOWN = 10  # steps between two looks at the loss: each look waits for the device


@dataclass
class State:
    """How far a variant has come; everything but weights and optimizer.

    Attributes:
        losses: mean cross-entropy of each step, nats a byte.
        seconds: spent training, compilation included.
    """

    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def step(self) -> int:
        return len(self.losses)


class Checkpoint:
    """The file of one variant; reading needs the settings that it was written with."""

    def __init__(self, folder: Path, variant: Variant, settings: Settings) -> None:
        self.path = folder / f"{variant.name}.pt"
        # How weights are converted afterwards does not matter, nor do the branches to dense ones.
        unused = {"converted": {}} if variant.prepared else {"converted": {}, "nsa": {}}
        self.settings = repr(settings.replace(**unused))

    def save(self, made: Made, optimizer: torch.optim.Optimizer, state: State) -> None:
        held = {
            "settings": self.settings, "model": made.weights.state_dict(),
            "optimizer": optimizer.state_dict(), "losses": state.losses, "seconds": state.seconds,
        }  # fmt: skip
        # Written beside and renamed: a run that is stopped here keeps the checkpoint before.
        beside = self.path.with_suffix(".part")
        torch.save(held, beside)
        beside.replace(self.path)

    def load(self, device: str) -> dict[str, Any]:
        """What was saved."""
        held: dict[str, Any] = torch.load(self.path, map_location=device, weights_only=True)
        if held["settings"] != self.settings:
            raise SystemExit(
                f"{self.path} was written with other settings:\n  found    {held['settings']}\n"
                f"  expected {self.settings}\nchoose another --out, or run without --resume"
            )
        return held


def optimizer_of(
    made: Made, device: str, rate: float, gate_rate: float | None = None
) -> torch.optim.AdamW:
    """AdamW; weight decay for matrices alone.

    Gates begin at the window. ``gate_rate`` opens them: at a rate that suits trained weights they
    would stay there, and what the selected blocks hold would not be read.
    """
    times = 1.0 if gate_rate is None else gate_rate / rate
    gates = [weight for part in branches(made.weights) for weight in part.gate.parameters()]
    of_gates = {id(weight) for weight in gates}
    others = [weight for weight in made.weights.parameters() if id(weight) not in of_gates]
    groups = [
        {"params": [p for p in others if p.dim() >= 2], "weight_decay": 0.1, "times": 1.0},
        {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0, "times": 1.0},
        {"params": gates, "weight_decay": 0.0, "times": times},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=rate, betas=(0.9, 0.95),
        fused=device == "cuda",
    )  # fmt: skip


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """``rate`` for all but the gates, which keep their multiple of it."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["times"]


def rate_at(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then a cosine down to a tenth of ``peak``."""
    warmup = min(max(steps // 20, 1), _WARMUP)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(steps - warmup, 1)
    return peak * (0.55 + 0.45 * math.cos(math.pi * done))


def autocast(device: str) -> AbstractContextManager[Any]:
    """bfloat16 on a GPU; the CPU computes in float32."""
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")


def losses_of(
    model: Callable[[Tensor], Tensor], batch: Batch, answer_weight: float, device: str
) -> tuple[Tensor, Tensor]:
    """What is trained, with answers weighted, and the mean cross-entropy of all bytes."""
    with autocast(device):
        logits = model(batch.ids[:, :-1])
    targets = batch.ids[:, 1:]
    each = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    each = each.view_as(targets)
    weights = torch.ones_like(each).scatter(1, batch.answers - 1, answer_weight)
    return (each * weights).sum() / weights.sum(), each.detach().mean()


def one_step(
    made: Made, optimizer: torch.optim.Optimizer, batch: Batch, settings: Settings, device: str
) -> Tensor:
    """Forward, backward and update; returns the mean cross-entropy, still on the device."""
    loss, mean = losses_of(made.model, batch, settings.answer_weight, device)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(made.weights.parameters(), 1.0)
    optimizer.step()
    return mean


def train(
    variant: Variant, made: Made, corpus: Corpus, checkpoint: Checkpoint, bar: Progress,
    resumed: bool, save_every: int,
) -> State:  # fmt: skip
    """Train ``made`` to the variant's last step, from ``checkpoint`` where ``resumed``."""
    settings, device = corpus.settings, corpus.device
    steps = variant.steps(settings)
    gate_rate = settings.tune_gate_rate if variant.tuned else None
    optimizer, state = optimizer_of(made, device, variant.rate(settings), gate_rate), State()
    if resumed:
        held = checkpoint.load(device)
        made.weights.load_state_dict(held["model"])
        optimizer.load_state_dict(held["optimizer"])
        state = State(held["losses"], held["seconds"])
        del held  # its memory is not the step's
    task = bar.add_task(variant.text, total=steps, completed=state.step, loss=math.nan, rate=0.0)
    before, began, waiting, read = state.seconds, time.perf_counter(), [], 0
    seen = began
    # The tuned variants see text that the weights they begin with have not seen.
    first = settings.all_steps if variant.tuned else 0
    for step in range(state.step, steps):
        set_rate(optimizer, rate_at(step, steps, variant.rate(settings)))
        batch = corpus.training(first + step)
        waiting.append(one_step(made, optimizer, batch, settings, device))
        read += batch.ids[:, 1:].numel()
        last, saves = step + 1 == steps, (step + 1) % save_every == 0
        if not (last or saves or len(waiting) == _SHOWN):
            continue
        state.losses += torch.stack(waiting).tolist()
        now = time.perf_counter()
        speed = read / (now - seen)
        bar.update(task, completed=state.step, loss=state.losses[-1] / math.log(2), rate=speed)
        seen, waiting, read, state.seconds = now, [], 0, before + now - began
        if last or saves:
            checkpoint.save(made, optimizer, state)
    return state
