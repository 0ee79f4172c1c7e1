"""Graphs before and after the rewrite, as text: what a reader of this compiler would print."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

import nsa_compile.kernels.library  # noqa: F401
from nsa_compile.passes import dialect
from nsa_compile.passes.config import NSAConfig
from nsa_compile.passes.pipeline import analyse, rewrite
from tests import golden

GOLDEN = Path(__file__).parent / "golden"
CONFIG = NSAConfig(
    select_block=16, query_tile=16, num_selected=4, window=16, dense_len=0,
    score_channels=8,
)  # fmt: skip


def _sdpa_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _sdpa_window_and_padding(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(q.shape[2])
    mask = (j <= i) & (j > i - 24) & keep[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    length = q.shape[2]
    scores = q @ k.transpose(-2, -1) / 4
    hidden = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)
    scores = scores.masked_fill(hidden, float("-inf"))
    return F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v


def _softcap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    length = q.shape[2]
    scores = 50 * torch.tanh(q @ k.transpose(-2, -1) * 0.25 / 50)
    mask = torch.full((length, length), float("-inf")).triu(1)
    return (scores + mask).softmax(-1) @ v


def _grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x[:, :1].expand(-1, 2, -1, -1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5)


def _unproven(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=q.mean(-1, keepdim=True) > 0)


CASES: dict[str, Callable[..., Tensor]] = {
    f.__name__.strip("_"): f
    for f in (
        _sdpa_causal, _sdpa_window_and_padding, _written_out, _softcap, _grouped, _unproven,
    )
}  # fmt: skip


@pytest.mark.skipif(torch.__version__ < "2.13", reason="older Dynamo names nodes otherwise")
@pytest.mark.parametrize("name", CASES)
def test_graphs(name: str) -> None:
    torch._dynamo.reset()
    texts: list[str] = []

    def backend(gm: fx.GraphModule, _: object) -> Callable[..., object]:
        texts.append(_text(gm))
        rewrite(gm, analyse(gm, CONFIG))
        texts.append(_text(gm))
        return gm.forward

    qkv = [torch.randn(1, 2, 64, 16) for _ in range(3)]
    keep = [torch.ones(1, 64, dtype=torch.bool)] if name.endswith("padding") else []
    torch.compile(CASES[name], backend=backend, fullgraph=True)(*qkv, *keep)
    golden.check(GOLDEN / f"{name}.txt", "before\n{}\nafter\n{}".format(*texts))


def _text(gm: fx.GraphModule) -> str:
    lines = []
    for node in gm.graph.nodes:
        if node.op == "output":
            lines.append(f"    return {node.args[0]}")
        elif node.op != "placeholder":
            given = [*map(str, node.args), *(f"{k}={v}" for k, v in node.kwargs.items())]
            lines.append(f"    {node.name} = {dialect.name(node)}({', '.join(given)})")
    return "\n".join(lines) + "\n"
