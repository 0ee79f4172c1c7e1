"""Run nsa-convert in this process and look at what it wrote."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nsa_compile.cli import main
from tests.report.schema import VALIDATOR

MODELS = Path(__file__).parent / "models.py"


@dataclass
class Outcome:
    status: int
    out: str
    err: str
    json: dict[str, Any] | None

    def site(self, index: int = 0) -> dict[str, Any]:
        assert self.json is not None
        return self.json["sites"][index]

    def verdicts(self) -> list[tuple[str, str, str | None]]:
        assert self.json is not None
        return [(s["module"], s["decision"], s["reason"]) for s in self.json["sites"]]


class Runner:
    """Calls ``main`` with ``--json`` and captures both streams."""

    def __init__(self, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        self.capsys, self.folder = capsys, folder

    def __call__(self, *argv: object) -> Outcome:
        path = self.folder / "report.json"
        path.unlink(missing_ok=True)
        status = main([*map(str, argv), "--json", str(path)])
        streams = self.capsys.readouterr()
        content = json.loads(path.read_text()) if path.exists() else None
        if content is not None:
            VALIDATOR.validate(content)
        assert "Traceback" not in streams.out + streams.err
        return Outcome(status, streams.out, streams.err, content)


@pytest.fixture
def convert(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Runner:
    return Runner(capsys, tmp_path)
