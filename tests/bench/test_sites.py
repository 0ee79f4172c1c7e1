"""Measuring a report's own layers: which, how often, and what is left out and said."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nsa_compile.bench import sites
from nsa_compile.bench.sites import measure_sites, shape_of
from nsa_compile.passes.config import NSAConfig
from nsa_compile.passes.reasons import Reason
from nsa_compile.report import RewriteReport
from tests.report.sample import kept, make_record

SIZES = {
    "q_heads": 2, "kv_heads": 1, "head_dim": 16, "value_dim": 16, "q_len": 256, "kv_len": 256,
    "dtype": "float32", "flops_dense": 100, "flops_sparse": 40,
}  # fmt: skip
CONFIG = {"select_block": 16, "query_tile": 16, "num_selected": 4, "window": 16, "dense_len": 100}


def site(module: str, options: dict[str, Any] = CONFIG, **changes: Any) -> Any:
    config = NSAConfig.from_options(options).sizes()
    return make_record(module, **{**SIZES, "config": config, "extra": {}, **changes})


def dense_site(module: str, **changes: Any) -> Any:
    sizes = {name: value for name, value in SIZES.items() if name != "flops_sparse"}
    return kept(module, Reason.DROPOUT, "", **{**sizes, "extra": {}, **changes})


def costs_at(*lengths: int) -> list[dict[str, int]]:
    row = dict.fromkeys(("bytes_dense", "bytes_sparse", "memory_dense", "memory_sparse"), 1)
    return [{"length": length, "flops_dense": 9, "flops_sparse": 5, **row} for length in lengths]


def measured(
    *records: Any, lengths: list[int] | None = None, **given: Any
) -> tuple[Any, list[str]]:
    report, steps = RewriteReport("M", list(records)), []
    measure_sites(report, lengths, steps.append, budget_ms=1, **given)
    return report, steps


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_layers_of_one_shape_are_measured_once() -> None:
    report, steps = measured(site("a"), site("b"), dense_site("c"), site("d", dtype="bfloat16"))
    assert steps == [
        "measuring 2/1 heads x 16, float32, causal at 256 tokens",
        "measuring 2/1 heads x 16, float32, causal at 256 tokens",
        "measuring 2/1 heads x 16, bfloat16, causal at 256 tokens",
    ]
    a, b, c, d = (each.extra["measured"] for each in report.sites)
    assert a == b
    assert a != d
    (row,) = a
    assert row["length"] == 256
    assert not row["is_dense"]
    assert row["converted_forward_ms"] == row["sparse_forward_ms"]
    assert all(0 < low <= high for _, low, high in [row["dense_forward_ms"]])
    assert row["dense_backward_ms"] is None
    assert c[0]["converted_forward_ms"] is None
    assert report.bench["left_out"] == []


def test_the_sums_hold_predicted_flops_beside_measured_times() -> None:
    report, _ = measured(site("a"), site("b"), dense_site("c"))
    (total,) = report.bench["rows"]
    assert (total["length"], total["layers"]) == (256, 3)
    assert (total["flops_dense"], total["flops_sparse"]) == (300, 180)
    rows = [each.extra["measured"][0] for each in report.sites]
    assert total["dense_forward_ms"] == sum(row["dense_forward_ms"][0] for row in rows)
    assert total["converted_forward_ms"] == pytest.approx(
        2 * rows[0]["converted_forward_ms"][0] + rows[2]["dense_forward_ms"][0]
    )


def test_chosen_lengths_and_backward() -> None:
    extra = {"costs": costs_at(64, 128), "predicted_break_even": None}
    report, _ = measured(site("a", extra=extra), lengths=[64, 128], backward=True)
    short, long = report.sites[0].extra["measured"]
    assert (short["is_dense"], long["is_dense"]) == (True, False)
    assert short["sparse_forward_ms"] != short["converted_forward_ms"]
    assert long["converted_backward_ms"][0] > 0
    assert [row["flops_sparse"] for row in report.bench["rows"]] == [5, 5]
    assert [row["is_dense"] for row in report.bench["rows"]] == [True, False]
    assert "backward, measured" in str(report)


def test_by_default_the_own_length_and_shorter_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sites, "LENGTHS", (64, 128, 512))
    extra = {"costs": costs_at(64, 128), "predicted_break_even": None}
    report, _ = measured(site("a", extra=extra))
    assert [row["length"] for row in report.sites[0].extra["measured"]] == [64, 128, 256]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"mask": "causal & window(64)"}, "a: SDPA has no argument for its mask (causal & window("),
        ({"mask": "unknown"}, "a: SDPA has no argument for its mask (unknown)"),
        ({"modifiers": "softcap(50.0)"}, "a: SDPA has no argument for softcap(50.0)"),
        ({"q_len": 1}, "a: its queries and keys are not equally many"),
        ({"head_dim": 0}, "a: its sizes are unknown"),
    ],
)
def test_what_is_left_out_is_said(changes: dict[str, Any], why: str) -> None:
    report, steps = measured(site("a", **changes))
    assert steps == []
    assert "measured" not in report.sites[0].extra
    assert len(report.bench["left_out"]) == 1
    assert report.bench["left_out"][0].startswith(why)
    assert f"not measured: {why}" in " ".join(str(report).split())
    assert "Nothing was measured" in report.to_markdown()
    assert "not measured" in report.to_html()


@pytest.mark.parametrize("mask", ["causal & padding", "full", "padding"])
def test_padding_is_left_away(mask: str) -> None:
    shape = shape_of(site("a", mask=mask))
    assert not isinstance(shape, str)
    assert shape.causal == ("causal" in mask)


def test_what_would_take_too_long_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sites, "_probed", lambda *_: 1.0)
    report, _ = measured(site("a"), lengths=[256, 4096])
    assert [row["length"] for row in report.sites[0].extra["measured"]] == [256]
    assert report.bench["left_out"] == [
        "2/1 heads x 16, float32, causal at 4096 tokens: one call of dense attention would take "
        "about 16 s here"
    ]


def test_a_failure_is_said_and_the_rest_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(sites.functional, "nsa_attention", fail)
    report, _ = measured(site("a"), dense_site("b"))
    assert report.bench["left_out"][0].endswith("at 256 tokens: it does not fit into memory")
    assert report.bench["rows"][0]["layers"] == 1


def test_the_gated_form_is_measured_with_gates_at_every_length() -> None:
    options = {
        "merge": "gate",
        "query_tile": 1,
        "num_selected": 4,
        "select_block": 16,
        "window": 16,
    }
    (row,) = measured(site("a", options))[0].sites[0].extra["measured"]
    assert row["is_dense"] is False
    assert row["converted_forward_ms"][0] > 0
