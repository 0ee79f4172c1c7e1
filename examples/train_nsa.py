"""Train a byte-level GPT dense and with Native Sparse Attention, and compare the two.

    python examples/train_nsa.py                      small, two minutes on two CPU cores
    python examples/train_nsa.py --preset 8k          on a GPU, context 8,192
    python examples/train_nsa.py --preset 32k         on a GPU, context 32,768
    python examples/train_nsa.py --out runs/a --resume   go on from the checkpoints of runs/a

Four variants on the standard library's sources: dense; NSA from scratch, through
``nsa_compile.prepare`` and ``backend="nsa"``; the dense weights converted without training; and
the dense weights prepared and fine-tuned. docs/training.md explains what is measured.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn
from training import measure, results
from training.loop import Checkpoint, State, train
from training.model import GPT
from training.settings import PRESETS, Settings
from training.text import Corpus
from training.variants import DEFAULT, VARIANTS, Variant, make


def build(seq_len: int = 32768, batch: int = 1) -> tuple[nn.Module, torch.Tensor]:
    """What nsa-convert looks at: the 32k model and example inputs of the asked size."""
    model = GPT(PRESETS["32k"].replace(context=seq_len))
    return model, torch.zeros(batch, seq_len, dtype=torch.long)


def parse(argv: list[str] | None) -> argparse.Namespace:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description="Train a byte-level GPT dense and with NSA.")
    parser.add_argument("--preset", choices=PRESETS, help="cpu on a CPU, 8k on a GPU by default")
    parser.add_argument("--variants", default=",".join(DEFAULT), help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--out", type=Path, default=Path("runs/train_nsa"), help="folder to write")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints in --out")
    parser.add_argument("--save-every", type=int, default=250, help="steps between checkpoints")
    parser.add_argument("--train-only", action="store_true", help="measure later, with --resume")
    parser.add_argument("--breakdown", action="store_true", help="profile a step of each variant")
    parser.add_argument("--device", default=device)
    parser.add_argument("--inner", default="inductor", help="inductor, aot_eager or eager")
    for name, text in (
        ("steps", "of the variants from scratch"), ("tune-steps", "of fine-tuning"),
        ("context", "bytes in a sequence"), ("batch", "sequences in a step"),
        ("eval-batches", "held-out batches"), ("seed", "of weights and data"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, help=text)
    parser.add_argument("--learning-rate", type=float, help="peak, of the variants from scratch")
    parser.add_argument("--answer-weight", type=float, help="of an answer's bytes in the loss")
    for name, text in (
        ("converted", "of the conversion without training, e.g. candidates=128"),
        ("prepared", "of the variants with gates, e.g. scorer=channels"),
    ):
        parser.add_argument(
            f"--{name}", action="append", default=[], metavar="NAME=VALUE", type=option,
            help=f"option {text}; may be repeated",
        )  # fmt: skip
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.variants.split(",") if name not in VARIANTS]
    if unknown:
        parser.error(f"--variants must be of {', '.join(VARIANTS)}, got {', '.join(unknown)}")
    return arguments


def option(text: str) -> tuple[str, Any]:
    """``"candidates=128"`` as a name and a value: a number, or else text."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    return name, int(value) if value.isdigit() else value


def settings_of(arguments: argparse.Namespace) -> Settings:
    preset = arguments.preset or ("8k" if arguments.device == "cuda" else "cpu")
    names = (
        "steps", "tune_steps", "context", "batch", "eval_batches", "seed", "learning_rate",
        "answer_weight",
    )  # fmt: skip
    settings = PRESETS[preset].replace(**{name: getattr(arguments, name) for name in names})
    return settings.replace(
        converted={**settings.converted, **dict(arguments.converted)},
        nsa={**settings.nsa, **dict(arguments.prepared)},
    )


def run(
    variant: Variant, corpus: Corpus, arguments: argparse.Namespace, bar: Progress
) -> dict[str, Any]:
    """Train (or go on training) one variant and measure it."""
    settings, device = corpus.settings, corpus.device
    start = None if variant.start is None else beginning(variant.start, corpus, arguments.out)
    made, state = make(variant, settings, device, arguments.inner, start), State()
    if variant.trained:
        checkpoint = Checkpoint(arguments.out, variant, settings)
        resumed = arguments.resume and checkpoint.path.exists()
        state = train(variant, made, corpus, checkpoint, bar, resumed, arguments.save_every)
    if arguments.train_only:
        return {}
    found = {
        "steps": state.step, "seconds": state.seconds,
        "parameters": sum(p.numel() for p in made.weights.parameters()),
        **measure.quality(made, corpus), **measure.cost(made, corpus),
    }  # fmt: skip
    if variant.prepared:
        found["without"] = measure.without_branches(made, corpus)
    if arguments.breakdown and device == "cuda":
        found["breakdown"] = measure.breakdown(made, corpus)
    return {**found, "losses": [round(loss, 5) for loss in state.losses]}


def beginning(name: str, corpus: Corpus, folder: Path) -> dict[str, torch.Tensor]:
    """The trained weights of the variant ``name``."""
    checkpoint = Checkpoint(folder, VARIANTS[name], corpus.settings)
    if not checkpoint.path.exists():
        raise SystemExit(f"{checkpoint.path} is missing: train the variant {name} first")
    return checkpoint.load(corpus.device)["model"]


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    settings, console = settings_of(arguments), Console()
    corpus = Corpus(settings, arguments.device)
    arguments.out.mkdir(parents=True, exist_ok=True)
    command = shlex.join(
        ["python", "examples/train_nsa.py", *(sys.argv[1:] if argv is None else argv)]
    )
    columns = (
        TextColumn("{task.description:30}"), BarColumn(None), MofNCompleteColumn(),
        TextColumn("{task.fields[loss]:.3f} bits/byte"),
        TextColumn("{task.fields[rate]:,.0f} tokens/s"), TimeElapsedColumn(),
    )  # fmt: skip
    found: dict[str, dict[str, Any]] = {}
    with Progress(*columns, console=console) as bar:
        for name in arguments.variants.split(","):
            found[name] = run(VARIANTS[name], corpus, arguments, bar)
            if arguments.train_only:
                continue
            # After each: what is measured is kept, whatever happens to the next.
            results.write(results.document(corpus, command, found), arguments.out / "results.json")
    if arguments.train_only:
        return
    for shown in (
        results.table(settings, found), results.branch_table(found), results.breakdown_table(found)
    ):  # fmt: skip
        if shown is not None:
            console.print(shown)
    results.plot(found, arguments.out / "losses.png", console)


if __name__ == "__main__":
    main()
