"""prepare, train, save and load: models of three makers learn, and come back as they were."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import nsa_compile
from tests.nn.training import MODELS, Sizes, logits, tokens, train

SIZES: dict[str, Any] = {
    "merge": "gate", "compress_block": 8, "compress_stride": 4, "select_block": 8,
    "num_selected": 4, "window": 8, "compression": "mlp", "compress_expand": 0.25,
    "num_mem_kv": 1,
}  # fmt: skip
PATHS = {
    "llama": "model.layers.{}.self_attn",
    "gpt2": "transformer.h.{}.attn",
    "nanogpt": "h.{}.attn",
}


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def prepared(maker: str, sizes: Sizes, checkpointed: bool, **options: Any) -> nn.Module:
    if maker != "nanogpt":
        pytest.importorskip("transformers")
    model = MODELS[maker](sizes, checkpointed)
    return nsa_compile.prepare(model, {**SIZES, **options})


def compiled(model: nn.Module, inner: str = "aot_eager") -> Any:
    return torch.compile(model, backend="nsa", options={"inner": inner, "strict": True})


def learns(maker: str, sizes: Sizes, steps: int, checkpointed: bool, inner: str) -> None:
    """The loss falls by a quarter, and every learned parameter moves, in every layer."""
    model = prepared(maker, sizes, checkpointed)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fast = compiled(model, inner)
    losses = train(model, fast, sizes, steps)
    assert sum(losses[-3:]) / 3 < 0.75 * losses[0], losses
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        assert not torch.equal(parameter, before[name]), name
    rows = nsa_compile.report(fast).sites
    assert {row.module for row in rows} == {PATHS[maker].format(i) for i in range(sizes.layers)}
    assert all(row.decision == "converted" for row in rows)


_EVERY_DAY = {("llama", False), ("gpt2", False), ("nanogpt", True)}


@pytest.mark.parametrize(
    ("maker", "checkpointed"),
    [
        pytest.param(*case, marks=() if case in _EVERY_DAY else pytest.mark.slow)
        for case in itertools.product(MODELS, (False, True))
    ],
)
def test_a_training_loop(maker: str, checkpointed: bool) -> None:
    learns(maker, Sizes(), 30, checkpointed, "aot_eager" if checkpointed else "eager")


@pytest.mark.slow
@pytest.mark.parametrize("maker", list(MODELS))
def test_a_longer_training_loop(maker: str) -> None:
    learns(maker, Sizes(width=64, length=256), 30, True, "inductor")


@pytest.mark.parametrize(
    "maker", [pytest.param(x, marks=() if x == "llama" else pytest.mark.slow) for x in MODELS]
)
def test_fifty_steps_then_a_fresh_model_says_the_same(maker: str, tmp_path: Path) -> None:
    sizes = Sizes(layers=1)
    model = prepared(maker, sizes, False)
    fast = compiled(model)
    losses = train(model, fast, sizes, 50, accumulate=1)
    assert losses[-1] < 0.75 * losses[0], losses
    torch.save(model.state_dict(), tmp_path / "model.pt")
    torch.manual_seed(1)
    fresh = prepared(maker, sizes, False)
    fresh.load_state_dict(torch.load(tmp_path / "model.pt"))
    other = compiled(fresh)
    for each in (model, fresh):
        each.eval()
    with torch.no_grad():
        for length in (sizes.length, 57, 120):  # the second and third compile anew
            ids = tokens(length, 2, seed=length)
            out = logits(fast(ids))
            assert torch.equal(out, logits(other(ids)))
            assert not torch.equal(out, logits(model(ids)))  # eager is dense
