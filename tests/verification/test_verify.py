"""nsa_compile.verify: what it measures, that it says so truly, and that it leaves no trace."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nsa_compile
from tests.models import (  # noqa: F401  importing a file of the zoo fills it
    zoo,
    zoo_masks,
    zoo_modifiers,
    zoo_modules,
    zoo_traps,
)
from tests.models.architectures import build, run
from tests.models.equality import FULL_BUDGET, padding_for, token_ids

Tensor = torch.Tensor
SPARSE = {
    "dense_len": 0, "window": 16, "select_block": 16, "query_tile": 16, "num_selected": 4,
    "candidates": 6,
}  # fmt: skip
LAYER_FIELDS = [
    "module", "ordinal", "decision", "reason", "reason_text", "mask", "q_len", "kv_len",
    "relative_error", "cosine", "max_error", "coverage", "coverage_worst", "runs_dense", "equal",
    "pattern",
]  # fmt: skip


class Layer(nn.Module):
    """Counts its calls in a buffer and writes to its input."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        self.calls.add_(1)
        q, k, v = (y.view(b, t, 4, -1).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        return self.drop(x + y.reshape(b, t, c))


class Stack(nn.Module):
    """``kind`` is how its layers are called."""

    def __init__(self, layers: int = 3, kind: str = "plain") -> None:
        super().__init__()
        self.layers, self.kind = nn.ModuleList(Layer() for _ in range(layers)), kind

    def forward(self, x: Tensor) -> Tensor:
        x = x.mul_(2.0)
        for layer in self.layers:
            if self.kind == "breaks":
                torch._dynamo.graph_break()
            if self.kind == "checkpoint":
                x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
            else:
                x = layer(x)
        return x


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("name", "side"),
    [("tril_gpt", "none"), ("llama", "left"), ("gemma2", "none"), ("gpt_oss", "right")],
)
def test_at_full_budget_it_is_equal(name: str, side: str) -> None:
    extra = {} if name == "tril_gpt" else {"use_cache": False, **padding_for(side, 300)}
    report = nsa_compile.verify(build(name), token_ids(300), config=FULL_BUDGET, **extra)
    assert report.equal, str(report)
    assert [layer.equal for layer in report.layers] == [True, True]
    assert all(layer.coverage == pytest.approx(1.0, abs=1e-5) for layer in report.layers)
    assert report.first_beyond is None
    assert report.end_to_end.top1_agreement == 1.0
    assert "2 converted layers equal the dense model, but for rounding" in str(report)


@pytest.mark.parametrize(
    "name",
    [
        "MultiheadPadding", "FlexSoftcap", "EncoderFused", "CheckpointedMask",
        "PackedDocuments", "Autocast", "SinkFromLogSumExp", "AlibiFromKeys",
    ],
)  # fmt: skip
def test_at_full_budget_every_form_is_equal(name: str) -> None:
    model, inputs = zoo.build(name)
    report = nsa_compile.verify(model.eval(), *inputs(50), config=FULL_BUDGET)
    assert report.equal, str(report)
    assert report.converted
    for layer in report.converted:
        assert layer.coverage == pytest.approx(1.0, abs=1e-5)
        assert layer.equal


def test_the_numbers_are_those_of_running_both() -> None:
    model, ids = build("tril_gpt"), token_ids(300)
    report = nsa_compile.verify(model, ids, config=SPARSE, labels=ids)
    fast = torch.compile(model, backend="nsa", options={**SPARSE, "inner": "eager"})
    with torch.no_grad():
        a, b = run(model, ids).double(), run(fast, ids).double()
    found = report.end_to_end
    assert found.relative_error == pytest.approx(float((a - b).norm() / a.norm()), rel=1e-4)
    assert found.max_error == pytest.approx(float((a - b).abs().max()), rel=1e-4)
    assert found.cosine == pytest.approx(float(F.cosine_similarity(a.flatten(), b.flatten(), 0)))
    p = a.softmax(-1)
    kl = (p * (a.log_softmax(-1) - b.log_softmax(-1))).sum(-1).mean()
    assert found.kl == pytest.approx(float(kl), rel=1e-3)
    assert found.top1_agreement == float((a.argmax(-1) == b.argmax(-1)).double().mean())
    for logits, perplexity in ((a, found.perplexity_dense), (b, found.perplexity_converted)):
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        assert perplexity == pytest.approx(float(loss.exp()), rel=1e-3)
    assert not report.equal
    assert report.first_beyond is report.layers[0]


def test_a_layer_is_measured_on_the_inputs_that_it_has_in_the_dense_model() -> None:
    model, ids = build("tril_gpt"), token_ids(300)
    both = nsa_compile.verify(model, ids, config=SPARSE)
    second = nsa_compile.verify(model, ids, config={**SPARSE, "exclude": ["layers.0"]})
    assert [layer.decision for layer in second.layers] == ["kept", "converted"]
    assert second.layers[1] == both.layers[1]
    assert second.end_to_end.relative_error < both.end_to_end.relative_error


