"""Predicted costs of all layers together: sums, the layer that needs most memory, break-even."""

from __future__ import annotations

from typing import Any

from nsa_compile.passes.reasons import Reason
from nsa_compile.passes.site import SiteRecord
from nsa_compile.report import RewriteReport
from nsa_compile.report.costs import break_even, costs, prediction
from tests.report.sample import kept, make_record, sample_report, sample_with_evidence


def test_costs_are_summed_and_memory_is_the_most_of_a_layer() -> None:
    report = sample_with_evidence()
    known = [site.extra["costs"] for site in report.sites if site.extra.get("costs")]
    assert len(known) == 5
    for at, row in enumerate(costs(report.sites)):
        rows = [each[at] for each in known]
        assert {each["length"] for each in rows} == {row.length}
        assert row.flops_dense == sum(each["flops_dense"] for each in rows)
        assert row.bytes_sparse == sum(
            each["bytes_dense"] if each["bytes_sparse"] is None else each["bytes_sparse"]
            for each in rows
        )
        assert row.memory_dense == max(each["memory_dense"] for each in rows)


def make_costs(break_even: int | None) -> dict[str, Any]:
    row = dict.fromkeys(
        ("flops_dense", "flops_sparse", "bytes_dense", "bytes_sparse", "memory_dense",
         "memory_sparse"), 1,
    )  # fmt: skip
    return {"costs": [{"length": 4096, **row}], "predicted_break_even": break_even}


def test_break_even_is_where_the_last_converted_layer_gains() -> None:
    def site(length: int | None, **changes: object) -> SiteRecord:
        return make_record(extra=make_costs(length), **changes)

    assert break_even([site(9000), site(12000), site(None, decision="kept")]) == 12000
    assert break_even([site(9000), site(None)]) is None
    assert "predicted break-even: none" in prediction([site(None)])
    assert "break-even" not in prediction([site(None, decision="kept")])


def test_a_report_without_projections_says_nothing_of_them() -> None:
    report = sample_report()
    assert (costs(report.sites), break_even(report.sites)) == ([], None)
    assert report.to_dict()["costs"] == []
    assert "redicted" not in report.to_markdown()


def test_markdown_has_a_table_and_calls_it_a_prediction() -> None:
    lines = sample_with_evidence().to_markdown().splitlines()
    at = lines.index("| tokens | FLOPs | bytes read and written | attention memory |")
    assert [line.split(" | ")[0] for line in lines[at + 2 : at + 9]] == [
        f"| {1 << power}" for power in range(12, 19)
    ]
    assert "Costs of 5 of 6 layers together, predicted from counts, not measured" in lines[at + 10]


def test_the_table_shows_them_where_something_is_converted() -> None:
    text = str(sample_with_evidence())
    assert "tokens   FLOPs" in text
    assert "Costs of 5 of 6 layers together, predicted from counts, not measured" in text
    dense = RewriteReport("M", [kept("a", Reason.DROPOUT, "", extra=make_costs(None))])
    assert "tokens" not in str(dense)
    assert "| tokens |" in dense.to_markdown()


def test_one_length_is_a_table_without_charts() -> None:
    page = RewriteReport("M", [make_record(extra=make_costs(9000))]).to_html()
    assert "<figure>" not in page
    assert "predicted break-even: 9000 tokens" in page


def test_the_json_fields_are_additions() -> None:
    plain, rich = (RewriteReport.to_dict(make()) for make in (sample_report, sample_with_evidence))
    assert set(plain) == set(rich)
    assert set(rich["sites"][0]) - set(plain["sites"][0]) == {
        "evidence", "costs", "predicted_break_even",
    }  # fmt: skip
