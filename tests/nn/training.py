"""Models of three makers and a training loop with all that trainers do."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

VOCABULARY = 48


@dataclass(frozen=True)
class Sizes:
    width: int = 32
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    length: int = 64


class CausalAttention(nn.Module):
    """As in nanoGPT without flash attention: products, a buffer as the mask, softmax."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.c_attn = nn.Linear(sizes.width, 3 * sizes.width)
        self.c_proj = nn.Linear(sizes.width, sizes.width)
        tril = torch.tril(torch.ones(2 * sizes.length, 2 * sizes.length))
        self.register_buffer("bias", tril[None, None])

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.size()
        q, k, v = self.c_attn(x).split(width, dim=2)
        q, k, v = (
            y.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for y in (q, k, v)
        )
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :length, :length] == 0, float("-inf"))
        y = F.softmax(att, dim=-1) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(batch, length, width))


class Block(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(sizes.width), nn.LayerNorm(sizes.width)
        self.attn = CausalAttention(sizes)
        self.mlp = nn.Sequential(
            nn.Linear(sizes.width, 2 * sizes.width),
            nn.GELU(),
            nn.Linear(2 * sizes.width, sizes.width),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCABULARY, sizes.width)
        self.wpe = nn.Embedding(2 * sizes.length, sizes.width)
        self.h = nn.ModuleList(Block(sizes) for _ in range(sizes.layers))
        self.lm_head = nn.Linear(sizes.width, VOCABULARY, bias=False)
        self.wte.weight = self.lm_head.weight
        for embedding in (self.lm_head, self.wpe):
            nn.init.normal_(embedding.weight, std=0.02)
        self.checkpointed = False

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        for block in self.h:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.lm_head(x)


def nanogpt(sizes: Sizes, checkpointed: bool) -> nn.Module:
    model = NanoGPT(sizes)
    model.checkpointed = checkpointed
    return model


def llama(sizes: Sizes, checkpointed: bool) -> nn.Module:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=sizes.width, intermediate_size=2 * sizes.width, vocab_size=VOCABULARY,
        num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads, max_position_embeddings=2 * sizes.length,
        use_cache=False,
    )  # fmt: skip
    return _hugging_face(transformers.LlamaForCausalLM(config), checkpointed)


def gpt2(sizes: Sizes, checkpointed: bool) -> nn.Module:
    import transformers

    config = transformers.GPT2Config(
        n_embd=sizes.width, n_layer=sizes.layers, n_head=sizes.heads, vocab_size=VOCABULARY,
        n_positions=2 * sizes.length, resid_pdrop=0.1, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=None, eos_token_id=None, use_cache=False,
    )  # fmt: skip
    return _hugging_face(transformers.GPT2LMHeadModel(config), checkpointed)


def _hugging_face(model: Any, checkpointed: bool) -> nn.Module:
    if checkpointed:
        name = "activation_checkpointing_enable"  # of transformers 5.23 and later
        getattr(model, name, model.gradient_checkpointing_enable)({"use_reentrant": False})
    made: nn.Module = model
    return made


MODELS: dict[str, Callable[[Sizes, bool], nn.Module]] = {
    "llama": llama,
    "gpt2": gpt2,
    "nanogpt": nanogpt,
}


def tokens(length: int, batch: int, seed: int) -> Tensor:
    """Sequences that count upward by steps of their own, which shows after a few tokens."""
    chosen = torch.Generator().manual_seed(seed)
    start = torch.randint(0, VOCABULARY, (batch, 1), generator=chosen)
    step = torch.randint(1, 4, (batch, 1), generator=chosen)
    return (start + step * torch.arange(length)) % VOCABULARY


def logits(out: Any) -> Tensor:
    found: Tensor = getattr(out, "logits", out)
    return found


def train(
    model: nn.Module, fast: Any, sizes: Sizes, steps: int, *, accumulate: int = 2,
    autocast: bool = True, rate: float = 2e-2,
) -> list[float]:  # fmt: skip
    """AdamW with warm-up and decay, gradient accumulation, clipping, autocast to bfloat16."""
    model.train()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    other = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": other, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    device = next(model.parameters()).device
    losses = []
    for step in range(steps):
        total = 0.0
        for part in range(accumulate):
            ids = tokens(sizes.length + 1, 4, step * accumulate + part).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                out = logits(fast(ids[:, :-1]))
                loss = F.cross_entropy(out.float().flatten(0, 1), ids[:, 1:].flatten())
            (loss / accumulate).backward()
            total += loss.item() / accumulate
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total)
    return losses
