"""The standard library's sources as bytes, and key-value pairs planted in them.

A planted sequence holds lines ``#k:abc=xyz`` somewhere in the text and ends in questions about
some of them, ``#?abc=xyz``. Who does not find the pair cannot know the three letters of its value:
retrieval shows there long before it shows in the loss.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from training.settings import Settings

LETTERS = 3
_PAIR, _QUESTION = b"\n#k:", b"#?"
_PAIR_SIZE = len(_PAIR) + 2 * LETTERS + 2
_QUESTION_SIZE = len(_QUESTION) + 2 * LETTERS + 2
_SLOT = 16  # bytes; pairs stand at multiples of it, so that none overwrites another


class Batch(NamedTuple):
    """Sequences, and where the answers begin in them.

    Attributes:
        ids: int64 [B, T + 1].
        answers: int64 [B, questions], positions of the first letter of each value asked for.
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

        Distances between pair and question are uniform in their logarithm: near pairs teach what
        a question is, far ones that it may be about anything.
        """
        rng = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + step)
        return self._planted(self.train, rng, near=True)

    def plain(self, index: int) -> Batch:
        """A held-out batch without pairs."""
        rng = torch.Generator().manual_seed(-1 - index)
        ids = self._windows(self.held_out, rng)
        return Batch(
            ids.to(self.device), torch.empty(len(ids), 0, dtype=torch.long, device=self.device)
        )

    def planted(self, index: int) -> Batch:
        """A held-out batch with pairs anywhere in the context, all places equally likely."""
        rng = torch.Generator().manual_seed(-1_000_001 - index)
        return self._planted(self.held_out, rng, near=False)

    def _windows(self, data: Tensor, rng: torch.Generator) -> Tensor:
        settings = self.settings
        high = len(data) - settings.context - 1
        starts = torch.randint(high, (settings.batch, 1), generator=rng)
        return data[starts + torch.arange(settings.context + 1)].long()

    def _planted(self, data: Tensor, rng: torch.Generator, near: bool) -> Batch:
        rows = self._windows(data, rng)
        answers = torch.stack([_plant(row, self.settings, rng, near) for row in rows])
        return Batch(rows.to(self.device, non_blocking=True), answers.to(self.device))


def _plant(row: Tensor, settings: Settings, rng: torch.Generator, near: bool) -> Tensor:
    """Write pairs and questions into ``row``; returns where the answers begin."""
    pairs, questions = settings.pairs, settings.questions
    begin = len(row) - questions * _QUESTION_SIZE
    slots = begin // _SLOT - 1
    if slots < pairs:
        raise SystemExit(
            f"a context of {settings.context} has room for {max(slots, 0)} pairs beside "
            f"{questions} questions, got pairs={pairs}"
        )
    keys, values = _words(pairs, rng), _words(pairs, rng)
    weights = 1.0 / torch.arange(slots, 0, -1) if near else torch.ones(slots)
    at = torch.multinomial(weights, pairs, generator=rng)[:, None] * _SLOT
    row[at + torch.arange(_PAIR_SIZE)] = _lines(_PAIR, keys, values)
    asked = torch.randperm(pairs, generator=rng)[:questions]
    row[begin:] = _lines(_QUESTION, keys[asked], values[asked]).flatten()
    return begin + torch.arange(questions) * _QUESTION_SIZE + len(_QUESTION) + LETTERS + 1


def _lines(begin: bytes, keys: Tensor, values: Tensor) -> Tensor:
    """Bytes [N, size] of ``begin`` key = value newline."""
    parts = (begin, keys, b"=", values, b"\n")
    columns = [
        torch.tensor(list(part)).expand(len(keys), -1) if isinstance(part, bytes) else part
        for part in parts
    ]
    return torch.cat(columns, dim=1)


def _words(count: int, rng: torch.Generator) -> Tensor:
    """Letters [count, LETTERS], each row another word."""
    numbers = torch.randperm(26**LETTERS, generator=rng)[:count]
    places = 26 ** torch.arange(LETTERS)
    return numbers[:, None] // places % 26 + ord("a")


def _bytes(files: list[Path]) -> Tensor:
    text = b"\n".join(file.read_bytes() for file in files)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)
