"""README: its Python runs, its pasted report is today's, its tables name what exists."""

from __future__ import annotations

import dataclasses
import re
import shlex
import sys
from ast import literal_eval
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from nsa_compile.bench.document import load
from nsa_compile.bench.settings import PATHS
from nsa_compile.cli import main
from nsa_compile.passes.config import NSAConfig
from tests import golden

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_the_python_blocks_run_in_order(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    module = ModuleType("readme")  # Dynamo looks the module and the source of its code up
    monkeypatch.setitem(sys.modules, "readme", module)
    for number, code in enumerate(blocks("python")):
        file = tmp_path / f"block_{number}.py"
        file.write_text(code)
        exec(compile(code, str(file), "exec"), module.__dict__)
    assert "2 of 2 attention layers converted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("page", "session"),
    [(page, session) for page in PAGES for session in blocks("console", page.read_text("utf-8"))],
)
def test_the_pasted_outputs_are_what_the_commands_print(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, page: Path, session: str
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "100")
    command, *_ = session.partition("\n")
    program, *argv = shlex.split(command.removeprefix("$ "))
    assert program == "nsa-convert"
    assert main(argv) == 0
    golden.check_part(page, session, f"{command}\n{capsys.readouterr().out}")


def test_the_options_table_has_every_option_with_its_default() -> None:
    section = README.split("## Options of the backend")[1].split("\n## ")[0]
    table: dict[str, Any] = {}
    for names, defaults in re.findall(r"^\| (`.*?`) \| (`.*?`) \|", section, re.MULTILINE):
        codes = [re.findall(r"`(.*?)`", cell) for cell in (names, defaults)]
        table |= {name: literal_eval(default) for name, default in zip(*codes, strict=True)}
    config = NSAConfig()
    assert table == {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}


def test_the_command_line_options_are_those_of_the_parser(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main(["--help"])
    help_text = capsys.readouterr().out
    section = README.split("`TARGET` is one of")[1].split("\n## ")[0]
    documented = set(re.findall(r"--[a-z][a-z-]+", section))
    assert documented == set(re.findall(r"--[a-z][a-z-]+", help_text)) - {"--help", "--version"}


def speed() -> str:
    """README's table of ratios, from the files of docs/results."""
    found: dict[tuple[int, int, int], str] = {}
    for name in ("h100-32-channels", "h100-64k", "h100-128k"):
        settings, _, rows = load(ROOT / "docs" / "results" / f"{name}.json")
        for row in rows:
            if (row.q_heads, row.kv_heads) != (32, 8):
                continue
            kept = settings.config(row.path).channels(settings.dim)
            of = f"{kept} of {settings.dim}" if kept < settings.dim else f"all {kept}"
            path = f"channels, {of}" if row.path == "channels" else row.path
            ratios = (
                "" if each is None else f"{each:.2f}"
                for each in (row.forward_ratio, row.backward_ratio)
            )
            cells = f"{row.length:,}", path, *ratios
            order = row.length, PATHS.index(row.path), kept if row.path == "channels" else 0
            found[order] = f"| {' | '.join(cells)} |"
    lines = ["| tokens | path | forward | backward |", "| ---: | --- | ---: | ---: |"]
    return "\n".join((*lines, *(found[order] for order in sorted(found)))) + "\n"


def test_the_speed_is_what_was_measured() -> None:
    (table,) = re.findall(r"^\| tokens \| path \|.*\n(?:\|.*\n)+", README, re.MULTILINE)
    golden.check_part(ROOT / "README.md", table, speed())


def test_the_links_lead_to_files() -> None:
    for target in re.findall(r"\]\(((?!http)[^)#]+)", README):
        assert (ROOT / target).is_file(), target


def test_the_two_set_up_commands_are_there() -> None:
    commands = "".join(blocks("sh")).splitlines()
    assert commands == [
        "pip install -c constraints.txt . && nsa-convert examples/tiny_gpt.py",
        "pip install -c constraints.txt -e '.[test]' && pytest",
    ]
