"""Golden outputs of the report's faces; tests/golden.py says how to renew them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from nsa_compile.report import RewriteReport
from tests import golden
from tests.report.sample import make_record, sample_measured, sample_report, sample_with_evidence

GOLDEN = Path(__file__).parent / "golden"
SAMPLES = {"plain": sample_report, "evidence": sample_with_evidence, "measured": sample_measured}


@pytest.fixture(autouse=True)
def _fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(torch, "__version__", "2.13.0")


def check(name: str, text: str) -> None:
    golden.check(GOLDEN / name, text + "\n")


@pytest.mark.parametrize("name", SAMPLES)
def test_golden(name: str) -> None:
    report = SAMPLES[name]()
    check(f"{name}.txt", str(report))
    check(f"{name}.md", report.to_markdown())
    check(f"{name}.json", report.to_json())
    check(f"{name}.html", report.to_html())


def test_printed_by_rich_the_table_has_colours_and_the_same_words() -> None:
    out = io.StringIO()
    Console(file=out, width=100, force_terminal=True, color_system="standard").print(
        sample_report()
    )
    assert "\x1b[" in out.getvalue()
    assert "mask_not_understood" in out.getvalue()


def test_no_line_of_the_text_is_wider_than_asked() -> None:
    assert max(map(len, str(sample_report()).splitlines())) <= 100


def test_square_brackets_are_not_taken_for_markup() -> None:
    report = RewriteReport("Model[int]", [make_record("layers.[red].attn")], ["a [bold] failure"])
    for words in ("Model[int]", "layers.[red].attn", "a [bold] failure"):
        assert words in str(report)


def test_a_pipe_does_not_break_the_markdown_table() -> None:
    text = RewriteReport("M", [make_record("a|b")]).to_markdown()
    assert "a\\|b" in text


def test_no_attention_is_said_plainly() -> None:
    assert str(RewriteReport("Conv")) == "Conv: no attention found: there is nothing to convert"
    assert "No attention found" in RewriteReport("Conv").to_markdown()


def test_nothing_seen_because_of_a_failure_is_not_called_no_attention() -> None:
    text = str(RewriteReport("M", [], ["it broke"]))
    assert "no attention layer was seen" in text
    assert "it broke" in text


def test_converted_and_skipped_part_the_sites() -> None:
    report = sample_report()
    assert len(report.converted) + len(report.skipped) == len(report.sites) == 15
    assert {site.reason for site in report.skipped} == {"mask_not_understood", "dropout"}


def test_the_json_is_the_contract() -> None:
    content = json.loads(sample_report().to_json())
    assert content["schema_version"] == 1
    assert {"model", "torch", "sites", "failures"} <= set(content)
    assert set(content["sites"][0]) >= {
        "module", "module_class", "source", "spelling", "decision", "reason", "reason_text", "hint",
        "q_heads", "kv_heads", "head_dim", "value_dim", "q_len", "kv_len", "mask", "scale", "dtype",
        "config", "flops_dense", "flops_sparse", "batch", "ordinal", "compile_ids",
    }  # fmt: skip
