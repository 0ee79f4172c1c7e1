"""What a run leaves behind: the table, the JSON and the plot of the losses."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import re
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from training.measure import BRANCHES
from training.settings import Settings
from training.text import Corpus
from training.variants import VARIANTS


def document(corpus: Corpus, command: str, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The run as JSON has it; times in milliseconds and seconds, losses in nats a byte."""
    gpu = torch.cuda.get_device_name() if corpus.device == "cuda" else platform.machine()
    return {
        "version": 1, "command": command, "hardware": gpu, "torch": torch.__version__,
        "python": platform.python_version(),
        "corpus_bytes": {"train": len(corpus.train), "held_out": len(corpus.held_out)},
        "settings": dataclasses.asdict(corpus.settings), "variants": found,
    }  # fmt: skip


def write(document: dict[str, Any], path: Path) -> None:
    text = json.dumps(document, indent=1)
    flat = re.sub(r"\[[^][{}\"]*\]", lambda numbers: " ".join(numbers[0].split()), text)
    path.write_text(flat + "\n")


def table(settings: Settings, found: dict[str, dict[str, Any]]) -> Table:
    """One row a variant; differences are to the dense model."""
    shown = Table(title=f"Held-out text and retrieval, {settings.context:,} bytes of context")
    shown.add_column("variant")
    for name in ("steps", "loss", "to dense", "bits/byte", "recall", "ms a step", "peak MiB"):
        shown.add_column(name, justify="right")
    dense = found.get("dense", {}).get("loss")
    for name, row in found.items():
        change = "" if dense is None else f"{row['loss'] / dense - 1:+.2%}"
        peak = "-" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}"
        shown.add_row(
            VARIANTS[name].text, str(row["steps"]), f"{row['loss']:.4f}", change,
            f"{row['bits_per_byte']:.4f}", f"{row['recall']:.3f}", f"{row['step_ms']:,.1f}", peak,
        )  # fmt: skip
    return shown


def branch_table(found: dict[str, dict[str, Any]]) -> Table | None:
    """Loss and recall with one branch shut; None where no variant has branches."""
    rows = {name: row["without"] for name, row in found.items() if row.get("without")}
    if not rows:
        return None
    shown = Table(title="bits/byte and recall with one branch shut")
    shown.add_column("variant")
    for branch in BRANCHES:
        shown.add_column(f"without {branch}", justify="right")
    for name, without in rows.items():
        cells = (f"{x['bits_per_byte']:.3f} {x['recall']:.3f}" for x in without.values())
        shown.add_row(VARIANTS[name].text, *cells)
    return shown


def breakdown_table(found: dict[str, dict[str, Any]]) -> Table | None:
    """Device time of a step by operator; None where nothing was profiled."""
    rows = {name: row["breakdown"] for name, row in found.items() if row.get("breakdown")}
    if not rows:
        return None
    shown = Table(title="Device milliseconds of one step")
    shown.add_column("operator")
    for name in rows:
        shown.add_column(VARIANTS[name].text, justify="right")
    for operator in dict.fromkeys(operator for row in rows.values() for operator in row):
        cells = (f"{row[operator]:.2f}" if operator in row else "" for row in rows.values())
        shown.add_row(operator, *cells)
    shown.add_row("all", *(f"{sum(row.values()):.2f}" for row in rows.values()))
    return shown


def plot(found: dict[str, dict[str, Any]], path: Path, console: Console) -> None:
    """The training losses, smoothed, as a PNG; says so where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        console.print("no plot: matplotlib is not installed (pip install 'nsa-compile[plot]')")
        return
    trained = {name: row["losses"] for name, row in found.items() if row["losses"]}
    if not trained:
        return
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    panel = figure.subplots()
    for name, losses in trained.items():
        first = found.get(VARIANTS[name].start or "", {}).get("steps", 0)
        steps = [first + step for step in range(len(losses))]
        panel.plot(steps, _smooth(losses), label=VARIANTS[name].text)
    panel.set(xlabel="step", ylabel="training loss, bits a byte")
    panel.legend()
    figure.savefig(path, dpi=120)
    console.print(f"losses plotted in {path}")


def _smooth(losses: list[float], keep: float = 0.95) -> list[float]:
    """Bits, as an exponential mean that knows how many steps it has seen."""
    smooth, total, weight = [], 0.0, 0.0
    for loss in losses:
        total, weight = keep * total + (1 - keep) * loss, keep * weight + (1 - keep)
        smooth.append(total / weight / math.log(2))
    return smooth
