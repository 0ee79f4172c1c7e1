"""--bench: measured times beside the predictions in every face, on whatever device there is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.running import MODELS, Runner, convert

__all__ = ["convert"]
SMALL = ("--bench", "--option", "dense_len=40", "--option", "window=16", "--option",
         "num_selected=4", "--option", "query_tile=16", "--option", "select_block=16")  # fmt: skip


def test_times_stand_beside_the_predictions_in_every_face(convert: Runner, tmp_path: Path) -> None:
    page, text = tmp_path / "report.html", tmp_path / "report.md"
    outcome = convert(MODELS, *SMALL, "--lengths", "32,48,64", "--html", page, "--markdown", text)
    assert (outcome.status, outcome.err) == (0, "")
    bench = outcome.json["bench"]
    assert [(row["length"], row["is_dense"]) for row in bench["rows"]] == [
        (32, True), (48, False), (64, False),
    ]  # fmt: skip
    assert all(row["layers"] == 2 for row in bench["rows"])
    assert bench["left_out"] == []
    for row, predicted in zip(bench["rows"], outcome.json["costs"], strict=True):
        assert row["flops_dense"] == predicted["flops_dense"]
        assert row["flops_sparse"] == predicted["flops_sparse"]
    assert outcome.site(0)["measured"] == outcome.site(1)["measured"]
    for face in (outcome.out, text.read_text(), page.read_text()):
        words = " ".join(face.split())
        assert "forward, measured" in words
        assert "FLOPs, predicted" in words
        assert "all layers together, medians; FLOPs are predicted" in words
        assert "predicted from counts, not measured" in words
        assert "backward" not in words
    assert " ms measured" in outcome.out


def test_one_layer_tells_its_own_times(convert: Runner) -> None:
    outcome = convert(MODELS, *SMALL, "--train", "--explain", "layers.1")
    assert outcome.status == 0
    (line,) = [line for line in outcome.out.splitlines() if line.startswith("  at 48 tokens")]
    assert "; backward " in line


def test_without_it_nothing_is_measured(convert: Runner) -> None:
    outcome = convert(MODELS)
    assert outcome.json["bench"] is None
    assert "measured" not in outcome.site()
    assert "measured" not in outcome.out.replace("not measured", "")


def test_symbolic_sizes_are_measured_at_chosen_lengths(convert: Runner) -> None:
    outcome = convert(
        MODELS, *SMALL, "--inputs", "int64[B=2,T=48]", "--lengths", "32,48",
    )  # fmt: skip
    assert outcome.status == 0
    assert [row["length"] for row in outcome.json["bench"]["rows"]] == [32, 48]
    (first, *_) = outcome.json["bench"]["rows"]
    assert first["flops_dense"] == outcome.json["costs"][0]["flops_dense"]


@pytest.mark.parametrize("builder", ["random_mask", "convolution"])
def test_a_model_with_nothing_to_measure(convert: Runner, builder: str) -> None:
    outcome = convert(f"{MODELS}:{builder}", "--bench")
    assert outcome.status == 0
    assert outcome.json["bench"]["rows"] == []
    assert "Nothing was measured on" in outcome.out
