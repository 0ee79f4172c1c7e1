"""nsa-convert on Python files: what builders may return, and what the report says of them."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch

from tests.cli.running import MODELS, Runner, convert

__all__ = ["convert"]
LAYERS = [(f"layers.{i}", "converted", None) for i in range(2)]


def test_a_model_with_a_tril_buffer_is_proven_by_the_values_of_the_buffer(convert: Runner) -> None:
    outcome = convert(MODELS)
    assert outcome.status == 0
    assert outcome.verdicts() == LAYERS
    assert outcome.site()["mask"] == "causal"
    path, _, line = outcome.site()["source"].rpartition(":")
    assert path.endswith("models.py")
    assert "scaled_dot_product_attention" in MODELS.read_text().splitlines()[int(line) - 1]
    assert "2 of 2 attention layers converted" in outcome.out


def test_costs_at_chosen_lengths_each_once_and_ascending(convert: Runner) -> None:
    outcome = convert(MODELS, "--lengths", "32768, 9000,32768", "--option", "dense_len=4096")
    assert [row["length"] for row in outcome.json["costs"]] == [9000, 32768]
    assert [row["length"] for row in outcome.site()["costs"]] == [9000, 32768]
    assert outcome.json["predicted_break_even"] == outcome.site()["predicted_break_even"]
    assert f"predicted break-even: {outcome.json['predicted_break_even']} tokens" in " ".join(
        outcome.out.split()
    )


@pytest.mark.parametrize(
    "builder", ["by_keyword", "by_position", "on_cuda", "mixed", "just_a_model"]
)
def test_what_a_builder_may_return(convert: Runner, builder: str) -> None:
    outcome = convert(f"{MODELS}:{builder}", *(["--seq-len", 40] * (builder == "just_a_model")))
    assert (outcome.status, outcome.err) == (0, "")
    assert outcome.verdicts() == LAYERS


def test_tensors_made_without_a_device_follow_the_model(convert: Runner) -> None:
    """Where Dynamo traces the default device; torch 2.11 does not, and says what to do."""
    outcome = convert(f"{MODELS}:no_device")
    if outcome.status == 2:
        assert "make new tensors on the device of an input" in outcome.err
        pytest.skip(f"torch {torch.__version__} does not trace a default meta device")
    assert outcome.verdicts() == LAYERS


def test_half_precision_chosen_by_the_builder_is_kept(convert: Runner) -> None:
    assert convert(f"{MODELS}:on_cuda").site()["dtype"] == "float16"


def test_sizes_reach_a_builder_that_takes_them(convert: Runner) -> None:
    site = convert(MODELS, "--seq-len", 33, "--batch", 5).site()
    assert (site["batch"], site["q_len"], site["kv_len"]) == (5, 33, 33)


def test_a_builder_that_mixes_known_and_unknown_values_still_builds(convert: Runner) -> None:
    outcome = convert(f"{MODELS}:only_on_meta")
    assert outcome.status == 0
    assert "buffer values are unknown" in outcome.err
    assert [reason for *_, reason in outcome.verdicts()] == ["mask_not_understood"] * 2


def test_options_reach_the_conversion(convert: Runner) -> None:
    outcome = convert(
        MODELS, "--option", "dense_len=0", "--option", "exclude=*.1", "--option", "scorer=mean",
        "--option", 'per_layer={"layers.0": {"num_selected": 40}}',
    )  # fmt: skip
    assert outcome.verdicts() == [LAYERS[0], ("layers.1", "kept", "excluded")]
    config = outcome.site()["config"]
    assert (config["dense_len"], config["scorer"], config["num_selected"]) == (0, "mean", 40)


def test_layers_that_a_filter_leaves_out_are_explained_once(convert: Runner) -> None:
    outcome = convert(MODELS, "--option", "exclude=*")
    text = " ".join(outcome.out.split())
    assert "excluded (2 layers): the layer filters leave it out: layers.0, and alike in" in text
    assert text.count("excluded (") == 1


def test_strict_turns_a_kept_layer_into_status_1_after_the_report(convert: Runner) -> None:
    outcome = convert(f"{MODELS}:random_mask", "--strict")
    assert outcome.status == 1
    assert "mask_not_understood" in outcome.out
    assert convert(f"{MODELS}:random_mask").status == 0
    assert convert(MODELS, "--strict").status == 0


@pytest.mark.parametrize("broken", ["analyse", "rewrite"])
def test_a_failure_of_ours_is_reported_as_the_backend_reports_it(
    convert: Runner, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("q")

    monkeypatch.setattr(f"nsa_compile.verdicts.{broken}", fail)
    outcome = convert(MODELS, "--option", "strict=true")
    assert outcome.status == 1
    assert outcome.json["failures"] == ["graph 0/0 stays dense: KeyError: 'q'"]
    kept = [("layers.0", "kept", "internal_error"), ("layers.1", "kept", "internal_error")]
    assert outcome.verdicts() == (kept if broken == "rewrite" else [])


def test_dropout_counts_only_with_train(convert: Runner) -> None:
    assert convert(f"{MODELS}:dropout").verdicts() == LAYERS
    reasons = [reason for *_, reason in convert(f"{MODELS}:dropout", "--train").verdicts()]
    assert reasons == ["dropout", "dropout"]


def test_what_a_model_prints_is_no_part_of_the_report(convert: Runner, tmp_path: Path) -> None:
    path = tmp_path / "talks.py"
    path.write_text(
        "from tests.cli.models import build as quiet\n"
        "print('imported')\n"
        "def build():\n    print('built')\n    return quiet()\n"
    )
    outcome = convert(path)
    assert outcome.err == "imported\nbuilt\n"
    assert outcome.out.startswith("Model: 2 of 2")


def test_a_builder_that_reads_its_weights_is_run_for_real(convert: Runner, tmp_path: Path) -> None:
    path = tmp_path / "reads.py"
    path.write_text(
        "from tests.cli.models import build as quiet\n"
        "def build():\n"
        "    model, inputs = quiet()\n"
        "    model.norm = max(float(weight.norm()) for weight in model.parameters())\n"
        "    return model, inputs\n"
    )
    outcome = convert(path)
    assert outcome.verdicts() == LAYERS
    assert "note: the model was built with its weights: building it reads values" in outcome.err


def test_no_attention_is_said_and_is_no_error(convert: Runner) -> None:
    outcome = convert(f"{MODELS}:convolution", "--strict")
    assert outcome.status == 0
    assert "no attention found" in outcome.out


def test_graph_breaks_are_told(convert: Runner) -> None:
    outcome = convert(f"{MODELS}:breaks")
    assert outcome.verdicts()
    assert {decision for _, decision, _ in outcome.verdicts()} == {"converted"}
    assert "graph break" in outcome.err


def test_a_forward_that_reads_values_is_reported_up_to_there(convert: Runner) -> None:
    outcome = convert(f"{MODELS}:reads_values", "--strict")
    assert outcome.status == 1
    assert outcome.verdicts() == LAYERS
    assert "reads tensor values" in outcome.json["failures"][0]


def test_markdown_and_json_are_written(convert: Runner, tmp_path: Path) -> None:
    path = tmp_path / "report.md"
    outcome = convert(MODELS, "--markdown", path)
    assert outcome.json["schema_version"] == 1
    assert path.read_text().startswith("### nsa_compile: Model\n")


def test_two_runs_write_the_same(convert: Runner) -> None:
    first, second = (convert(MODELS) for _ in range(2))
    assert first.json == second.json
    assert first.out == second.out


def test_nothing_goes_to_the_network(convert: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert convert(MODELS).status == 0


def test_the_example_is_converted(convert: Runner) -> None:
    example = Path(__file__).parents[2] / "examples" / "tiny_gpt.py"
    outcome = convert(example)
    assert "4 of 4 attention layers converted" in outcome.out
    assert outcome.site()["flops_sparse"] < outcome.site()["flops_dense"]


def test_a_dotted_name_is_imported_as_python_imports_it(
    convert: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(MODELS.parents[2])
    outcome = convert("tests.cli.models:by_keyword")
    assert outcome.status == 0, outcome.err
    assert len(outcome.verdicts()) == 2
    assert convert("tests.cli.models", "--seq-len", 40).status == 2
    assert convert("tests.cli.models:", "--seq-len", 40).site()["kv_len"] == 40


@pytest.mark.parametrize(
    ("reasons", "status"), [("dropout", 1), ("excluded, dropout", 1), ("excluded", 0)]
)
def test_fail_on_some_reasons_only(convert: Runner, reasons: str, status: int) -> None:
    outcome = convert(f"{MODELS}:dropout", "--train", "--fail-on", reasons)
    assert outcome.site()["reason"] == "dropout"
    assert outcome.status == status
