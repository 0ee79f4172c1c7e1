"""prepare: eager models stay what they were, compiled ones compute the gated branches and train."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import nsa_compile
from nsa_compile import ConversionWarning, NSAConfigError, NSAParameters, backend
from tests.nn import learned_reference

SIZES: dict[str, Any] = {
    "merge": "gate", "compress_block": 8, "compress_stride": 4, "select_block": 8,
    "num_selected": 4, "window": 10, "query_tile": 1,
}  # fmt: skip


class Attention(nn.Module):
    def __init__(self, width: int = 16, heads: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


class GPT(nn.Module):
    """Token ids [B, T] -> logits [B, T, 32]."""

    def __init__(self, layers: int = 2, checkpointed: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Embedding(32, 16)
        self.layers = nn.ModuleList(Attention() for _ in range(layers))
        self.head = nn.Linear(16, 32)
        self.checkpointed = checkpointed

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        for layer in self.layers:
            x = x + (checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x))
        return self.head(x)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def ids(length: int = 40, batch: int = 2) -> Tensor:
    return torch.randint(0, 32, (batch, length))


def prepared(model: nn.Module | None = None, **options: Any) -> nn.Module:
    """A prepared model whose parameters are not at their beginning."""
    model = nsa_compile.prepare(model or GPT(), {**SIZES, **options})
    with torch.no_grad():
        for own in parameters_of(model).values():
            for parameter in own.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def parameters_of(model: nn.Module) -> dict[str, NSAParameters]:
    return {path: m for path, m in model.named_modules() if isinstance(m, NSAParameters)}


def compiled(model: nn.Module, inner: str = "eager", **given: Any) -> Any:
    return torch.compile(model, backend="nsa", options={"inner": inner}, **given)


def verdicts(fast: Any) -> list[tuple[str, str | None]]:
    return [(site.module, site.reason) for site in nsa_compile.report(fast).sites]


@contextmanager
def by_reference(model: nn.Module) -> Iterator[None]:
    """Run ``model`` eagerly with the reference in place of every prepared attention."""
    current: list[Any] = []

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        current[:] = [module.nsa, args[0] if args else kwargs["hidden_states"]]

    def attend(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return learned_reference.attention(*current, q, k, v, scale=kwargs.get("scale"))

    owners = [module for module in model.modules() if hasattr(module, "nsa")]
    hooks = [owner.register_forward_pre_hook(enter, with_kwargs=True) for owner in owners]
    with mock.patch.object(F, "scaled_dot_product_attention", attend):
        yield
    for hook in hooks:
        hook.remove()


def agree(
    model: nn.Module, fast: Any, tokens: Tensor, pick: Any = lambda out: out, sure: bool = True
) -> None:
    """Compiled output and every gradient are those of the reference in float64."""
    exact = copy.deepcopy(model).double()
    with by_reference(exact):
        wanted = pick(exact(tokens))
        wanted.square().mean().backward()
    model.zero_grad()
    out = pick(fast(tokens))
    out.square().mean().backward()
    torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=1e-4)
    for (name, p), true in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert p.grad is not None, name
        assert p.grad.abs().max() > 0 or not sure, name
        grad = torch.zeros_like(true) if true.grad is None else true.grad  # no block: not read
        torch.testing.assert_close(p.grad.double(), grad, rtol=1e-3, atol=1e-5, msg=name)


def test_eager_and_keys_are_what_they_were_and_unprepare_restores_them() -> None:
    model, tokens = GPT(), ids()
    before, keys = model(tokens), list(model.state_dict())
    hooks = [dict(module._forward_pre_hooks) for module in model.modules()]
    assert nsa_compile.prepare(model, SIZES) is model
    added = [key for key in model.state_dict() if key not in keys]
    assert added == [f"layers.{i}.nsa.gate.{name}" for i in (0, 1) for name in ("weight", "bias")]
    assert torch.equal(model(tokens), before)
    assert nsa_compile.unprepare(model) is model
    assert list(model.state_dict()) == keys
    assert [dict(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert not any(module._forward_pre_hooks_with_kwargs for module in model.modules())


@pytest.mark.parametrize("kind", ["mean", "mlp", "attention"])
def test_compiled_equals_the_reference(kind: str) -> None:
    model = prepared(compression=kind, num_mem_kv=1)
    fast = compiled(model)
    agree(model, fast, ids(45))
    assert verdicts(fast) == [("layers.0", None), ("layers.1", None)]


def test_one_dynamic_compilation_serves_odd_lengths() -> None:
    model = prepared(compression="linear", num_mem_kv=1)
    fast = compiled(model, "aot_eager", dynamic=True)
    for length in (120, 31, 4, 32):
        agree(model, fast, ids(length), sure=length > 8)
    assert all("," not in site.compile_id for site in nsa_compile.report(fast).sites)


def test_inductor_compiles_it() -> None:
    model = prepared(GPT(1), compression="conv")
    agree(model, compiled(model, "inductor"), ids(33))


def test_no_mark_is_left_in_the_graph() -> None:
    graphs = []

    def inner(gm: Any, inputs: Any) -> Any:
        graphs.append(str(gm.graph))
        return gm

    for options in ({}, {"exclude": ["layers.*"]}):
        torch._dynamo.reset()
        model = prepared()
        with mock.patch.object(backend, "lookup_backend", return_value=inner):
            fast = torch.compile(model, backend="nsa", options={"inner": "eager", **options})
            fast(ids())
    assert len(graphs) == 2
    assert not any("nsa.site" in graph for graph in graphs)


def test_a_kept_layer_names_its_unused_parameters() -> None:
    model = prepared(GPT(2))
    model.layers[1].dropout = 0.1
    fast = compiled(model)
    fast(ids())
    row = nsa_compile.report(fast).skipped[0]
    names = ["layers.1.nsa.gate.weight", "layers.1.nsa.gate.bias"]
    assert (row.module, row.reason) == ("layers.1", "dropout")
    assert row.extra["unused_parameters"] == names
    assert row.reason_text is not None
    assert row.reason_text.endswith(f"its parameters are not used: {', '.join(names)}")
    fast(ids()).sum().backward()
    assert model.layers[1].nsa.gate.weight.grad is None


def test_layers_are_chosen_and_sized() -> None:
    sizes = {"exclude": ["*.1"], "per_layer": {"layers.2": {"window": 3}}}
    model = nsa_compile.prepare(GPT(3), {**SIZES, **sizes})
    assert list(parameters_of(model)) == ["layers.0.nsa", "layers.2.nsa"]
    fast = compiled(model)
    fast(ids())
    rows = nsa_compile.report(fast).sites
    assert [row.decision for row in rows] == ["converted"] * 3
    windows = [row.config["window"] for row in rows if row.config is not None]
    assert windows == [10, 1024, 3]  # layers.1 is converted without training


def test_save_and_load_into_a_fresh_model_gives_the_same_logits() -> None:
    model = prepared(compression="mlp", compress_expand=0.2, num_mem_kv=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    fast, tokens = compiled(model), ids()
    losses = []
    for _ in range(4):
        loss = F.cross_entropy(fast(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    torch.manual_seed(1)
    fresh = nsa_compile.prepare(
        GPT(), {**SIZES, "compression": "mlp", "compress_expand": 0.2, "num_mem_kv": 2}
    )
    fresh.load_state_dict(torch.load(file))
    other = compiled(fresh)
    with torch.no_grad():
        for length in (40, 57):
            again = ids(length)
            assert torch.equal(fast(again), other(again))


def test_a_copy_is_on_its_own() -> None:
    model = prepared(compression="weighted")
    twin = copy.deepcopy(model)
    tokens = ids()
    before = compiled(model)(tokens)
    assert torch.equal(compiled(twin)(tokens), before)
    with torch.no_grad():
        twin.layers[0].nsa.gate.bias.add_(1.0)
    assert not torch.allclose(compiled(twin)(tokens), before)
    assert torch.equal(compiled(model)(tokens), before)


def test_a_parametrization_of_a_gate_counts() -> None:
    class Halved(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / 2

    model, tokens = prepared(GPT(1)), ids()
    plain = copy.deepcopy(model)
    nn.utils.parametrize.register_parametrization(model.layers[0].nsa.gate, "weight", Halved())
    with torch.no_grad():
        plain.layers[0].nsa.gate.weight.div_(2)
    torch.testing.assert_close(compiled(model)(tokens), compiled(plain)(tokens))


def test_a_new_dtype_reaches_the_parameters() -> None:
    model = prepared(compression="mlp", compress_expand=0.2).to(torch.bfloat16)
    fast = compiled(model)
    assert fast(ids()).dtype == torch.bfloat16
    assert verdicts(fast) == [("layers.0", None), ("layers.1", None)]


def test_autocast_trains() -> None:
    model = prepared(compression="attention")
    fast = compiled(model, "aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        out = fast(ids())
    out.float().square().mean().backward()
    assert verdicts(fast) == [("layers.0", None), ("layers.1", None)]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_checkpointed_layers(inner: str) -> None:
    model = prepared(GPT(checkpointed=True), compression="linear")
    fast = compiled(model, inner)
    agree(model, fast, ids())
    assert [reason for _, reason in verdicts(fast)] == [None, None]


class Residual(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x)


def test_blocks_compiled_one_by_one_share_code() -> None:
    model = nn.Sequential(*(Residual(Attention()) for _ in range(3)))
    x = torch.randn(2, 40, 16, requires_grad=True)
    nsa_compile.prepare(model, {**SIZES, "compression": "linear"}, example_inputs=x)
    whole = compiled(copy.deepcopy(model))(x)
    for block in model:
        block.compile(backend="nsa", options={"inner": "eager"})
    torch.testing.assert_close(model(x), whole)
    (row,) = nsa_compile.report(model).sites
    assert (row.decision, row.config and row.config["compression"]) == ("converted", "linear")


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_mark_outside_the_graph_keeps_the_layer(wrapped: bool) -> None:
    """torch.compile leaves the hooks of the module that it is given to eager mode."""
    model, x = Attention(), torch.randn(2, 40, 16)
    nsa_compile.prepare(model, SIZES, example_inputs=x)
    before = model(x)
    with torch._dynamo.config.patch(wrap_top_frame=wrapped):
        fast = torch.compile(
            model, backend="nsa", options={"inner": "eager", "dense_len": 0, "window": 2}
        )
        out = fast(x)
    (row,) = nsa_compile.report(fast).sites
    if wrapped:
        assert row.decision == "converted"
        assert not torch.allclose(out, before)
        return
    torch.testing.assert_close(out, before)
    assert (row.decision, row.reason) == ("kept", "not_prepared")
    assert row.reason_text is not None
    assert "wrap_top_frame" in row.reason_text


@pytest.mark.parametrize("use_cache", [False, True])
def test_hugging_face_models(use_cache: bool) -> None:
    transformers = pytest.importorskip("transformers")
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=32, use_cache=use_cache,
        )
    )  # fmt: skip
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_embd=32, n_layer=1, n_head=4, vocab_size=32, n_positions=64, use_cache=use_cache,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    )  # fmt: skip
    for model, path in ((llama, "model.layers.{}.self_attn"), (gpt2, "transformer.h.{}.attn")):
        prepared(model, compression="weighted", num_mem_kv=1)
        layers = range(len(parameters_of(model)))
        assert list(parameters_of(model)) == [f"{path.format(i)}.nsa" for i in layers]
        fast = compiled(model)
        agree(model, fast, ids(37), pick=lambda out: out.logits)
        assert [reason for _, reason in verdicts(fast)] == [None for _ in layers]


class Core(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Outer(nn.Module):
    """Time-first, and another module computes the attention itself."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.core = nn.Linear(16, 48), Core()

    def forward(self, *, states: Tensor) -> Tensor:
        length, batch, width = states.shape
        qkv = self.qkv(states).view(length, batch, 3, 2, -1).permute(2, 1, 3, 0, 4)
        return self.core(*qkv).permute(2, 0, 1, 3).reshape(length, batch, width)


class TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Outer()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(states=x)


def test_hidden_states_are_found_around_the_attention() -> None:
    model, x = TimeFirst(), torch.randn(21, 3, 16)
    nsa_compile.prepare(model, SIZES, example_inputs=x)
    own = model.layer.nsa
    assert (own.sequence_first, own.source, own.site) == (True, (None, "states"), "core")
    nn.init.normal_(own.gate.weight)
    fast = compiled(model)
    out = fast(x)
    assert verdicts(fast) == [("layer.core", None)]
    q, k, v = model.layer.qkv(x).view(21, 3, 3, 2, -1).permute(2, 1, 3, 0, 4).double()
    own = copy.deepcopy(own).double()
    expected = learned_reference.attention(own, x.transpose(0, 1).double(), q, k, v)
    expected = expected.permute(2, 0, 1, 3).reshape(21, 3, 16)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)


def test_hidden_states_that_are_written_to_keep_the_layer() -> None:
    class Greedy(Attention):
        def forward(self, x: Tensor) -> Tensor:
            batch, length, _ = x.shape
            q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            x.mul_(2)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.out(y.transpose(1, 2).flatten(2)) + x

    model = nn.Sequential(nn.Linear(16, 16), Greedy())
    x = torch.randn(2, 40, 16)
    nsa_compile.prepare(model, SIZES, example_inputs=x)
    fast = compiled(model)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))
    (row,) = nsa_compile.report(fast).sites
    assert row.reason == "not_prepared"
    assert "writes to the hidden states before the attention" in str(row.reason_text)