def test_padding_and_labels_of_no_token_do_not_count() -> None:
    model, ids = build("llama"), token_ids(200)
    padding = padding_for("right", 200)
    report = nsa_compile.verify(
        model, input_ids=ids, use_cache=False, **padding, config=SPARSE, labels=ids
    )
    valid = padding["attention_mask"].bool()
    assert report.end_to_end.tokens == int(valid.sum())
    with torch.no_grad():
        logits = run(model, ids, use_cache=False, **padding)[:, :-1]
    targets = ids.masked_fill(~valid, -100)[:, 1:]
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert report.end_to_end.perplexity_dense == pytest.approx(float(loss.exp()), rel=1e-3)


def test_kept_layers_are_listed_with_their_reason() -> None:
    report = nsa_compile.verify(build("tril_gpt"), token_ids(90), config={"exclude": ["*.1"]})
    assert [layer.reason for layer in report.kept] == ["excluded"]
    assert "kept layers.1: excluded: the layer filters leave it out" in str(report)
    assert report.layers[0].runs_dense
    assert report.equal
    assert "1 converted layer run dense at this length (dense_len)" in str(report)


@pytest.mark.parametrize("tolerance", [10.0, 0.4, 1e-9])
def test_a_suggestion_holds_when_it_is_run(tolerance: float) -> None:
    model, x = Stack(layers=4), torch.randn(1, 300, 32)
    with torch.no_grad():
        for scale, layer in zip((4.0, 1.0, 6.0, 0.2), model.layers, strict=True):
            layer.qkv.weight.mul_(scale)
    report = nsa_compile.verify(model, x, config=SPARSE, tolerance=tolerance)
    found = report.suggestion
    assert found is not None
    assert found.met
    again = nsa_compile.verify(model, x, config={**SPARSE, **found.options})
    assert again.end_to_end.relative_error == pytest.approx(found.relative_error, rel=1e-5)
    assert again.end_to_end.relative_error <= tolerance
    assert len(again.converted) == found.converted
    assert [f"{layer.module}" for layer in again.kept] == sorted(found.keep_dense)
    if found.keep_dense:  # one less is too few
        fewer = {**SPARSE, "exclude": list(found.keep_dense[:-1])}
        assert nsa_compile.verify(model, x, config=fewer).end_to_end.relative_error > tolerance
        errors = {layer.module: layer.relative_error for layer in report.layers}
        worst = sorted(errors, key=lambda name: -errors[name])
        assert list(found.keep_dense) == worst[: len(found.keep_dense)]
        assert f"for {tolerance:g} keep {len(found.keep_dense)} dense" in str(report)


@pytest.mark.parametrize("kind", ["plain", "breaks", "checkpoint"])
def test_every_layer_is_measured_however_it_is_called(kind: str) -> None:
    model = Stack(kind=kind)
    report = nsa_compile.verify(model, torch.randn(1, 300, 32), config=SPARSE)
    assert not report.failures
    errors = [layer.relative_error for layer in report.layers]
    assert all(error is not None and error > 0.01 for error in errors), str(report)
    if kind != "breaks":  # Dynamo shares the code of equal layers
        assert [layer.module for layer in report.layers] == [f"layers.{i}" for i in range(3)]


def test_a_cache_is_the_same_for_every_run() -> None:
    """Prefill in two pieces: the second one sees what the first one left, once."""
    transformers = pytest.importorskip("transformers")
    model, cache = build("llama"), transformers.DynamicCache()
    with torch.no_grad():
        model(token_ids(200), past_key_values=cache)
    report = nsa_compile.verify(model, token_ids(60), past_key_values=cache, config=FULL_BUDGET)
    assert report.equal, str(report)
    assert {(layer.q_len, layer.kv_len) for layer in report.converted} == {(60, 260)}
    assert cache.get_seq_length() == 200


