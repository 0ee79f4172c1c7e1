"""Attention inside higher-order operators: found, proven, rewritten in its body."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

import nsa_compile

Tensor = torch.Tensor
# A budget that covers every key: the converted model must equal the dense one.
OPTIONS = {
    "dense_len": 0, "select_block": 16, "query_tile": 16, "window": 16, "num_selected": 32,
    "inner": "aot_eager",
}  # fmt: skip


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, 4, 8).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return x + y.transpose(1, 2).reshape(b, t, 32)


class Model(nn.Module):
    """Two checkpointed layers under ``mask(x, *extra)``."""

    def __init__(self, mask: Callable[..., Tensor | None], wrap: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.mask = mask
        self.wrap = wrap

    def forward(self, x: Tensor, *extra: Tensor) -> Tensor:
        mask = self.mask(x, *extra)
        for layer in self.layers:
            x = self.wrap(layer, x, mask)
        return x


def checkpointed(layer: nn.Module, *args: Any) -> Any:
    return checkpoint(layer, *args, use_reentrant=False)


def nested(layer: nn.Module, *args: Any) -> Any:
    return checkpoint(lambda *a: checkpointed(layer, *a), *args, use_reentrant=False)


def causal(x: Tensor) -> Tensor:
    i = torch.arange(x.shape[1])
    return i[None, :] <= i[:, None]


MASKS: dict[str, tuple[Callable[..., Tensor | None], str]] = {
    "flag": (lambda x, p: None, "causal"),
    "causal": (lambda x, p: causal(x), "causal"),
    "padding": (lambda x, p: causal(x) & p.bool()[:, None, None, :], "causal & padding"),
    "documents": (
        lambda x, p: causal(x) & (p[:, None, :, None] == p[:, None, None, :]),
        "causal & document",
    ),
    "prefix": (
        lambda x, p: causal(x) | (torch.arange(x.shape[1]) < p.sum(-1)[:, None, None, None]),
        "causal & prefix(sum_1)",
    ),
}


def run(model: nn.Module, inputs: tuple[Tensor, ...], *, dynamic: bool) -> list[Any]:
    """Output and gradients, dense and converted, compared; the report's rows."""
    torch._dynamo.reset()
    fast = torch.compile(model, backend="nsa", options=OPTIONS, dynamic=dynamic)
    results = []
    for each in (model, fast):
        model.zero_grad()
        y = each(*inputs)
        y.square().mean().backward()
        results.append([y.detach(), *(p.grad.clone() for p in model.parameters())])
    for dense, converted in zip(*results, strict=True):
        torch.testing.assert_close(converted, dense, atol=1e-4, rtol=1e-4)
    return list(nsa_compile.report(fast).sites)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("wrap", [checkpointed, nested])
def test_checkpointed_layers(name: str, wrap: Callable[..., Any], dynamic: bool) -> None:
    mask, expected = MASKS[name]
    x, p = torch.randn(2, 70, 32), torch.randint(0, 2, (2, 70))
    p[:, 0] = 1
    rows = run(Model(mask, wrap), (x, p), dynamic=dynamic)
    assert [(r.decision, r.mask) for r in rows] == [("converted", expected)] * 2, rows[0]
    assert [r.module for r in rows] == ["layers.0", "layers.1"]


def test_a_body_that_is_called_twice() -> None:
    compiled = torch.compiler.nested_compile_region(lambda layer, x, mask: layer(x, mask))
    layer = Layer()

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor, p: Tensor) -> Tensor:
            mask = causal(x) & p.bool()[:, None, None, :]
            return compiled(self.layer, compiled(self.layer, x, mask), mask)

    p = torch.randint(0, 2, (2, 70))
    p[:, 0] = 1
    rows = run(Shared(), (torch.randn(2, 70, 32), p), dynamic=False)
    assert [r.decision for r in rows] == ["converted"] * 2


def test_calls_of_one_body_that_differ_stay_dense() -> None:
    compiled = torch.compiler.nested_compile_region(lambda layer, x, mask: layer(x, mask))

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Layer()

        def forward(self, x: Tensor, p: Tensor) -> Tensor:
            first, second = causal(x) & (p[:, None, None, :] != 0), causal(x).expand(2, 1, 70, 70)
            return compiled(self.layer, compiled(self.layer, x, first), second)

    p = torch.randint(0, 2, (2, 70))
    p[:, 0] = 1
    rows = run(Shared(), (torch.randn(2, 70, 32), p), dynamic=False)
    assert len(rows) == 2
    decisions = {r.decision for r in rows}
    assert decisions == {"kept"} or len({r.mask for r in rows}) == 2


