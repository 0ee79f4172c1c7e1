"""Prepared models that are no plain decoders: encoders, cross attention, odd modules."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

import nsa_compile
from nsa_compile import ConversionWarning, NSAParameters
from tests.nn import learned_reference

SIZES: dict[str, Any] = {
    "merge": "gate", "compress_block": 8, "compress_stride": 4, "select_block": 8,
    "num_selected": 4, "window": 10, "compression": "linear", "num_mem_kv": 1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def prepared(model: nn.Module, inputs: Any, **options: Any) -> nn.Module:
    """A prepared model whose parameters are not at their beginning."""
    nsa_compile.prepare(model, {**SIZES, **options}, example_inputs=inputs)
    with torch.no_grad():
        for own in model.modules():
            if isinstance(own, NSAParameters):
                for parameter in own.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def compiled(model: nn.Module, inner: str = "eager", **given: Any) -> Any:
    return torch.compile(model, backend="nsa", options={"inner": inner}, **given)


def rows(fast: Any) -> dict[str, str | None]:
    return {site.module: site.reason_text for site in nsa_compile.report(fast).sites}


class Attention(nn.Module):
    """Attends from ``x`` to ``memory``, or to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(16, 16), nn.Linear(16, 32), nn.Linear(16, 16)

    def heads(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        def split(y: Tensor) -> Tensor:
            return y.unflatten(2, (2, 8)).transpose(1, 2)

        k, v = self.kv(memory).chunk(2, -1)
        return split(self.q(x)), split(k), split(v)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        q, k, v = self.heads(x, x if memory is None else memory)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))


