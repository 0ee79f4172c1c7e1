"""Two runs write the same files, byte for byte, whatever Python's hash seed is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.cli.running import MODELS

ROOT = Path(__file__).parents[2]


def run(seed: str, folder: Path) -> dict[str, bytes]:
    folder.mkdir()
    command = [
        sys.executable, "-m", "nsa_compile.cli", f"{MODELS}:breaks",
        "--json", folder / "report.json", "--markdown", folder / "report.md",
        "--html", folder / "report.html", "--graph", folder,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, check=True)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    written = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    return {"output": done.stdout, "notes": done.stderr, **written}


def test_two_runs(tmp_path: Path) -> None:
    first, second = run("1", tmp_path / "first"), run("2", tmp_path / "second")
    assert list(first) == list(second)
    for name, content in first.items():
        assert content == second[name], name
