"""Sizes of a training run: what the presets choose and the command line may change."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Phase:
    """Steps on sequences of one length.

    Args:
        context, batch: length and number of the sequences in a step.
        steps: optimizer steps.
        pairs, questions: planted pairs in a sequence, and how many the last lines ask for.
        repeats: how often more a training sequence asks for each pair, on the way.
    """

    context: int
    batch: int
    steps: int
    pairs: int
    questions: int
    repeats: int


@dataclass(frozen=True)
class Settings:
    """One run. Lengths are bytes, which are the model's tokens.

    Args:
        shorter: what the variants that begin untrained train on first. A model finds out what a
            question is where pairs are few and near, not among thousands of bytes.
        context, batch: length and number of the sequences in a step, after that.
        steps: optimizer steps of the variants that begin untrained, after that.
        tune_steps: those of the variants that begin with the dense model's weights.
        width, layers, q_heads, kv_heads, head_dim: the model.
        learning_rate: peak of the cosine schedule; ``tune_rate`` that of the tuned variants
            and ``tune_gate_rate`` that of their gates.
        answer_weight: loss weight of a byte that answers a planted question; other bytes have 1.
        pairs, questions: planted pairs in a sequence, and how many the last lines ask for.
        repeats: how often more a training sequence asks for each pair, on the way.
        eval_batches: held-out batches of plain text, and as many planted ones.
        nsa: options of ``nsa_compile.prepare``.
        converted: options of the backend for the conversion without training.
        seed: of weights and data; the data of a step depends on it and the step alone.
    """

    shorter: tuple[Phase, ...]
    context: int
    batch: int
    steps: int
    tune_steps: int
    width: int
    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    learning_rate: float
    tune_rate: float
    tune_gate_rate: float
    answer_weight: float
    pairs: int
    questions: int
    repeats: int
    eval_batches: int
    nsa: dict[str, Any]
    converted: dict[str, Any]
    seed: int = 0

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Of a variant that begins untrained; the last is what is measured."""
        full = Phase(self.context, self.batch, self.steps, self.pairs, self.questions, self.repeats)
        return (*self.shorter, full)

    @property
    def all_steps(self) -> int:
        """Optimizer steps of the variants that begin untrained."""
        return sum(phase.steps for phase in self.phases)

    def phase_at(self, step: int) -> Phase:
        """The phase of a step; steps beyond the last are of the full length."""
        for phase in self.shorter:
            if step < phase.steps:
                return phase
            step -= phase.steps
        return self.phases[-1]

    def replace(self, **changes: Any) -> Settings:
        """With the fields that are not None replaced."""
        given = {name: value for name, value in changes.items() if value is not None}
        return dataclasses.replace(self, **given)


# dense_len=0: without it the backend would compute 8,192 keys and fewer densely.
PRESETS = {
    "cpu": Settings(
        shorter=(Phase(128, 8, 180, 4, 2, 6),),
        context=512, batch=2, steps=120, tune_steps=40, width=128, layers=2, q_heads=4, kv_heads=2,
        head_dim=32, learning_rate=3e-3, tune_rate=1e-3, tune_gate_rate=2e-2, answer_weight=10.0,
        pairs=8, questions=6, repeats=2, eval_batches=8,
        nsa={"merge": "gate", "dense_len": 0, "compress_block": 16, "compress_stride": 8,
             "select_block": 16, "num_selected": 8, "window": 64},
        converted={"dense_len": 0, "select_block": 32, "num_selected": 8, "window": 64},
    ),
    "8k": Settings(
        shorter=(Phase(256, 128, 240, 6, 4, 6),),
        context=8192, batch=4, steps=1000, tune_steps=400, width=512, layers=8, q_heads=8,
        kv_heads=2, head_dim=64, learning_rate=1.5e-3, tune_rate=5e-4, tune_gate_rate=5e-3,
        answer_weight=8.0, pairs=64, questions=32, repeats=4, eval_batches=16,
        nsa={"merge": "gate", "dense_len": 0},
        converted={"dense_len": 0},
    ),
    "32k": Settings(
        shorter=(Phase(256, 128, 480, 6, 4, 6),),
        context=32768, batch=1, steps=150, tune_steps=60, width=768, layers=6, q_heads=8,
        kv_heads=2, head_dim=128, learning_rate=1.5e-3, tune_rate=5e-4, tune_gate_rate=5e-3,
        answer_weight=8.0, pairs=96, questions=48, repeats=8, eval_batches=32,
        nsa={"merge": "gate", "dense_len": 0},
        converted={},
    ),
}  # fmt: skip