def test_it_leaves_no_trace() -> None:
    model, x = Stack().train(), torch.randn(1, 100, 32)
    model.layers[1].eval()
    given, random = x.clone(), torch.get_rng_state()
    versions = [buffer._version for buffer in model.buffers()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    nsa_compile.verify(model, x, config=SPARSE)
    assert torch.equal(x, given)
    assert torch.equal(random, torch.get_rng_state())
    assert [layer.training for layer in model.layers] == [True, False, True]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert len(versions) == 3
    model = build("tril_gpt")
    versions = [buffer._version for buffer in model.buffers()]
    nsa_compile.verify(model, token_ids(60), config=SPARSE)
    assert [buffer._version for buffer in model.buffers()] == versions


def test_an_exported_program_gives_the_same_numbers() -> None:
    model, ids = build("tril_gpt"), token_ids(300)
    sizes = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    program = torch.export.export(model, (token_ids(64),), dynamic_shapes=sizes)
    reports = [
        nsa_compile.verify(each, ids, config=SPARSE, labels=ids, tolerance=0.5)
        for each in (model, program)
    ]
    (a, b) = (report.to_dict() for report in reports)
    for layer in (*a["layers"], *b["layers"]):
        del layer["q_len"], layer["kv_len"]  # symbols in the program
    assert a["layers"] == b["layers"]
    assert a["end_to_end"] == b["end_to_end"]
    assert a["suggestion"] == b["suggestion"]
    assert reports[1].model == "TrilGPT"
    with pytest.raises(TypeError, match="pass inputs of the structure"):
        nsa_compile.verify(program, ids, ids)


def test_a_prepared_model_has_no_coverage() -> None:
    options = {"merge": "gate", "window": 16, "num_selected": 4}
    model = nsa_compile.prepare(build("tril_gpt"), options)
    report = nsa_compile.verify(model, token_ids(200))
    assert [layer.coverage for layer in report.layers] == [None, None]
    assert all(layer.relative_error > 0.1 for layer in report.layers)


def test_a_mask_that_is_not_what_was_proven_runs_dense_and_says_so() -> None:
    def padded(x: Tensor, keep: Tensor) -> Tensor:
        q = x.view(2, -1, 4, 8).transpose(1, 2)
        bias = (1.0 - keep[:, None, None, :].to(x.dtype)) * -1e9
        return ((q @ q.mT) / 8**0.5 + bias).softmax(-1) @ q

    x, keep = torch.randn(2, 96, 32), torch.full((2, 96), 2)
    with pytest.warns(nsa_compile.ConversionWarning):
        report = nsa_compile.verify(padded, x, keep, config=SPARSE)
    assert report.layers[0].relative_error is None
    assert any("holds more than 0 and 1" in failure for failure in report.failures)
    assert report.end_to_end.relative_error == 0


def test_the_json_has_a_fixed_form() -> None:
    report = nsa_compile.verify(build("tril_gpt"), token_ids(90), config=SPARSE, tolerance=5)
    content = json.loads(report.to_json())
    assert list(content) == [
        "schema_version", "model", "torch", "device", "equal", "layers", "end_to_end", "threshold",
        "first_beyond", "suggestion", "failures",
    ]  # fmt: skip
    assert content["schema_version"] == 1
    assert list(content["layers"][0]) == LAYER_FIELDS
    assert list(content["end_to_end"]) == [
        "shape", "relative_error", "max_error", "cosine", "kl", "top1_agreement", "tokens",
        "perplexity_dense", "perplexity_converted", "equal",
    ]  # fmt: skip
    assert list(content["suggestion"]) == [
        "tolerance", "met", "keep_dense", "options", "relative_error", "converted", "runs",
    ]  # fmt: skip


class Broken(nn.Module):
    """A forward whose converted output is not finite."""

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, is_causal=True) / 0


def test_numbers_that_are_not_finite_are_null() -> None:
    report = nsa_compile.verify(Broken(), torch.randn(1, 2, 90, 8), config=SPARSE)
    content = json.loads(report.to_json(), parse_constant=pytest.fail)
    assert content["end_to_end"]["relative_error"] is None
    assert not report.equal


MISTAKES: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "weights on meta": (lambda: build("tril_gpt").to("meta"), {}, ValueError, "needs real weights"),
    "labels that do not fit": (
        lambda: build("tril_gpt"),
        {"labels": torch.zeros(2, 3, dtype=torch.long)},
        ValueError,
        r"labels must be token ids \[B, T\] of logits \[B, T, V\] = \[2, 40, 61\], got \[2, 3\]",
    ),
    "a negative tolerance": (lambda: build("tril_gpt"), {"tolerance": -1}, ValueError, "from 0 up"),
    "no number": (
        lambda: build("tril_gpt"),
        {"tolerance": float("nan")},
        ValueError,
        "tolerance must be a number",
    ),
    "an option": (
        lambda: build("tril_gpt"), {"config": {"windows": 3}},
        nsa_compile.NSAConfigError, "unknown option",
    ),
    "no output": (lambda: (lambda ids: ids + 1), {}, ValueError, "no floating tensor in it"),
    "an input": (lambda: build("tril_gpt"), {"mask": 3}, TypeError, "mask"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case: str) -> None:
    make, options, kind, words = MISTAKES[case]
    with pytest.raises(kind, match=words):
        nsa_compile.verify(make(), token_ids(40), **options)


def test_inputs_on_meta() -> None:
    with pytest.raises(ValueError, match="needs real inputs"):
        nsa_compile.verify(build("tril_gpt"), token_ids(40).to("meta"))