def test_the_mask_is_no_operand_any_more_and_the_original_is_untouched() -> None:
    graphs: list[fx.GraphModule] = []
    before: list[str] = []

    def backend(gm: fx.GraphModule, inputs: list[Tensor]) -> Any:
        from nsa_compile.passes.config import NSAConfig
        from nsa_compile.passes.pipeline import convert
        from nsa_compile.passes.snapshot import Snapshot

        before.append(str(gm.wrap_body_0.graph))
        snapshot = Snapshot(gm)
        convert(gm, NSAConfig.from_options(OPTIONS))
        graphs.extend([gm, snapshot.module()])
        return gm

    torch._dynamo.reset()
    model = Model(MASKS["padding"][0], checkpointed)
    torch.compile(model, backend=backend)(torch.randn(2, 70, 32), torch.ones(2, 70))
    gm, original = graphs
    assert str(original.wrap_body_0.graph) == before[0]
    for node in gm.graph.nodes:
        fake = node.meta.get("example_value")
        if isinstance(fake, Tensor):
            assert fake.shape[-2:] != (70, 70), f"%{node.name} is still there"


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_llama_with_gradient_checkpointing(padded: bool, dynamic: bool) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    inner = transformers.LlamaForCausalLM(config).train()
    inner.gradient_checkpointing_enable({"use_reentrant": False})

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = inner

        def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
            # Rows of padding may hold anything.
            logits = self.model(ids, attention_mask=mask).logits
            return logits if mask is None else logits * mask[..., None]

    mask = torch.ones(2, 70, dtype=torch.long)
    mask[0, :9] = 0
    mask[1, -5:] = 0
    inputs = (torch.randint(0, 64, (2, 70)), *([mask] if padded else []))
    rows = run(Logits(), inputs, dynamic=dynamic)
    assert [r.decision for r in rows] == ["converted"] * 2, rows[0]
    assert {r.mask for r in rows} == {"causal & padding" if padded else "causal"}
    assert all("self_attn" in r.module for r in rows)


class SelfAttention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True, **options)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x + self.attention(x, x, x, attn_mask=~mask, need_weights=False)[0]


class Stacked(Model):
    """The layers of :class:`Model` with one hidden call each."""

    def __init__(self, layer: Callable[[], nn.Module], wrap: Callable[..., Any]) -> None:
        super().__init__(lambda x: causal(x), wrap)
        self.layers = nn.ModuleList([layer(), layer()])


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("wrap", [checkpointed, nested])
def test_multi_head_attention_in_a_body(wrap: Callable[..., Any], dynamic: bool) -> None:
    rows = run(Stacked(SelfAttention, wrap), (torch.randn(2, 70, 32),), dynamic=dynamic)
    found = [(r.decision, r.mask, r.spelling) for r in rows]
    assert found == [("converted", "causal", "multi_head_attention_forward")] * 2, rows[0]


def test_multi_head_attention_in_a_body_that_is_called_twice() -> None:
    compiled = torch.compiler.nested_compile_region(lambda layer, x, mask: layer(x, mask))

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = SelfAttention()

        def forward(self, x: Tensor) -> Tensor:
            mask = causal(x)
            return compiled(self.layer, compiled(self.layer, x, mask), mask)

    rows = run(Shared(), (torch.randn(2, 70, 32),), dynamic=False)
    assert [r.decision for r in rows] == ["converted"] * 2


def test_a_refused_call_in_a_body_says_why() -> None:
    model = Stacked(lambda: SelfAttention(add_zero_attn=True), checkpointed)
    rows = run(model, (torch.randn(2, 70, 32),), dynamic=False)
    assert [(r.decision, r.reason) for r in rows] == [("kept", "modifier_not_supported")] * 2


def test_weights_that_leave_a_body_keep_the_call() -> None:
    class Weights(SelfAttention):
        def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return self.attention(x, x, x, attn_mask=~mask)

    def wrap(layer: nn.Module, *args: Any) -> Any:
        out, weights = checkpointed(layer, *args)
        return out + weights.mean()

    rows = run(Stacked(Weights, wrap), (torch.randn(2, 70, 32),), dynamic=False)
    assert [(r.decision, r.reason) for r in rows] == [("kept", "weights_escape")] * 2


def test_a_fused_encoder_layer_in_a_body() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True).eval()
    compiled = torch.compiler.nested_compile_region(lambda x: layer(x))
    torch._dynamo.reset()
    x = torch.randn(2, 70, 32)
    with torch.no_grad():
        fast = torch.compile(lambda x: compiled(compiled(x)), backend="nsa", options=OPTIONS)
        torch.testing.assert_close(fast(x), layer(layer(x)), atol=1e-4, rtol=1e-4)
    rows = nsa_compile.report(fast).sites
    assert {(r.decision, r.spelling) for r in rows} == {("converted", "transformer_encoder_layer")}


def test_flex_attention_in_a_body() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    def attend(q: Tensor) -> Tensor:
        def past(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return torch.where(i >= j, score, -float("inf"))

        return flex_attention(q, q, q, score_mod=past)

    compiled = torch.compiler.nested_compile_region(attend)
    torch._dynamo.reset()
    q = torch.randn(2, 4, 128, 16)
    fast = torch.compile(lambda q: compiled(compiled(q)), backend="nsa", options=OPTIONS)
    torch.testing.assert_close(fast(q), attend(attend(q)), atol=1e-4, rtol=1e-4)
    rows = nsa_compile.report(fast).sites
    assert [(r.decision, r.mask) for r in rows] == [("converted", "causal")] * 2
