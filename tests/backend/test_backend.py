"""The backend as a user meets it: options, filters, strictness, failures, graph breaks, reports."""

from __future__ import annotations

import copy
import gc
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import nsa_compile
from nsa_compile import backend
from nsa_compile.passes.rewrite import Rewriter

OPTIONS = {"dense_len": 0, "window": 16, "select_block": 16, "query_tile": 16, "inner": "eager"}


class Attention(nn.Module):
    def __init__(self, dropout: float = 0.0, breaks: bool = False) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.dropout, self.breaks = dropout, breaks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        q, k, v = (y.view(b, t, 2, 16).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        if self.breaks:
            torch._dynamo.graph_break()
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        return y.transpose(1, 2).reshape(b, t, 32)


class Stack(nn.Module):
    def __init__(self, layers: int = 3, **kwargs: object) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention(**kwargs) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 50, 32)


class Windowed(nn.Module):
    """Causal attention over the last ``window`` keys, [B, T, 32]."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = x.unflatten(2, (2, 16)).transpose(1, 2)
        i = torch.arange(x.shape[1], device=x.device)
        age = i[:, None] - i
        mask = (age >= 0) & (age < self.window)
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)


def compiled(model: nn.Module, **options: object):
    return torch.compile(model, backend="nsa", options={**OPTIONS, **options})


def verdicts(fast: object) -> list[tuple[str, str, str | None]]:
    return [(s.module, s.decision, s.reason) for s in nsa_compile.report(fast).sites]


def test_every_layer_is_converted_and_equal(x: torch.Tensor) -> None:
    model = Stack()
    fast = compiled(model)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
    assert verdicts(fast) == [(f"layers.{i}", "converted", None) for i in range(3)]
    site = nsa_compile.report(fast).sites[0]
    assert site.module_class.endswith("Attention")
    assert site.source.split(":")[0].endswith("test_backend.py")
    assert site.mask == "causal"


def test_include_exclude_and_per_layer(x: torch.Tensor) -> None:
    fast = compiled(
        Stack(4),
        include=["layers.*"],
        exclude="*.3",
        per_layer={"layers.1": {"merge": "gate"}, "*.2": {"window": 32}},
    )
    fast(x)
    assert verdicts(fast) == [
        ("layers.0", "converted", None),
        ("layers.1", "kept", "not_prepared"),
        ("layers.2", "converted", None),
        ("layers.3", "kept", "excluded"),
    ]
    assert [s.config["window"] for s in nsa_compile.report(fast).converted] == [16, 32]


def test_strict_lists_every_site_with_its_reason(x: torch.Tensor) -> None:
    model = Stack(dropout=0.1).train()
    with pytest.raises(Exception, match="StrictError") as caught:
        compiled(model, strict=True)(x)
    for i in range(3):
        assert f"layers.{i} " in str(caught.value)
    assert "dropout" in str(caught.value)


def test_strict_is_content_when_all_converts(x: torch.Tensor) -> None:
    compiled(Stack(), strict=True)(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_select": 3}, "did you mean 'num_selected'"),
        ({"windows": 3}, "did you mean 'window'"),
        ({"merge": "soft"}, "merge must be one of softmax, gate, got 'soft'"),
        ({"num_selected": 2, "window": 512}, "raise num_selected to at least"),
        ({"select_block": 48}, "select_block must be a power of two"),
    ],
)
def test_bad_options_are_refused_with_what_to_do(
    options: dict[str, object], message: str, x: torch.Tensor
) -> None:
    with pytest.raises(Exception, match="NSAConfigError") as caught:
        compiled(Stack(), **options)(x)
    assert message in str(caught.value)


def test_a_graph_with_nothing_to_convert_is_handed_on_untouched(
    x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def inner(gm, inputs, config, mode):
        seen.append((gm, gm.code))
        return gm.forward

    captured = []

    def capture(gm, inputs):
        captured.append(gm.code)
        return backend.nsa(gm, inputs, options={**OPTIONS, "exclude": ["*"]})

    monkeypatch.setattr(backend, "_inner", inner)
    torch.compile(Stack(), backend=capture)(x)
    assert [code for _, code in seen] == captured


@pytest.mark.parametrize("stage", ["analyse", "rewrite"])
def test_an_internal_failure_leaves_the_model_dense_warns_and_is_reported(
    stage: str, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*_: object, **__: object) -> None:
        raise RuntimeError("boom")

    if stage == "analyse":
        monkeypatch.setattr(backend, "analyse", explode)
    else:
        monkeypatch.setattr(Rewriter, "_replace", explode)
    model = Stack()
    fast = compiled(model)
    with pytest.warns(nsa_compile.ConversionWarning, match="boom") as caught:
        out = fast(x)
    assert len(caught) == 1
    assert torch.equal(out, model(x))
    report = nsa_compile.report(fast)
    assert "boom" in report.failures[0]
    assert not report.converted
    assert all(site.reason == "internal_error" for site in report.sites)


def test_graph_breaks_are_merged_into_one_report(x: torch.Tensor) -> None:
    model = Stack(2, breaks=True)
    fast = compiled(model)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
    # One layer's code serves the other: Dynamo compiles it once.
    assert verdicts(fast)[0] == ("layers.0", "converted", None)
    assert all(decision == "converted" for _, decision, _ in verdicts(fast))


def test_recompiles_do_not_count_a_layer_twice(x: torch.Tensor) -> None:
    fast = compiled(Stack(2))
    for length in (50, 40, 33):
        fast(x[:, :length])
    assert len(nsa_compile.report(fast).sites) == 2


def test_layers_compiled_one_by_one(x: torch.Tensor) -> None:
    model = Stack(2)
    for layer in model.layers:
        layer.compile(backend="nsa", options=OPTIONS)
    model(x)
    assert verdicts(model) == [(f"layers.{i}", "converted", None) for i in range(2)]


def test_functions_can_be_compiled() -> None:
    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    q, k, v = torch.randn(3, 1, 2, 40, 16)
    fast = torch.compile(attend, backend="nsa", options=OPTIONS)
    torch.testing.assert_close(fast(q, k, v), attend(q, k, v), rtol=1e-4, atol=1e-4)
    assert [d for _, d, _ in verdicts(fast)] == ["converted"]


def test_two_models_keep_their_reports_apart(x: torch.Tensor) -> None:
    one, two = compiled(Stack(1)), compiled(Stack(2))
    one(x), two(x)
    assert (len(nsa_compile.report(one).sites), len(nsa_compile.report(two).sites)) == (1, 2)


def test_an_equal_second_compile_of_the_same_model_has_the_report(x: torch.Tensor) -> None:
    model = Stack(2)
    first = compiled(model)
    first(x)
    second = compiled(model)
    second(x)  # Dynamo reuses the code of an equal torch.compile call
    assert len(nsa_compile.report(second).sites) == 2


def test_report_of_something_never_compiled_says_what_to_pass() -> None:
    with pytest.raises(TypeError, match=r"pass what torch\.compile returned"):
        nsa_compile.report(Stack(1))


def test_report_before_the_first_call_is_empty() -> None:
    # Models that are built alike share code and report, so this one is unlike all others here.
    assert nsa_compile.report(compiled(Stack(7))).sites == []


def test_models_that_are_built_alike_share_code_and_report(x: torch.Tensor) -> None:
    one, two = compiled(Stack(2)), compiled(Stack(2))
    one(x), two(x)
    copied = copy.deepcopy(one)
    copied(x)
    for fast in (one, two, copied):
        assert [d for _, d, _ in verdicts(fast)] == ["converted"] * 2


def test_an_inner_compiler_that_fails_twice_is_heard_and_leaves_no_report(
    x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ValueError("the inner compiler is broken")

    monkeypatch.setattr(backend, "_inner", broken)
    fast = compiled(Stack(5))
    with pytest.raises(Exception, match="the inner compiler is broken"):
        fast(x)
    assert nsa_compile.report(fast).sites == []


def test_modes_of_gradient_and_precision(x: torch.Tensor) -> None:
    model = Stack(2)
    fast = compiled(model)
    for context, tolerance in (
        (torch.enable_grad(), 1e-4), (torch.no_grad(), 1e-4), (torch.inference_mode(), 1e-4),
        (torch.autocast("cpu", torch.bfloat16), 3e-2),
    ):  # fmt: skip
        with context:
            y = x.clone()
            torch.testing.assert_close(fast(y), model(y), rtol=tolerance, atol=tolerance)
    assert [d for _, d, _ in verdicts(fast)] == ["converted"] * 2


def test_models_compiled_in_threads(x: torch.Tensor) -> None:
    models = [Stack(n) for n in (1, 2, 3)]
    fast = [compiled(model) for model in models]
    with ThreadPoolExecutor(3) as pool:
        outs = list(pool.map(lambda f: f(x), fast))
    for model, out, each in zip(models, outs, fast, strict=True):
        torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-4)
        assert len(nsa_compile.report(each).sites) == len(model.layers)


def test_training_and_evaluation_have_a_row_each(x: torch.Tensor) -> None:
    model = Stack(1, dropout=0.5)
    fast = compiled(model)
    model.train(), fast(x)
    model.eval(), fast(x)
    assert [(d, r) for _, d, r in verdicts(fast)] == [("kept", "dropout"), ("converted", None)]


@pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")
def test_the_parts_of_a_graph_split_for_ddp_are_all_reported(
    x: torch.Tensor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 1024)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = Stack(4)
        fast = compiled(nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.01))
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
        fast(x).sum().backward()
        assert [d for _, d, _ in verdicts(fast)] == ["converted"] * 4
        assert not nsa_compile.report(fast).failures
    finally:
        dist.destroy_process_group()


def test_mode_is_passed_on_to_inductor(x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import compile_fx

    patches = []

    def fake_compile_fx(gm, inputs, config_patches=None):
        patches.append(config_patches)
        return gm.forward

    monkeypatch.setattr(compile_fx, "compile_fx", fake_compile_fx)
    mode = "max-autotune-no-cudagraphs"
    torch.compile(Stack(1), backend="nsa", mode=mode)(x)
    compiled(Stack(1), inner="inductor", mode=mode)(x)
    assert [patch["max_autotune"] for patch in patches] == [True, True]


def test_a_mode_without_inductor_is_refused(x: torch.Tensor) -> None:
    with pytest.raises(Exception, match="needs inner='inductor'"):
        compiled(Stack(1), mode="reduce-overhead")(x)


def test_the_report_keeps_no_model_alive(x: torch.Tensor) -> None:
    import weakref

    model = Stack(1)
    fast = compiled(model)
    fast(x)
    alive = weakref.ref(model)
    del model, fast
    torch._dynamo.reset()
    gc.collect()
    assert alive() is None


def test_no_warning_on_the_happy_path(x: torch.Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", nsa_compile.ConversionWarning)
        compiled(Stack(1))(x)


def test_a_window_within_the_budget_is_local_already(x: torch.Tensor) -> None:
    for window, reason in ((32, "already_local"), (33, None)):
        fast = compiled(Windowed(window), num_selected=2, init_blocks=0, window=1)
        fast(x)
        (row,) = nsa_compile.report(fast).sites
        assert (row.mask, row.reason) == (f"causal & window({window})", reason)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_what_attention_reads(x: torch.Tensor, dtype: torch.dtype) -> None:
    class Mixed(Stack):
        """q and k in float32, as rotary embeddings leave them, v in the dtype of autocast."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            qkv = self.layers[0].qkv(x)
            q, k, v = (y.unflatten(2, (2, 16)).transpose(1, 2) for y in qkv.chunk(3, -1))
            return F.scaled_dot_product_attention(q.float(), k.float() * 1.5, v, is_causal=True)

    model = Mixed()
    fast = compiled(model, num_selected=8)
    with torch.autocast("cpu", dtype):
        out, expected = fast(x), model(x)
        out.float().sum().backward()
    assert out.dtype == expected.dtype == dtype
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
    (row,) = nsa_compile.report(fast).sites
    assert (row.decision, row.dtype) == ("converted", str(dtype).removeprefix("torch."))
