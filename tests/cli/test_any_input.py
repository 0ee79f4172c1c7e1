"""No target, option or file makes nsa-convert die with a traceback: hypothesis looks for one."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nsa_compile.cli import main
from tests.cli.running import MODELS
from tests.cli.test_huggingface_targets import LLAMA

FLAGS = ("--seq-len", "--batch", "--inputs", "--option", "--attn", "--hf-config", "--fail-on",
         "--explain", "--lengths", "--diff", "--completion", "--graph", "--save", "--data",
         "--tolerance", "--device", "--json", "--markdown", "--html")  # fmt: skip
SWITCHES = (
    "--train",
    "--strict",
    "--bench",
    "--verify",
    "--trust",
    "--version",
    "--help",
    "--",
    "-",
    "--no-such",
)
# Without path separators: what is written stays in the test's folder.
WORDS = st.text(st.characters(exclude_characters="/\\"), max_size=12)
PIECES = ("=", ":", "[", "]", ",", "T", "B", "int64", "bool", "window", "num_selected", "merge",
          "dropout", "excluded", "sdpa", "layers.0", "1", "-1", "0", "9" * 25, "nan", "1e400",
          "None", "{", "}", '"', "*", "\0", "\ud800", "per_layer", "{'*': 3}", "[[",
          ".py")  # fmt: skip
TEXTS = WORDS | st.lists(st.sampled_from(PIECES), max_size=6).map("".join)
TARGETS = st.one_of(
    TEXTS,
    st.sampled_from([str(MODELS), f"{MODELS}:breaks", f"{MODELS}:convolution", ".", "/", "llama"]),
    TEXTS.map(lambda text: f"{MODELS}:{text}"),
    TEXTS.map(lambda text: f"no_such_module_{text}:build"),
)
OPTIONS = st.lists(
    st.tuples(st.sampled_from(FLAGS), TEXTS) | st.tuples(st.sampled_from(SWITCHES)), max_size=4
)
# Numbers stay small: a configuration may well describe a model that takes an hour to build.
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)
SLOW = settings(
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def run(argv: list[str]) -> None:
    """The status is one of the documented ones, and only a failure without report says why."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(argv)
    assert status in (0, 1, 2), (argv, status)
    assert "Traceback" not in out.getvalue() + err.getvalue()
    if status == 2:
        assert err.getvalue().splitlines()[-1].startswith("nsa-convert: error: "), err.getvalue()


@settings(SLOW, max_examples=150)
@given(TARGETS, OPTIONS)
def test_any_target_with_any_options(target: str, options: list[tuple[str, ...]]) -> None:
    run([target, *(word for option in options for word in option)])


@settings(SLOW, max_examples=40)
@given(st.dictionaries(st.sampled_from(sorted(LLAMA)) | WORDS, VALUES, max_size=3))
def test_any_configuration(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**LLAMA, "num_hidden_layers": 1, **changes}))
    run([str(path), "--seq-len", "8"])


@settings(SLOW, max_examples=60)
@given(
    st.sampled_from(["config.json", "model.pt2", "graph.pt", "model.py", "other.bin"]),
    st.binary(max_size=60) | VALUES.map(lambda value: json.dumps(value).encode()),
)
def test_any_file(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    if name.endswith(".py"):  # what it does is its own affair, so let it do nothing
        content = b"# " + content.replace(b"\n", b" ").replace(b"\r", b" ")
    path.write_bytes(content)
    run([str(path)])


@settings(SLOW, max_examples=60)
@given(VALUES, st.lists(st.dictionaries(st.sampled_from(["module", "ordinal", "decision", "reason",
       "mask", "flops_dense", "flops_sparse", "config"]), VALUES), max_size=2))  # fmt: skip
def test_any_report_to_compare(
    tmp_path: Path, failures: object, sites: list[dict[str, object]]
) -> None:
    path = tmp_path / "report.json"
    default = dict.fromkeys(("decision", "reason", "mask", "flops_dense", "flops_sparse"))
    sites = [{**default, "module": "a", "ordinal": 0, **site} for site in sites]
    path.write_text(json.dumps({"schema_version": 1, "sites": sites, "failures": failures}))
    run(["--diff", str(path), str(path)])
