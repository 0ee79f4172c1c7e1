"""The standard library's sources as bytes, and key-value pairs planted in them.

A planted sequence holds lines ``#k:`` key value somewhere in the text and ends in questions about
some of them, ``#?:`` key value. Keys and values are single bytes above 127, which the text has
none of. Who does not find the pair can only guess among the values: retrieval shows there long
before it shows in the loss.
"""

from __future__ import annotations

import dataclasses
import math
import random
import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from training.settings import Phase, Settings

KEYS, VALUES = range(0x80, 0xE0), range(0xE0, 0x100)
_PAIR, _QUESTION = b"\n#k:", b"\n#?:"
_VALUE = len(_PAIR) + 1  # where the value stands in a line
_SLOT = 8  # bytes of a line and what parts it from the next; lines stand at multiples of it


class Batch(NamedTuple):
    """Sequences, and where the answers begin in them.

    Attributes:
        ids: int64 [B, T + 1].
        answers: int64 [B, N], positions of the values asked for.
    """

    ids: Tensor
    answers: Tensor


class Corpus:
    """Every twentieth file is held out."""

    def __init__(self, settings: Settings, device: str) -> None:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = sorted(
            file
            for file in root.rglob("*.py")
            if "site-packages" not in file.relative_to(root).parts
        )
        self.train = _bytes([file for at, file in enumerate(files) if at % 20])
        self.held_out = _bytes(files[::20])
        self.settings, self.device = settings, device
        shortest = min(len(self.train), len(self.held_out))
        if shortest <= settings.context + 1:
            raise SystemExit(
                f"context must be below {shortest - 1}, the length of the held-out text, got "
                f"{settings.context}"
            )

    def training(self, step: int) -> Batch:
        """The planted batch of a step: a function of seed and step alone, so that a run resumes.

        Every pair is asked for several times more, at distances that are uniform in their
        logarithm: near pairs teach what a question is, far ones that it may be about anything.
        """
        rng = random.Random(self.settings.seed * 1_000_003 + step)
        return self._planted(self.train, rng, self.settings.phase_at(step))

    def full(self) -> Batch:
        """A training batch of the full length."""
        return self.training(self.settings.all_steps)

    def plain(self, index: int) -> Batch:
        """A held-out batch without pairs."""
        rng, phase = random.Random(-1 - index), self.settings.phases[-1]
        rows = [_window(self.held_out, rng, phase.context) for _ in range(phase.batch)]
        return self._batch(rows, [[] for _ in rows])

    def planted(self, index: int) -> Batch:
        """A held-out batch with pairs anywhere in the context, each place equally likely."""
        asked_at_the_end = dataclasses.replace(self.settings.phases[-1], repeats=0)
        return self._planted(self.held_out, random.Random(-1_000_001 - index), asked_at_the_end)

    def _planted(self, data: bytes, rng: random.Random, phase: Phase) -> Batch:
        rows = [_window(data, rng, phase.context) for _ in range(phase.batch)]
        return self._batch(rows, [_plant(row, phase, rng) for row in rows])

    def _batch(self, rows: list[bytearray], answers: list[list[int]]) -> Batch:
        ids = torch.stack([torch.frombuffer(row, dtype=torch.uint8) for row in rows])
        # A tensor needs as many answers in each row: the last stands there again.
        most = max(len(found) for found in answers)
        even = [found + found[-1:] * (most - len(found)) for found in answers]
        at = torch.tensor(even, dtype=torch.long).view(len(rows), -1)
        return Batch(ids.to(self.device).long(), at.to(self.device))


def _window(data: bytes, rng: random.Random, context: int) -> bytearray:
    start = rng.randrange(len(data) - context)
    return bytearray(data[start : start + context + 1])


def _plant(row: bytearray, phase: Phase, rng: random.Random) -> list[int]:
    """Write pairs and questions into ``row``; returns where the answers are, the last lines' first.

    ``phase.questions`` of the pairs are asked for in the last lines, and each up to
    ``phase.repeats`` times before them.
    """
    slots = len(row) // _SLOT
    last = slots - phase.questions
    if last < phase.pairs:
        raise SystemExit(
            f"a context of {phase.context} has room for {max(last, 0)} pairs beside "
            f"{phase.questions} questions, got pairs={phase.pairs}"
        )
    places = rng.sample(range(last), phase.pairs)
    pairs = [
        (at, bytes((key, rng.choice(VALUES))))
        for at, key in zip(places, rng.sample(KEYS, phase.pairs), strict=True)
    ]
    lines = {at: (_PAIR, pair) for at, pair in pairs}
    asked = rng.sample(pairs, phase.questions)
    answers = list(range(last, slots))
    lines.update({last + i: (_QUESTION, pair) for i, (_, pair) in enumerate(asked)})
    for at, pair in pairs * phase.repeats:
        later = at + int(math.exp(rng.random() * math.log(last - at)))
        if later < last and later not in lines:
            lines[later] = (_QUESTION, pair)
            answers.append(later)
    for at, (begin, pair) in lines.items():
        line = begin + pair + b"\n"
        row[at * _SLOT : at * _SLOT + len(line)] = line
    return [at * _SLOT + _VALUE for at in answers]


def _bytes(files: list[Path]) -> bytes:
    text = b"\n".join(file.read_bytes() for file in files)
    return text.translate(bytes(min(byte, 0x7F) for byte in range(0x100)))
