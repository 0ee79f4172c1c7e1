"""docs/training.md says what the files of the training runs say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "training.md").read_text(encoding="utf-8")


def load(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((DOCS / "results" / f"{name}.json").read_text())
    return document


@pytest.mark.parametrize("name", ["training-8k", "training-32k"])
def test_the_rows_of_the_tables_come_from_the_file(name: str) -> None:
    document = load(name)
    assert document["command"] in PAGE
    dense = document["variants"]["dense"]["loss"]
    for row in document["variants"].values():
        change = "" if row["loss"] == dense else f"{row['loss'] / dense - 1:+.1%} "
        assert (
            f"| {row['loss']:.4f} | {change}| {row['bits_per_byte']:.4f} | {row['recall']:.3f} "
            f"| {row['step_ms']:.1f} | {row['peak_mib']:,.0f} |"
        ) in PAGE


def test_the_earlier_run_is_quoted_as_it_was() -> None:
    variants = load("training-8k-3000")["variants"]
    assert variants["dense"]["steps"] == variants["nsa"]["steps"] == 3000
    for row in variants.values():
        assert f"{row['loss']:.4f}" in PAGE
    assert variants["nsa"]["loss"] / variants["dense"]["loss"] < 1.01


def test_a_step_at_32k_is_faster_than_the_dense_one() -> None:
    variants = load("training-32k")["variants"]
    ratio = variants["nsa"]["step_ms"] / variants["dense"]["step_ms"]
    assert f"takes {ratio:.2f} of the dense step" in PAGE
    assert f"{sum(variants['nsa']['breakdown'].values()):.1f}" in PAGE
