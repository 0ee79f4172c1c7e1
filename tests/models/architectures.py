"""Tiny real models for whole-path tests: their public configurations, shrunk."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

VOCABULARY = 61
WIDTH = 64
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class TrilAttention(nn.Module):
    """Causal attention whose mask is a slice of a ``tril`` buffer, as nanoGPT registers it."""

    def __init__(self, heads: int = 4, context: int = 1024) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        mask = torch.tril(torch.ones(context, context)).view(1, 1, context, context)
        self.register_buffer("bias", mask)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        q, k, v = (
            y.view(b, t, self.heads, -1).transpose(1, 2) for y in self.qkv(x).split(WIDTH, dim=2)
        )
        mask = self.bias[:, :, :t, :t] == 1
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).reshape(b, t, WIDTH))


class TrilGPT(nn.Module):
    """Two residual layers of :class:`TrilAttention`: ids [B, T] -> logits [B, T, vocabulary]."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(TrilAttention() for _ in range(layers))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(self.norm(x))
        return self.head(x)


def _hf(name: str, attention: str = "sdpa", **sizes: object) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(**sizes)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "tril_gpt": TrilGPT,
    "llama": lambda: _hf("Llama", **_SIZES),
    "gpt2": lambda: _hf(
        "GPT2", vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2,
    ),
    "qwen3": lambda: _hf("Qwen3", **_SIZES, head_dim=32),
    # A window past the budget of equality.FULL_BUDGET, or the layers would be local already.
    "mistral": lambda: _hf("Mistral", **_SIZES, sliding_window=520),
    # Written out, with a cap that the small logits of fresh weights reach.
    "gemma2": lambda: _hf(
        "Gemma2", "eager", **_SIZES, head_dim=16, sliding_window=520, attn_logit_softcapping=0.3
    ),
    "gpt_oss": lambda: _hf(
        "GptOss", "eager", **_SIZES, head_dim=16, sliding_window=520, num_local_experts=2,
        num_experts_per_tok=1,
    ),
    "bloom": lambda: _hf(
        "Bloom", "eager", vocab_size=VOCABULARY, hidden_size=WIDTH, n_layer=2, n_head=4
    ),
}  # fmt: skip


def build(name: str) -> nn.Module:
    """The model, with seeded weights large enough that attention is far from uniform."""
    torch.manual_seed(0)
    model = ARCHITECTURES[name]().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.25)
    return model


def run(model: Callable[..., object], ids: torch.Tensor, **kwargs: object) -> torch.Tensor:
    """Logits of ``model``, whatever it wraps them in."""
    out = model(ids, **kwargs)
    return out if isinstance(out, torch.Tensor) else out.logits
