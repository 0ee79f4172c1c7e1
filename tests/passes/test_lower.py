"""Attention calls that hide in one node are spelled out, converted, and otherwise left alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nsa_compile

OPTIONS = {
    "dense_len": 0, "window": 16, "select_block": 16, "query_tile": 16, "num_selected": 8,
    "inner": "eager",
}  # fmt: skip
T, E, HEADS = 40, 32, 4


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


class Attends(nn.Module):
    """Calls nn.MultiheadAttention and returns its output alone, [B, T, E]."""

    def __init__(self, weights: bool = False, **options: object) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(E, HEADS, **{"batch_first": True, **options})
        self.weights = weights

    def forward(self, x: torch.Tensor, source: torch.Tensor | None = None, **masks: object):
        source = x if source is None else source
        out, weights = self.attention(x, source, source, **masks)
        return (out, weights) if self.weights else out


def causal(length: int = T) -> torch.Tensor:
    """True hides, as nn.MultiheadAttention has it."""
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def padding() -> torch.Tensor:
    mask = torch.zeros(2, T, dtype=torch.bool)
    mask[0, -7:] = True
    return mask


class InGraph(nn.Module):
    """Builds its masks inside the graph, where they can be proven."""

    def __init__(self, model: nn.Module, mask: str, name: str = "attn_mask") -> None:
        super().__init__()
        self.model, self.mask, self.name = model, mask, name

    def forward(self, x: torch.Tensor, **given: object) -> torch.Tensor:
        length = x.shape[1]
        hidden = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        if self.mask == "float":
            hidden = torch.zeros(length, length).masked_fill(hidden, float("-inf"))
        if self.mask == "heads":
            hidden = hidden.expand(x.shape[0] * HEADS, -1, -1)
        return self.model(x, **{self.name: hidden}, **given)


def check(model: nn.Module, *args: torch.Tensor, dynamic: bool = False, **masks: object):
    """The single row of the report, after comparing output and gradients with eager."""
    fast = torch.compile(model, backend="nsa", dynamic=dynamic, options=OPTIONS)
    outcomes = []
    for run in (model, fast):
        model.zero_grad()
        out = run(*args, **masks)
        loss = out[0] if isinstance(out, tuple) else out
        if torch.is_grad_enabled():
            loss.square().sum().backward()
        outcomes.append((loss.detach(), [p.grad for p in model.parameters()]))
    torch.testing.assert_close(outcomes[1], outcomes[0], rtol=1e-4, atol=1e-4)
    report = nsa_compile.report(fast)
    assert not report.failures, report.failures
    return report.sites


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("mask", ["bool", "float", "heads"])
@pytest.mark.parametrize("need_weights", [False, True])
def test_multi_head_attention_under_a_causal_mask(
    mask: str, need_weights: bool, dynamic: bool
) -> None:
    model = InGraph(Attends(), mask)
    (row,) = check(model, torch.randn(2, T, E), dynamic=dynamic, need_weights=need_weights)
    assert (row.decision, row.mask) == ("converted", "causal"), row.reason_text
    assert (row.spelling, row.q_heads, row.head_dim) == ("multi_head_attention_forward", 4, 8)
    assert row.module.endswith("attention")


@pytest.mark.parametrize("mask", ["bool", "float"])
def test_padding_joins_the_mask(mask: str) -> None:
    model = InGraph(Attends(), mask)
    hidden = padding() if mask == "bool" else torch.zeros(2, T).masked_fill(padding(), -torch.inf)
    (row,) = check(model, torch.randn(2, T, E), key_padding_mask=hidden, need_weights=False)
    if mask == "float":  # its numbers are known at run time only
        assert row.decision == "kept"
        return
    assert row.mask == "causal & padding", row.reason_text


def test_the_hint_of_causality_counts_where_torch_follows_it() -> None:
    model = Attends()
    masks = {"attn_mask": causal(), "is_causal": True, "need_weights": False}
    (row,) = check(model, torch.randn(2, T, E), **masks)
    assert row.mask == "causal"
    # With weights asked for torch reads the mask, which is known at run time only.
    torch._dynamo.reset()
    masks["need_weights"] = True
    (row,) = check(model, torch.randn(2, T, E), **masks)
    assert row.decision == "kept"


@pytest.mark.parametrize(
    "options", [{"batch_first": False}, {"bias": False}, {"kdim": 24, "vdim": 24}]
)
def test_cross_attention_and_projections(options: dict[str, object]) -> None:
    model = Attends(**options)
    source = torch.randn(2, T + 9, options.get("kdim", E))
    x = torch.randn(2, T, E)
    if options.get("batch_first") is False:
        source, x = source.transpose(0, 1), x.transpose(0, 1)
    (row,) = check(model, x, source)
    assert (row.decision, row.mask, row.q_len, row.kv_len) == ("converted", "full", T, T + 9)


def test_an_unbatched_input() -> None:
    (row,) = check(Attends(), torch.randn(T, E))
    assert row.decision == "converted"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"weights": True}, "weights_escape"),
        ({"add_bias_kv": True}, "modifier_not_supported"),
        ({"add_zero_attn": True}, "modifier_not_supported"),
    ],
)
def test_what_stays_one_node(options: dict[str, object], reason: str) -> None:
    (row,) = check(Attends(**options), torch.randn(2, T, E))
    assert (row.decision, row.reason) == ("kept", reason)


def test_dropout_in_training_stays_dense() -> None:
    fast = torch.compile(Attends(dropout=0.5), backend="nsa", options=OPTIONS)
    fast(torch.randn(2, T, E))
    (row,) = nsa_compile.report(fast).sites
    assert row.reason == "dropout"


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("train", [False, True])
def test_encoder_layers(train: bool, activation: str, norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(
        E, HEADS, 48, 0.0, activation, batch_first=True, norm_first=norm_first
    )
    model = layer.train(train)
    spelling = "multi_head_attention_forward" if train else "transformer_encoder_layer"
    with torch.set_grad_enabled(train):
        for masks, proven in (
            ({}, "full"),
            ({"src_key_padding_mask": padding()}, "padding"),
        ):
            torch._dynamo.reset()
            (row,) = check(model, torch.randn(2, T, E), **masks)
            assert (row.decision, row.spelling) == ("converted", spelling), row.reason_text
            assert row.mask == proven


def test_a_fused_encoder_under_a_causal_mask() -> None:
    layer = nn.TransformerEncoderLayer(E, HEADS, 48, batch_first=True)
    model = InGraph(nn.TransformerEncoder(layer, 2), "float", "mask").eval()
    with torch.no_grad():
        rows = check(model, torch.randn(2, T, E), is_causal=True)
    assert [(r.decision, r.mask) for r in rows] == [("converted", "causal")] * 2, rows


def test_a_graph_whose_calls_stay_is_the_identical_graph() -> None:
    model, x = Attends(weights=True), torch.randn(2, T, E)
    captured: list[str] = []

    def capture(gm: torch.fx.GraphModule, _: object):
        captured.append(gm.code)
        before = gm.graph
        nsa_compile.passes.pipeline.convert(gm, nsa_compile.NSAConfig())
        assert gm.graph is before
        captured.append(gm.code)
        return gm.forward

    torch.compile(model, backend=capture)(x)
    assert captured[0] == captured[1]
    assert F.multi_head_attention_forward.__name__ in captured[0]
