"""docs/training.md says what the files of the training runs say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "training.md").read_text(encoding="utf-8")
ONE_LINE = PAGE.replace(" \\\n       ", "")  # commands that go on on the next line


def load(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((DOCS / "results" / f"{name}.json").read_text())
    return document


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


@pytest.mark.parametrize("name", ["training-8k", "training-32k", "training-8k-channels"])
def test_the_rows_of_the_tables_come_from_the_file(name: str) -> None:
    document = load(name)
    assert document["command"] in ONE_LINE
    dense = document["variants"]["dense"]["loss"]
    for row in document["variants"].values():
        change = "" if row["loss"] == dense else f"{row['loss'] / dense - 1:+.1%} "
        cells = (
            f"| {row['loss']:.4f} | {change}| {row['bits_per_byte']:.4f} | {row['recall']:.3f} |"
        )
        if name != "training-8k-channels":  # which has no times
            cells += f" {number(row['step_ms'], '.1f')} | {number(row['peak_mib'], ',.0f')} |"
        assert cells in PAGE


def test_gates_with_channels_retrieve() -> None:
    for row in load("training-8k-channels")["variants"].values():
        assert row["recall"] > 0.99


def test_the_conversions_at_32k_come_from_the_file() -> None:
    for row in load("training-32k-channels")["converted"]:
        assert f"| {row['loss']:.4f} | {row['recall']:.3f} |" in PAGE


def test_the_losses_at_8k_are_near_the_dense_one_and_the_dense_model_retrieves() -> None:
    variants = load("training-8k")["variants"]
    dense = variants["dense"]["loss"]
    assert variants["dense"]["recall"] > 0.9
    assert min(variants[name]["steps"] for name in ("dense", "nsa")) >= 1000
    for name, most in (("nsa", 1.01), ("converted", 1.02), ("tuned", 1.005)):
        assert variants[name]["loss"] / dense < most


def test_a_step_at_32k_is_faster_than_the_dense_one() -> None:
    variants = load("training-32k")["variants"]
    ratio = variants["nsa"]["step_ms"] / variants["dense"]["step_ms"]
    assert f"takes {ratio:.2f} of the dense step" in PAGE
    spent = variants["nsa"]["breakdown"]
    assert min(spent.values()) > 0
    assert f"| {sum(spent.values()):.1f} |" in PAGE