class Reader(nn.Module):
    """Self and cross attention, neither causal."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.cross = Attention(), Attention()

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = x + self.own(x)
        return x + self.cross(x, memory=memory)


@pytest.mark.parametrize("lengths", [(21, 45), (45, 21), (5, 64), (33, 4)])
def test_cross_attention(lengths: tuple[int, int]) -> None:
    x, memory = (torch.randn(2, length, 16) for length in lengths)
    model = prepared(Reader(), (x, memory))
    assert [path for path, m in model.named_modules() if isinstance(m, NSAParameters)] == [
        "own.nsa", "cross.nsa",
    ]  # fmt: skip
    fast = compiled(model)
    out = fast(x, memory)
    assert rows(fast) == {"own": None, "cross": None}
    exact, wide = copy.deepcopy(model).double(), x.double()
    for layer, given in ((exact.own, None), (exact.cross, memory.double())):
        heads = layer.heads(wide, wide if given is None else given)
        y = learned_reference.attention(layer.nsa, wide, *heads, causal=False)
        wide = wide + layer.out(y.transpose(1, 2).flatten(2))
    torch.testing.assert_close(out.double(), wide, rtol=1e-4, atol=1e-4)
    out.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_one_dynamic_compilation_serves_cross_attention() -> None:
    inputs = torch.randn(2, 21, 16), torch.randn(2, 45, 16)
    model = prepared(Reader(), inputs)
    fast = compiled(model, "aot_eager", dynamic=True)
    for lengths in ((21, 45), (64, 17), (9, 40)):
        x, memory = (torch.randn(2, length, 16) for length in lengths)
        alone = compiled(copy.deepcopy(model))(x, memory)
        torch.testing.assert_close(fast(x, memory), alone, rtol=1e-4, atol=1e-5)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


@pytest.mark.parametrize("training", [False, True])
def test_an_encoder_of_torch(training: bool) -> None:
    x = torch.randn(2, 40, 16)
    model = prepared(encoder(), x).train(training)
    before = model(x)
    fast = compiled(model)
    out = fast(x)
    assert list(rows(fast).values()) == [None, None]
    assert not torch.allclose(out, before, atol=1e-3)
    out.square().mean().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if ".nsa." in name)


def test_an_encoder_decoder_of_torch() -> None:
    source, target = torch.randn(2, 40, 16), torch.randn(2, 24, 16)
    model = nn.Transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(24)
    given = {"src": source, "tgt": target, "tgt_mask": mask, "tgt_is_causal": True}
    model = prepared(model, given)
    owners = [path for path, m in model.named_modules() if isinstance(m, NSAParameters)]
    assert [path.removesuffix(".nsa") for path in owners] == [
        "encoder.layers.0.self_attn", "decoder.layers.0.self_attn",
        "decoder.layers.0.multihead_attn",
    ]  # fmt: skip
    fast = compiled(model)
    fast(**given).sum().backward()
    assert all(text is None for text in rows(fast).values()), rows(fast)


def test_a_bidirectional_hugging_face_encoder() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
        vocab_size=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    ids = torch.randint(0, 32, (2, 40))
    keep = torch.ones_like(ids)
    keep[0, 30:] = 0
    given = {"input_ids": ids, "attention_mask": keep}
    model = prepared(transformers.BertModel(config, add_pooling_layer=False), given)
    fast = compiled(model)
    out = fast(**given).last_hidden_state
    assert list(rows(fast).values()) == [None, None]
    assert all(site.mask == "padding" for site in nsa_compile.report(fast).sites)
    other = ids.clone()
    other[0, 30:] = 5
    again = fast(input_ids=other, attention_mask=keep).last_hidden_state
    torch.testing.assert_close(out[0, :30], again[0, :30])
    out.square().mean().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if ".nsa." in name)


def test_parametrizations_of_model_and_gate_train() -> None:
    model = prepared(nn.Sequential(nn.Linear(16, 16), Attention()), torch.randn(2, 40, 16))
    attention = model[1]
    parametrizations.weight_norm(attention.q, "weight")
    parametrizations.spectral_norm(attention.nsa.gate, "weight")
    assert parametrize.is_parametrized(attention.nsa.gate)
    fast, x = compiled(model, "aot_eager"), torch.randn(2, 40, 16)
    fast(x).square().mean().backward()
    assert rows(fast) == {"1": None}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_other_dtypes_devices_and_copies() -> None:
    x = torch.randn(2, 40, 16)
    model = prepared(nn.Sequential(nn.Linear(16, 16), Attention()), x)
    out = compiled(model)(x)
    narrow = copy.deepcopy(model).to(torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in narrow.parameters())
    fast = compiled(narrow)
    torch.testing.assert_close(fast(x.bfloat16()).float(), out, rtol=0.1, atol=0.1)
    assert rows(fast) == {"1": None}
    empty = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    assert torch.equal(compiled(empty)(x), out)
    names = [name for name in model.state_dict() if name.startswith("1.nsa.")]
    assert names == [f"1.nsa.{name}" for name in model[1].nsa.state_dict()]


def test_meta_models_are_prepared_and_filled_later() -> None:
    x = torch.randn(2, 40, 16)
    real = prepared(nn.Sequential(nn.Linear(16, 16), Attention()), x)
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(16, 16), Attention())
    nsa_compile.prepare(model, SIZES, example_inputs=x)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu").load_state_dict(real.state_dict())
    assert torch.equal(compiled(model)(x), compiled(real)(x))


def test_a_frozen_layer_learns_nothing() -> None:
    x = torch.randn(2, 40, 16)
    model = prepared(nn.Sequential(nn.Linear(16, 16), Attention()), x)
    model[1].nsa.requires_grad_(False)
    fast = compiled(model, "aot_eager")
    fast(x).sum().backward()
    assert all(p.grad is None for p in model[1].nsa.parameters())
    assert model[0].weight.grad is not None


def test_kept_layers_are_reported_with_what_they_do_not_use() -> None:
    x, memory = torch.randn(2, 21, 16), torch.randn(2, 45, 16)
    model = prepared(Reader(), (x, memory))
    fast = torch.compile(model, backend="nsa", options={"inner": "eager", "exclude": ["cross"]})
    fast(x, memory)
    (row,) = nsa_compile.report(fast).skipped
    assert (row.module, row.reason) == ("cross", "excluded")
    names = [f"cross.nsa.{name}" for name in model.cross.nsa.state_dict()]
    assert row.extra["unused_parameters"] == names
    assert str(row.reason_text).endswith(", ".join(names))


def test_attention_that_reads_attention() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(16, 48)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v)
            return F.scaled_dot_product_attention(y, k, v).transpose(1, 2).flatten(2)

    x = torch.randn(2, 40, 16)
    model = prepared(nn.Sequential(nn.Linear(16, 16), Twice()), x)
    fast = compiled(model)
    out = fast(x)
    assert [site.decision for site in nsa_compile.report(fast).sites] == ["converted"] * 2
    own, hidden = copy.deepcopy(model[1].nsa).double(), model[0](x)
    heads = model[1].qkv(hidden).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4).double()
    y = learned_reference.attention(own, hidden.double(), *heads, causal=False)
    y = learned_reference.attention(own, hidden.double(), y, *heads[1:], causal=False)
    torch.testing.assert_close(out.double(), y.transpose(1, 2).flatten(2), rtol=1e-4, atol=1e-4)


def test_a_layer_without_hidden_states_gets_no_parameters() -> None:
    class Bare(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.bare, self.attention = nn.Embedding(32, 16), Bare(), Attention()

        def forward(self, ids: Tensor) -> Tensor:
            heads = self.tokens(ids).unflatten(2, (2, 8)).transpose(1, 2)
            return self.attention(self.bare(heads, heads, heads).transpose(1, 2).flatten(2))

    model, ids = Model(), torch.randint(0, 32, (2, 40))
    with pytest.warns(ConversionWarning, match="bare: no module around it is given its hidden"):
        nsa_compile.prepare(model, SIZES, example_inputs=ids)
    assert not any("bare" in name for name in model.state_dict())


def test_a_layer_with_several_names_has_one_set_of_parameters() -> None:
    x, layer = torch.randn(2, 40, 16), nn.Sequential(nn.LayerNorm(16), Attention())
    model = nn.Sequential(layer, layer, nn.Sequential(nn.LayerNorm(16), layer[1]))
    before = model(x)
    prepared(model, x)
    assert torch.equal(model(x), before)
    assert [path for path, m in model.named_modules() if isinstance(m, NSAParameters)] == [
        "0.1.nsa"
    ]
    fast = compiled(model, "aot_eager")
    out = fast(x)
    assert [site.decision for site in nsa_compile.report(fast).sites] == ["converted"] * 3
    apart = nn.Sequential(*(copy.deepcopy(each) for each in model))
    torch.testing.assert_close(compiled(apart)(x), out)
    out.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    nsa_compile.unprepare(model)
    assert not any(".nsa." in name for name in model.state_dict())


def test_layers_share_a_module_that_has_no_weights() -> None:
    class Core(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    class Around(nn.Module):
        def __init__(self, core: nn.Module) -> None:
            super().__init__()
            self.core, self.qkv = core, nn.Linear(16, 48)

        def forward(self, x: Tensor) -> Tensor:
            return self.core(*self.qkv(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4))

    x, core = torch.randn(2, 40, 16), Core()
    model = prepared(nn.Sequential(Around(core), Around(core)), x)
    owners = [path for path, m in model.named_modules() if isinstance(m, NSAParameters)]
    assert owners == ["0.nsa", "1.nsa"]
    fast = compiled(model)
    fast(x).square().mean().backward()
    assert rows(fast) == {"0.core": None, "1.core": None}
    assert all(p.grad is not None for p in model.parameters())


def test_nothing_is_added_to_a_container_which_would_run_it() -> None:
    class Core(nn.Module):
        def forward(self, heads: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)

    class Heads(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)

    x, attention = torch.randn(2, 40, 16), nn.Sequential(nn.Linear(16, 48), Heads(), Core())
    model = nn.Sequential(attention, Attention())
    before = model(x)
    with pytest.warns(ConversionWarning, match=r"0.2: no module around it is given its hidden"):
        nsa_compile.prepare(model, SIZES, example_inputs=x)
    assert torch.equal(model(x), before)


class Routed(nn.Module):
    """Attention, and an expert for the tokens that are routed to it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.router = Attention(), nn.Linear(16, 2)
        self.expert = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        at = torch.nonzero(self.router(x).argmax(-1), as_tuple=True)
        out = torch.zeros_like(x)
        if len(at[0]) and x.isfinite().all().item():
            out[at] = self.expert(x[at])
        return x + out


def test_a_model_that_reads_tensor_values() -> None:
    x = torch.randn(2, 40, 16)
    model = nn.Sequential(Routed(), Routed())
    before = model(x)
    nsa_compile.prepare(model, SIZES, example_inputs=x)
    assert torch.equal(model(x), before)
    assert model.training
    fast = compiled(model)
    fast(x).square().mean().backward()
    assert rows(fast) == {"0.attention": None, "1.attention": None}
    learned = [p for name, p in model.named_parameters() if ".nsa." in name]
    assert learned
    assert all(p.grad is not None for p in learned)
    with torch.device("meta"):
        bare = nn.Sequential(Routed(), Routed())
    with pytest.raises(ValueError, match="because it reads tensor values: load them before: "):
        nsa_compile.prepare(bare, SIZES, example_inputs=x)
