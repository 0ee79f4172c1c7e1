"""nsa_compile.explain: the report of a call without compiling, and what torch's logs are told."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nsa_compile
from tests.cli.models import Model, ReadsValues, ids

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def rows(report: nsa_compile.RewriteReport) -> list[dict[str, Any]]:
    """The sites, without the compile ids: explain counts from 0."""
    return [{**site, "compile_ids": None} for site in report.to_dict()["sites"]]


@pytest.mark.parametrize("options", [None, {"dense_len": 0, "exclude": ["layers.1"]}])
def test_it_says_what_compiling_does(options: dict[str, Any] | None) -> None:
    model, x = Model(), ids()
    explained = nsa_compile.explain(model, x, options=options)
    fast = torch.compile(model, backend="nsa", options={**(options or {}), "inner": "eager"})
    fast(x)
    assert rows(explained) == rows(nsa_compile.report(fast))
    assert explained.model == "Model"


def test_the_model_is_left_as_it_is() -> None:
    model, x = Model(), ids()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model(x)
    nsa_compile.explain(model, ids=x)
    assert model.training
    assert torch.equal(model(x), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_functions_and_compiled_modules_are_explained_too() -> None:
    def attend(x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)

    report = nsa_compile.explain(attend, torch.randn(1, 2, 12, 8))
    assert report.model.endswith("attend")
    assert [site.mask for site in report.sites] == ["causal"]
    assert len(nsa_compile.explain(torch.compile(Model()), ids()).converted) == 2


def test_a_forward_that_reads_values_runs_to_its_end() -> None:
    assert len(nsa_compile.explain(ReadsValues(), ids()).sites) == 2


def test_the_models_own_error_and_wrong_options_are_raised() -> None:
    class Fails(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        nsa_compile.explain(Fails(), torch.ones(1))
    with pytest.raises(nsa_compile.NSAConfigError, match="num_selected"):
        nsa_compile.explain(Model(), ids(), options={"num_select": 3})


COMPILE = """
import nsa_compile
import torch
from tests.cli.models import Model, ids
torch.compile(Model(), backend="nsa", options={"inner": "eager", "exclude": ["layers.1"]})(ids())
"""


def compile_with(**environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, check=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip
    return done.stderr


def test_a_trace_holds_the_report(tmp_path: Path) -> None:
    compile_with(TORCH_TRACE=str(tmp_path))
    (log,) = tmp_path.iterdir()
    artifacts, name = {}, ""
    for line in log.read_text().splitlines():
        if line.startswith("\t") and name:
            artifacts[name] = artifacts.get(name, "") + line[1:] + "\n"
        else:
            found = re.search(r'{"artifact": {"name": "(\w+)"', line)
            name = found[1] if found else ""
    report = json.loads(artifacts["nsa_report"])
    assert [(site["module"], site["reason"]) for site in report["sites"]] == [
        ("layers.0", None),
        ("layers.1", "excluded"),
    ]
    assert "1 of 2 attention layers converted" in artifacts["nsa_report_table"]


@pytest.mark.parametrize(
    ("level", "told"), [("graph_breaks", []), ("nsa_compile", [0]), ("+nsa_compile", [0, 1, 2])]
)
def test_torch_logs_decides_how_much_is_told(level: str, told: list[int]) -> None:
    text = compile_with(TORCH_LOGS=level)
    lines = ("1 of 2 attention layers converted", "layers.1: kept", "refused      filters")
    assert [at for at, line in enumerate(lines) if line in text] == told
