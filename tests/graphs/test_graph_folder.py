"""--graph: which files it writes, what they say, and that Graphviz takes them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from nsa_compile.cli import main
from tests import golden
from tests.cli.running import MODELS

GOLDEN = Path(__file__).parent / "golden"
CHECKPOINTED = """
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

class Layer(nn.Module):
    def forward(self, x):
        q = x[:, None]
        y = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        return x + y[:, 0]

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return x

def build():
    return Model(), torch.randn(1, 64, 16, requires_grad=True)
"""
REWRITE = ["2-rewrite.after", "2-rewrite.before"]


def written(folder: Path, target: object, *options: str) -> dict[str, str]:
    """Contents by path below ``folder``."""
    assert main([str(target), "--graph", str(folder), *options]) == 0
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


def code(text: str) -> str:
    """Without the comments, which quote the model."""
    return re.sub("#.*", "", text)


def names(graph: str, passes: list[str]) -> list[str]:
    return [f"{graph}/{name}.{suffix}" for name in passes for suffix in ("dot", "txt")]


def test_a_graph_before_and_after_in_both_forms(tmp_path: Path) -> None:
    files = written(tmp_path / "graphs", MODELS)
    assert list(files) == names("graph-0-0", REWRITE)
    before, after = (code(files[f"graph-0-0/2-rewrite.{when}.txt"]) for when in ("before", "after"))
    assert before.count("scaled_dot_product_attention(q") == 2
    assert after.count("torch.ops.nsa.selected_attention") == 2
    assert "scaled_dot_product_attention(q" not in after


@pytest.mark.skipif(torch.__version__ < "2.13", reason="older Dynamo names nodes otherwise")
@pytest.mark.parametrize("when", ["before", "after"])
def test_the_drawing_word_for_word(tmp_path: Path, when: str) -> None:
    drawn = written(tmp_path, MODELS)[f"graph-0-0/2-rewrite.{when}.dot"]
    golden.check(GOLDEN / f"{when}.dot", drawn)


def test_every_graph_has_a_folder(tmp_path: Path) -> None:
    files = written(tmp_path, f"{MODELS}:breaks")
    folders = sorted({name.split("/")[0] for name in files})
    assert len(folders) > 1
    assert [name for folder in folders for name in names(folder, REWRITE)] == list(files)


def test_two_runs_write_the_same_over_each_other(tmp_path: Path) -> None:
    assert written(tmp_path, MODELS) == written(tmp_path, MODELS)


def test_what_is_kept_stays_and_is_drawn_with_its_reason(tmp_path: Path) -> None:
    files = written(tmp_path, f"{MODELS}:random_mask")
    before, after = (files[f"graph-0-0/2-rewrite.{when}.txt"] for when in ("before", "after"))
    assert before == after
    assert r"\nmask_not_understood" in files["graph-0-0/2-rewrite.before.dot"]


def test_bodies_are_read_written_out_and_drawn_as_clusters(tmp_path: Path) -> None:
    script = tmp_path / "model.py"
    script.write_text(CHECKPOINTED)
    files = written(tmp_path / "graphs", script, "--train")
    assert list(files) == names("graph-0-0", ["1-read.after", "1-read.before", *REWRITE])
    read = code(files["graph-0-0/1-read.after.txt"])
    assert read.count("scaled_dot_product_attention(q") == 2
    assert "checkpoint" not in read
    drawn = files["graph-0-0/2-rewrite.after.dot"]
    assert "subgraph cluster_" in drawn
    assert "nsa::selected_attention" in drawn


@pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz is not installed")
@pytest.mark.parametrize("target", [str(MODELS), "checkpointed"])
def test_graphviz_takes_it(tmp_path: Path, target: str) -> None:
    if target == "checkpointed":
        target = str(tmp_path / "model.py")
        Path(target).write_text(CHECKPOINTED)
    for name, text in written(tmp_path / "graphs", target).items():
        if name.endswith(".dot"):
            done = subprocess.run(["dot", "-Tsvg"], input=text, capture_output=True, text=True)
            assert (done.returncode, done.stderr) == (0, ""), name


def test_a_folder_that_cannot_be_written(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert main([str(MODELS), "--graph", str(tmp_path / "graphs")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("nsa-convert: error: ")
    assert "2-rewrite.before: cannot be written: Permission denied" in err
    assert err.count("\n") == 1
