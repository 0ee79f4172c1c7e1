"""The calls that are compared: dense attention, and the converted path whole and in stages."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nsa_compile.bench.gated import GatedPath
from nsa_compile.bench.settings import Settings

# In the order in which they run; a path has some of them.
STAGES = (
    "summary", "compress", "compressed", "select", "refine", "attend", "selected",
    "window and sum",
)  # fmt: skip
_ABSENT = (None,) * 6  # valid, ranges, two of segments, slopes, positions
# Fastest first, as measured on one H100: 56 ms cuDNN, 103 ms flash at 65,536 tokens, 32 heads.
_BACKENDS = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)


def fastest_dense(
    device: str, qkv: tuple[Tensor, ...], call: Callable[..., Tensor]
) -> tuple[str, Callable[..., Tensor]]:
    """The first SDPA backend that takes ``call(*qkv)``: its name, and ``call`` with it."""
    if device != "cuda":
        return "cpu", call

    def with_backend(backend: SDPBackend, *inputs: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return call(*inputs)

    for backend in _BACKENDS:
        chosen = functools.partial(with_backend, backend)
        try:
            chosen(*qkv)
        except RuntimeError:
            continue
        return backend.name.removesuffix("_ATTENTION").lower(), chosen
    raise RuntimeError(f"no SDPA backend takes inputs of shape {tuple(qkv[0].shape)}")


def dense(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Tensor:
    """Attention as a model calls it."""
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
    )


class ConvertedPath:
    """What the rewriter puts in the place of SDPA, whole and in stages."""

    def __init__(self, settings: Settings, path: str) -> None:
        self.settings, self.config = settings, settings.config(path)
        tiling = (settings.query_tile, settings.block)
        self.logits = (settings.dim**-0.5, 0.0, True, 0, None, *tiling)
        self.proposed = self.config.proposed_blocks(settings.dim)
        self.refined = self.proposed > settings.num_selected

    def sparse(self) -> ConvertedPath:
        """The same at ``dense_len=0``."""
        return ConvertedPath(replace(self.settings, dense_len=0), str(self.config.scorer))

    def is_dense(self, length: int) -> bool:
        return length <= self.settings.dense_len

    def inputs(self, qkv: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What it is called with: q, k and v."""
        return qkv

    def summary(self, q: Tensor, k: Tensor) -> Tensor:
        s = self.settings
        if self.config.scorer == "channels":
            kept = self.config.channels(s.dim)
            return _as_tensor(torch.ops.nsa.channels(q, k, None, kept, s.dense_len))
        compression = (s.compress_block, s.compress_stride)
        return _as_tensor(torch.ops.nsa.compress(k, None, *compression, 0, s.dense_len))

    def select(self, q: Tensor, k: Tensor, summary: Tensor) -> Tensor:
        s = self.settings
        picked = torch.ops.nsa.select_blocks(
            q, k, summary, *_ABSENT, self.config.scorer, *self.logits,
            self.proposed, s.init_blocks, s.window, s.compress_block, s.compress_stride,
            s.dense_len,
        )  # fmt: skip
        return _as_tensor(picked)

    def refine(self, q: Tensor, k: Tensor, candidates: Tensor) -> Tensor:
        s = self.settings
        if not self.refined:
            return candidates
        picked = torch.ops.nsa.refine_blocks(
            q, k, candidates, *_ABSENT, *self.logits, s.num_selected, s.init_blocks, s.window,
            s.dense_len,
        )  # fmt: skip
        return _as_tensor(picked)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor) -> Tensor:
        dense_len = self.settings.dense_len
        out, _ = torch.ops.nsa.selected_attention(
            q, k, v, blocks, *_ABSENT, *self.logits, dense_len
        )
        return _as_tensor(out)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        blocks = self.refine(q, k, self.select(q, k, self.summary(q, k)))
        return self.attend(q, k, v, blocks)

    def stages(self, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], object]]:
        """Each operator on its own; their times add up to more than the whole takes."""
        summary = self.summary(q, k)
        candidates = self.select(q, k, summary)
        blocks = self.refine(q, k, candidates)
        calls: dict[str, Callable[[], object]] = {
            "summary": functools.partial(self.summary, q, k),
            "select": functools.partial(self.select, q, k, summary),
            "refine": functools.partial(self.refine, q, k, candidates),
            "attend": functools.partial(self.attend, q, k, v, blocks),
        }
        if not self.refined:
            del calls["refine"]
        return calls


def path_of(settings: Settings, name: str) -> ConvertedPath | GatedPath:
    """The path of a name of ``PATHS``."""
    return GatedPath(settings) if name == "gate" else ConvertedPath(settings, name)


def backward_of(forward: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    """The gradient of ``forward`` with respect to its inputs, to be called again and again."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = forward(*leaves)
    upstream = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True)


def forward_and_backward(forward: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
    """One training step's worth of ``forward``; nothing of it is kept."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = forward(*leaves)
    torch.autograd.grad(out, leaves, torch.ones_like(out))


def _as_tensor(x: Any) -> Tensor:
    assert isinstance(x, Tensor)
    return x
