"""The training example: its four variants at sizes that take seconds, and runs that go on."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = {
    "context": 160, "batch": 2, "steps": 4, "tune_steps": 2, "width": 32, "layers": 2, "q_heads": 4,
    "kv_heads": 2, "head_dim": 16, "pairs": 4, "questions": 3, "repeats": 2, "eval_batches": 1,
    "nsa": {"merge": "gate", "dense_len": 0, "compress_block": 16, "compress_stride": 8,
            "select_block": 16, "num_selected": 3, "window": 32},
    "converted": {"dense_len": 0, "select_block": 16, "num_selected": 8, "window": 16},
}  # fmt: skip
Example = Callable[..., dict[str, Any]]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Example:
    """Runs the example with more arguments; returns what it wrote as JSON."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    settings = importlib.import_module("training.settings")
    shorter = (settings.Phase(context=80, batch=3, steps=2, pairs=2, questions=1, repeats=2),)
    small = settings.PRESETS["cpu"].replace(shorter=shorter, **TINY)
    monkeypatch.setitem(settings.PRESETS, "cpu", small)
    train_nsa = importlib.import_module("train_nsa")

    def run(*more: str, out: str = "run") -> dict[str, Any]:
        torch._dynamo.reset()
        folder = tmp_path / out
        train_nsa.main(["--device", "cpu", "--inner", "eager", "--out", str(folder), *more])
        if "--train-only" in more:
            return {}
        document = json.loads((folder / "results.json").read_text())
        found: dict[str, Any] = document["variants"]
        return found

    return run


def test_all_variants_train_and_stand_in_the_table(
    example: Example, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = example("--variants", "dense,nsa,converted,tuned,longer")
    assert [row["steps"] for row in found.values()] == [6, 6, 0, 2, 2]
    for row in found.values():
        assert row["bits_per_byte"] == pytest.approx(row["loss"] / math.log(2))
        assert 0 <= row["recall"] <= 1
        assert row["step_ms"] > 0
    for name in ("dense", "nsa"):
        assert found[name]["losses"][-1] < found[name]["losses"][0]
    # 8 of 10 blocks of 16: nearly all that the dense model reads.
    assert found["converted"]["loss"] == pytest.approx(found["dense"]["loss"], rel=0.01)
    assert set(found["tuned"]["without"]) == {"compressed", "selected", "window"}
    assert found["nsa"]["parameters"] > found["dense"]["parameters"]
    shown = capsys.readouterr().out
    assert "Held-out text and retrieval" in shown
    assert (tmp_path / "run" / "losses.png").exists() or "matplotlib is not installed" in shown


@pytest.mark.parametrize("variant", ["dense", "nsa"])
def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(
    example: Example, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = ("--variants", variant, "--save-every", "2")
    whole = example(*only, out="whole")[variant]

    text = importlib.import_module("training.text")
    unhindered = text.Corpus.training

    def stopped(corpus: Any, step: int) -> Any:
        if step == 3:
            raise KeyboardInterrupt
        return unhindered(corpus, step)

    with monkeypatch.context() as patch:
        patch.setattr(text.Corpus, "training", stopped)
        with pytest.raises(KeyboardInterrupt):
            example(*only, out="parts")
    example(*only, "--resume", "--train-only", out="parts")
    parts = example(*only, "--resume", out="parts")[variant]
    assert parts["losses"] == whole["losses"]
    assert (parts["loss"], parts["recall"]) == (whole["loss"], whole["recall"])


def test_a_checkpoint_of_other_settings_is_refused(example: Example) -> None:
    example("--variants", "dense")
    with pytest.raises(SystemExit, match="other settings"):
        example("--variants", "dense", "--resume", "--steps", "5")


def test_weights_are_converted_with_other_options(example: Example, tmp_path: Path) -> None:
    example("--variants", "dense", "--train-only")
    example("--variants", "converted", "--converted", "candidates=9", "--converted", "scorer=mean")
    (written,) = tmp_path.rglob("results.json")
    used = json.loads(written.read_text())["settings"]["converted"]
    assert (used["candidates"], used["scorer"], used["dense_len"]) == (9, "mean", 0)
    with pytest.raises(SystemExit):
        example("--converted", "candidates")


def test_other_options_of_the_branches_keep_the_dense_weights(
    example: Example, tmp_path: Path
) -> None:
    example("--variants", "dense", "--train-only")
    example("--variants", "tuned", "--prepared", "scorer=channels")
    (written,) = tmp_path.rglob("results.json")
    used = json.loads(written.read_text())["settings"]["nsa"]
    assert (used["scorer"], used["merge"]) == ("channels", "gate")


def test_what_begins_with_the_dense_weights_asks_for_them(example: Example) -> None:
    with pytest.raises(SystemExit, match="train the variant dense first"):
        example("--variants", "converted")


def test_planted_questions_repeat_their_pairs(example: Example) -> None:
    settings = importlib.import_module("training.settings").PRESETS["cpu"]
    text = importlib.import_module("training.text")
    corpus = text.Corpus(settings, "cpu")
    short, full = settings.phases
    for batch, phase in (
        (corpus.training(0), short), (corpus.training(2), full), (corpus.full(), full),
        (corpus.planted(0), full),
    ):  # fmt: skip
        assert batch.ids.shape == (phase.batch, phase.context + 1)
        for row, answers in zip(batch.ids, batch.answers, strict=True):
            line = bytes(row.tolist())
            assert len(set(answers.tolist())) >= phase.questions
            for answer in answers.tolist():
                asked = line[answer - 1 : answer + 1]
                assert line[answer - 5 : answer - 1] == b"\n#?:"
                assert line.count(b"#k:" + asked + b"\n") == 1
                assert line.count(b"#k:" + asked[:1]) == 1
                assert line.index(b"#k:" + asked) < answer
    assert corpus.plain(0).ids.shape == (settings.batch, settings.context + 1)
    assert torch.equal(corpus.training(3).ids, corpus.training(3).ids)
    assert not torch.equal(corpus.training(3).ids, corpus.training(4).ids)


def test_gates_keep_their_multiple_of_the_rate(example: Example) -> None:
    settings = importlib.import_module("training.settings").PRESETS["cpu"]
    loop, variants = (importlib.import_module(f"training.{name}") for name in ("loop", "variants"))
    made = variants.make(variants.VARIANTS["nsa"], settings, "cpu", "eager", None)
    optimizer = loop.optimizer_of(made, "cpu", 1e-3, 2e-2)
    loop.set_rate(optimizer, 5e-4)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    gates = {id(p) for part in variants.branches(made.weights) for p in part.gate.parameters()}
    assert set(rates) == {id(p) for p in made.weights.parameters()}
    for weight, rate in rates.items():
        assert rate == pytest.approx(1e-2 if weight in gates else 5e-4)
