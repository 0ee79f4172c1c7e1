"""Masks of real architectures: every attention is found, proven, and equal to the mask that ran."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.passes.checking import Checker

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# name: (extra configuration, query heads, key/value heads, mask of each layer but for padding)
ARCHITECTURES: dict[str, tuple[dict[str, Any], int, int, list[str]]] = {
    "llama": ({}, 4, 2, ["causal"]),
    "mistral": ({"sliding_window": 8}, 4, 2, ["causal & window(8)"]),
    "qwen3": ({"head_dim": 16}, 4, 2, ["causal"]),
    "gpt2": ({}, 4, 4, ["causal"]),
    "phi3": ({"sliding_window": 8}, 4, 2, ["causal & window(8)"]),
    "qwen2_moe": ({"moe_intermediate_size": 32, "num_experts": 4}, 4, 2, ["causal"]),
    "cohere": ({}, 4, 2, ["causal"]),
    "olmo2": ({}, 4, 2, ["causal"]),
    "starcoder2": ({"sliding_window": 8}, 4, 2, ["causal & window(8)"]),
    "gpt_neox": ({}, 4, 4, ["causal"]),
    "opt": ({"ffn_dim": 32, "word_embed_proj_dim": 32}, 4, 4, ["causal"]),
    "falcon": ({}, 4, 1, ["causal"]),
    "mixtral": ({"num_local_experts": 2}, 4, 2, ["causal"]),
    "gemma3_text": (
        {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
        4,
        2,
        ["causal & window(8)", "causal"],
    ),
    "cohere2": (
        {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]},
        4,
        2,
        ["causal", "causal & window(8)"],
    ),
}


def build(name: str) -> nn.Module:
    extra, _, _, masks = ARCHITECTURES[name]
    sizes = {**SIZES, "num_hidden_layers": len(masks), **extra}
    config = transformers.AutoConfig.for_model(name, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    return model.eval()


def run(name: str, *, padded: bool, dynamic: bool, cache: bool = False) -> Checker:
    torch._dynamo.reset()
    checker = Checker()
    model = torch.compile(build(name), backend=checker, dynamic=dynamic or None)
    for length in (12, 19) if dynamic else (12,):
        arguments: dict[str, Any] = {"use_cache": cache}
        if padded:
            arguments["attention_mask"] = torch.ones(2, length, dtype=torch.long)
            arguments["attention_mask"][0, :5] = 0
            arguments["attention_mask"][1, -3:] = 0
        with torch.no_grad():
            model(torch.randint(0, 64, (2, length)), **arguments)
    return checker


def expect(name: str, checker: Checker, *, padded: bool) -> None:
    _, q_heads, kv_heads, masks = ARCHITECTURES[name]
    assert checker.masks == [f"{mask} & padding" if padded else mask for mask in masks]
    for layer, site in enumerate(checker.sites):
        assert (site.q_heads, site.kv_heads) == (q_heads, kv_heads)
        assert f".{layer}." in site.module
        assert site.module_class.endswith(("Attention", "SdpaAttention"))
        assert site.source.startswith(f"transformers/models/{name.removesuffix('_text')}/modeling")
        assert isinstance(site.scale, float)
        assert site.dropout == 0.0
    assert checker.checked >= len(checker.sites)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "opt", "falcon", "cohere2"])
def test_static_without_mask(name: str) -> None:
    expect(name, run(name, padded=False, dynamic=False), padded=False)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_dynamic_with_padding(name: str) -> None:
    checker = run(name, padded=True, dynamic=True)
    expect(name, checker, padded=True)
    assert len(checker.graphs) == 1, "one compile serves both lengths"


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_static_with_padding(name: str) -> None:
    expect(name, run(name, padded=True, dynamic=False), padded=True)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text"])
def test_dynamic_without_mask(name: str) -> None:
    expect(name, run(name, padded=False, dynamic=True), padded=False)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_prefill_of_a_cache(name: str, padded: bool) -> None:
    expect(name, run(name, padded=padded, dynamic=False, cache=True), padded=padded)


def test_an_encoder_has_padding_only() -> None:
    config = transformers.BertConfig(**SIZES)
    model = transformers.BertModel(config).eval()
    torch._dynamo.reset()
    checker = Checker()
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, 7:] = 0
    with torch.no_grad():
        torch.compile(model, backend=checker)(torch.randint(0, 64, (2, 12)), attention_mask=mask)
    assert checker.masks == ["padding"]
    assert checker.checked == 1
