"""What the wheel holds: all of the tree's modules under nsa_compile, and nothing beside it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("nsa_compile", "passes", "kernels")


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from a copy of the tree so that nothing is written beside the sources."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("tree")
    for name in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = (folder / "dist").glob("*.whl")
    return zipfile.ZipFile(wheel)


def test_every_module_is_in_the_wheel_where_it_is_imported_from(contents: zipfile.ZipFile) -> None:
    expected = {"nsa_compile/py.typed"}
    for name in FOLDERS:
        for file in (ROOT / name).rglob("*.*"):
            if file.suffix not in (".py", ".css", ".js"):
                continue
            path = file.relative_to(ROOT).as_posix()
            expected.add(path if name == "nsa_compile" else f"nsa_compile/{path}")
    held = {name for name in contents.namelist() if ".dist-info/" not in name}
    assert held == expected


def test_nothing_else_is_installed_at_the_top(contents: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in contents.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"nsa_compile"}


def test_the_entry_points_and_the_licence_are_there(contents: zipfile.ZipFile) -> None:
    names = contents.namelist()
    (entry_points,) = [name for name in names if name.endswith("entry_points.txt")]
    text = contents.read(entry_points).decode()
    assert "nsa = nsa_compile.backend:nsa" in text
    assert "nsa-convert = nsa_compile.cli:main" in text
    assert any(name.endswith("LICENSE") for name in names)
