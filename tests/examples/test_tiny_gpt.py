"""The example trains, converts and reports, at sizes that take seconds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_trains_dense_and_converted_and_prints_both() -> None:
    command = [
        sys.executable, "examples/tiny_gpt.py", "--steps", "4", "--context", "512", "--batch", "1",
        "--device", "cpu", "--inner", "aot_eager",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=_environment())
    assert done.returncode == 0, done.stderr
    before = re.search(r"after 4 dense steps +([\d.]+) +([\d.]+)", done.stdout)
    after = re.search(r"after 2 more steps, each its own +([\d.]+) +([\d.]+)", done.stdout)
    assert before is not None
    assert after is not None
    for dense, sparse in (before.groups(), after.groups()):
        assert abs(float(dense) - float(sparse)) < 0.1
    assert float(after[2]) < float(before[2]) < 8.0
    assert "4 of 4 attention layers converted" in done.stdout
    (shown,) = re.findall(r"^```text\n(held-out.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert without_digits(shown) in without_digits(done.stdout)


def without_digits(text: str) -> str:
    """The words of a text: README shows a longer run."""
    return " ".join(re.sub(r"\d[\d.]*", "0", text).split())


def _environment() -> dict[str, str]:
    """This environment, with the checkout importable where the package is not installed."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