def test_padding_of_a_hugging_face_model() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=32, use_cache=False,
    )  # fmt: skip
    model = prepared(transformers.LlamaForCausalLM(config), compression="mlp", compress_expand=0.2)
    fast, tokens = compiled(model), ids(40)
    mask = torch.ones_like(tokens)
    mask[0, :13] = 0
    with torch.no_grad():
        first = fast(tokens, attention_mask=mask).logits
        tokens[0, :13] = 3
        second = fast(tokens, attention_mask=mask).logits
    assert "padding" in nsa_compile.report(fast).sites[0].mask
    assert verdicts(fast) == [("model.layers.0.self_attn", None)]
    torch.testing.assert_close(first[0, 13:], second[0, 13:])
    torch.testing.assert_close(first[1], second[1])


def test_what_cannot_be_prepared_is_refused() -> None:
    with pytest.raises(NSAConfigError, match="prepare needs merge='gate', got merge='softmax'"):
        nsa_compile.prepare(GPT(), {"merge": "softmax"})
    with pytest.raises(ValueError, match=r"call nsa_compile.unprepare\(model\) first"):
        nsa_compile.prepare(prepared(), SIZES)
    with pytest.raises(ValueError, match="does not run on token ids"):
        nsa_compile.prepare(nn.Linear(4, 4), SIZES)
    with pytest.raises(ValueError, match="has no attention that could be prepared"):
        nsa_compile.prepare(nn.Linear(4, 4), SIZES, example_inputs=torch.randn(2, 4))


def test_layers_that_stay_dense_get_no_parameters() -> None:
    class Capped(Attention):
        def forward(self, x: Tensor) -> Tensor:
            batch, length, _ = x.shape
            q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            scores = 5.0 * torch.tanh(q @ k.transpose(-1, -2) / 5.0)
            return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    model = GPT(2)
    model.layers[0] = Capped()
    with pytest.warns(ConversionWarning, match=r"layers.0: modifier_not_supported: .*softcap"):
        nsa_compile.prepare(model, SIZES)
    assert list(parameters_of(model)) == ["layers.1.nsa"]
