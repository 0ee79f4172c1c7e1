"""--diff and --explain: what changed between two reports, and the story of one layer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nsa_compile.passes.reasons import Reason
from nsa_compile.report import RewriteReport
from nsa_compile.report.diff import ReportFileError, difference, read_report
from nsa_compile.report.story import chosen, label, story
from tests.report.sample import kept, make_record, sample_report


def lines(before: RewriteReport, after: RewriteReport) -> list[str]:
    return difference(before.to_dict(), after.to_dict()).splitlines()


def test_equal_reports_do_not_differ() -> None:
    assert lines(sample_report(), sample_report()) == [
        "LlamaForCausalLM: 12 of 15 converted -> LlamaForCausalLM: 12 of 15 converted",
        "0 of 15 layers differ",
    ]


def test_layers_that_are_new_gone_and_changed() -> None:
    before = RewriteReport("M", [make_record("a"), make_record("b"), make_record("c")], ["x"])
    after = RewriteReport(
        "M",
        [
            kept("a", Reason.DROPOUT, "dropout_p=0.1"),
            make_record("b", config={"num_selected": 64, "dense_len": 0}),
            make_record("d"),
            make_record("d", ordinal=1),
        ],
        ["y"],
    )
    assert lines(before, after) == [
        "M: 3 of 3 converted -> M: 3 of 4 converted",
        "~ a: converted -> kept (dropout)",
        "    decision: converted -> kept",
        "    reason: null -> dropout",
        "    reason_text: null -> attention dropout is active: dropout_p=0.1",
        '    config: {"num_selected": 64, "dense_len": 8192} -> null',
        "    flops_sparse: 8650000000000 -> null",
        "~ b: converted",
        "    config: dense_len 8192 -> 0",
        "- c: converted",
        "+ d: converted",
        "+ d #2: converted",
        "5 of 5 layers differ",
        "failure is gone: x",
        "new failure: y",
    ]


def test_a_layer_with_two_verdicts_is_compared_verdict_by_verdict() -> None:
    report = RewriteReport("M", [make_record("a"), kept("a", Reason.DECODE_STEP, "")])
    assert lines(report, RewriteReport("M", [make_record("a")]))[1:] == [
        "- a (verdict 2): kept (decode_step)",
        "1 of 2 layers differ",
    ]


BAD = {
    "no json": ("{", "expected a report as JSON"),
    "not utf-8": (b"\xff\xfe", "expected a report as JSON"),
    "deep": ("[" * 100_000, "expected a report as JSON"),
    "a list": ("[]", "expected a report with schema_version 1, got None"),
    "a later version": ('{"schema_version": 2}', "expected a report with schema_version 1, got 2"),
    "no sites": ('{"schema_version": 1}', "expected 'sites' with module, ordinal"),
    "odd sites": ('{"schema_version": 1, "sites": [3]}', "expected 'sites' with module, ordinal"),
    "odd failures": (
        '{"schema_version": 1, "sites": [], "failures": [1]}',
        "expected 'failures' to be texts",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_files_that_are_no_reports(tmp_path: Path, case: str) -> None:
    content, message = BAD[case]
    path = tmp_path / "report.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ReportFileError, match=message):
        read_report(path)


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(sample_report().to_json())
    assert read_report(path) == json.loads(sample_report().to_json())


def test_layers_are_chosen_by_label_path_and_glob() -> None:
    sites = [make_record("a.0"), make_record("a.0", ordinal=1), make_record("a.1"), make_record("")]
    assert [label(site) for site in chosen(sites, "a.0")] == ["a.0", "a.0 #2"]
    assert [label(site) for site in chosen(sites, "a.0 #2")] == ["a.0 #2"]
    assert [label(site) for site in chosen(sites, "a.?")] == ["a.0", "a.1"]
    assert [label(site) for site in chosen(sites, "(no module path)")] == ["(no module path)"]
    with pytest.raises(LookupError, match=r"did you mean 'a\.1'"):
        chosen(sites, "a.3")


def test_the_story_of_a_layer_without_evidence_says_what_is_known() -> None:
    text = story(kept("a", Reason.DROPOUT, "dropout_p=0.1"))
    assert text.startswith("a: kept\n")
    assert "attention dropout is active: dropout_p=0.1" in text
