"""Merging the records of several graphs: recompiles, verdict changes, graph breaks, order."""

from __future__ import annotations

from nsa_compile.passes.reasons import Reason
from nsa_compile.report import RewriteReport
from tests.report.sample import kept, make_record


def rows(*records: object) -> list[tuple[str, str, str]]:
    merged = RewriteReport.merge("M", records).sites
    return [(row.module, row.decision, row.compile_id) for row in merged]


def test_a_recompile_with_the_same_verdict_is_one_row_with_the_latest_shapes() -> None:
    report = RewriteReport.merge(
        "M", [make_record(kv_len=100), make_record(kv_len=200, compile_id="0/1")]
    )
    (site,) = report.sites
    assert site.kv_len == 200
    assert report.to_dict()["sites"][0]["compile_ids"] == ["0/0", "0/1"]


def test_another_verdict_is_another_row_beside_its_layer() -> None:
    assert rows(
        make_record("a"),
        make_record("b"),
        kept("a", Reason.DECODE_STEP, "", compile_id="0/1"),
        make_record("b", compile_id="0/1"),
    ) == [("a", "converted", "0/0"), ("a", "kept", "0/1"), ("b", "converted", "0/0, 0/1")]


def test_another_reason_is_another_row() -> None:
    first = kept("a", Reason.DECODE_STEP, "")
    assert len(rows(first, kept("a", Reason.DROPOUT, "", compile_id="0/1"))) == 2


def test_frames_stay_apart_and_are_ordered_by_number() -> None:
    assert rows(
        make_record("", compile_id="10/0"),
        make_record("", compile_id="2/0"),
        make_record("", compile_id="2/1"),
    ) == [("", "converted", "2/0, 2/1"), ("", "converted", "10/0")]


def test_two_sites_of_one_module_stay_apart_in_graph_order() -> None:
    sites = RewriteReport.merge(
        "M", [make_record("z"), make_record("a"), make_record("a", ordinal=1)]
    )
    assert [(site.module, site.ordinal) for site in sites.sites] == [("z", 0), ("a", 0), ("a", 1)]


def test_the_same_failure_is_told_once() -> None:
    assert RewriteReport.merge("M", [], ["x", "y", "x"]).failures == ["x", "y"]


def test_records_without_a_compile_id_are_kept() -> None:
    assert rows(make_record(compile_id="")) == [("layers.0.attn", "converted", "")]
