"""nsa-convert on graphs that were captured before: exported programs and pickled GraphModules."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from torch import fx, nn

from tests.cli.models import Model, ids
from tests.cli.running import Runner, convert

__all__ = ["convert"]
CONVERTED = [(f"layers.{i}", "converted", None) for i in range(2)]


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)

    def forward(self, ids):  # a traced annotation that is text cannot be pickled
        q = self.embed(ids).unsqueeze(1)
        return nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return exec, ("raise RuntimeError('the pickle ran code')",)


def exported(path: Path, **options: object) -> Path:
    program = torch.export.export(Model().eval(), (ids(2),), **options)
    torch.export.save(program, path)
    return path


def test_an_exported_program_is_read_as_it_is(convert: Runner, tmp_path: Path) -> None:
    outcome = convert(exported(tmp_path / "tiny.pt2"), "--option", "dense_len=0")
    assert outcome.status == 0, outcome.err
    assert outcome.verdicts() == CONVERTED
    assert outcome.json["model"] == "tiny"
    site = outcome.site()
    # The mask is a buffer whose values the program holds.
    assert (site["mask"], site["batch"], site["kv_len"]) == ("causal", 2, 48)
    assert site["source"].endswith("models.py:24")


def test_an_exported_program_may_have_symbolic_sizes(convert: Runner, tmp_path: Path) -> None:
    auto = torch.export.Dim.AUTO
    outcome = convert(exported(tmp_path / "tiny.pt2", dynamic_shapes=({0: auto, 1: auto},)))
    assert outcome.verdicts() == CONVERTED
    assert isinstance(outcome.site()["kv_len"], str)


def test_a_pickled_graph_is_captured_again(convert: Runner, tmp_path: Path) -> None:
    path = tmp_path / "graph.pt"
    torch.save(fx.symbolic_trace(Plain()), path)
    outcome = convert(path)
    assert outcome.status == 2
    assert "can run any code" in outcome.err
    outcome = convert(path, "--trust", "--seq-len", 20)
    assert outcome.status == 0, outcome.err
    assert [(s["decision"], s["mask"]) for s in outcome.json["sites"]] == [("converted", "causal")]
    outcome = convert(path, "--trust", "--inputs", "int64[1,T=30]")
    assert outcome.status == 0, outcome.err
    assert isinstance(outcome.site()["kv_len"], str)


def test_only_a_graph_module_is_taken_from_a_pickle(convert: Runner, tmp_path: Path) -> None:
    path = tmp_path / "module.pt"
    torch.save(nn.Linear(2, 2), path)
    outcome = convert(path, "--trust")
    assert (outcome.status, outcome.err) == (
        2,
        f"nsa-convert: error: {path}: expected a pickled torch.fx.GraphModule, got Linear\n",
    )


@pytest.mark.parametrize("suffix", ["pt", "pkl"])
def test_nothing_runs_without_trust(convert: Runner, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"bomb.{suffix}"
    torch.save(Bomb(), path)
    assert "the pickle ran code" not in convert(path).err
    assert "the pickle ran code" in convert(path, "--trust").err


def test_a_pickle_inside_an_exported_program_is_not_run_without_trust(
    convert: Runner, tmp_path: Path
) -> None:
    path, bad = exported(tmp_path / "tiny.pt2"), tmp_path / "bad.pt2"
    bomb = tmp_path / "bomb"
    torch.save(Bomb(), bomb)
    with zipfile.ZipFile(path) as good, zipfile.ZipFile(bad, "w") as out:
        samples = [name for name in good.namelist() if "sample_inputs" in name]
        assert samples
        for name in good.namelist():
            out.writestr(name, bomb.read_bytes() if name in samples else good.read(name))
    outcome = convert(bad)
    assert outcome.status == 2
    assert "the pickle ran code" not in outcome.err
    assert "pass --trust" in outcome.err


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b"scaled_dot_product_attention", b"scaled_dot_product_nothing", "failed to resolve torch"),
        (
            b'"schema_version": {"major": ',
            b'"schema_version": {"major": 99',
            "does not match our c",
        ),
    ],
    ids=["an operator nobody knows", "a later schema"],
)
def test_a_program_of_another_version_is_refused_in_one_line(
    convert: Runner, tmp_path: Path, old: bytes, new: bytes, words: str
) -> None:
    path, other = exported(tmp_path / "tiny.pt2"), tmp_path / "other.pt2"
    with zipfile.ZipFile(path) as good, zipfile.ZipFile(other, "w") as out:
        for name in good.namelist():
            out.writestr(name, good.read(name).replace(old, new))
        assert any(old in good.read(name) for name in good.namelist())
    outcome = convert(other)
    assert outcome.status == 2
    assert outcome.err.count("\n") == 1, outcome.err
    assert words in outcome.err
    assert "--trust" not in outcome.err


@pytest.mark.parametrize(
    "content", [b"", b"text", b"PK\x05\x06" + b"\0" * 18], ids=["empty", "text", "empty archive"]
)
def test_a_corrupt_program(convert: Runner, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.pt2"
    path.write_bytes(content)
    outcome = convert(path)
    assert outcome.status == 2
    assert outcome.err.startswith(f"nsa-convert: error: {path}")
    assert outcome.err.count("\n") == 1


def test_a_truncated_program(convert: Runner, tmp_path: Path) -> None:
    path = exported(tmp_path / "tiny.pt2")
    path.write_bytes(path.read_bytes()[:-2000])
    outcome = convert(path)
    assert outcome.status == 2
    assert outcome.err.count("\n") == 1
