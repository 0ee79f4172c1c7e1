"""The sweep's own parts: what it counts, how it shrinks, and that a wrong conversion fails it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from tests.sweep import tiny, trial
from tests.sweep.counting import Executed, count

pytest.importorskip("transformers")
LLAMA = trial.Case("eager", "left", cache=True)


@pytest.fixture(autouse=True)
def _reset() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_attention_is_counted_in_every_spelling_and_nothing_else() -> None:
    q, experts = torch.randn(2, 4, 20, 8), torch.randn(2, 20, 4)

    def run() -> None:
        F.scaled_dot_product_attention(q, q, q)
        (q @ q.mT).softmax(-1)
        F.softmax(torch.cat([q @ q.mT, q[..., :1]], -1), dim=-1, dtype=torch.float32)
        experts.softmax(-1)

    assert count(run, 20)[1] == Executed(dense=3, converted=0, other=((2, 20, 4),))


def test_every_kind_of_layer_is_kept() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Gemma3TextConfig()
    values = tiny.shrunk(config, 2, keep_lists=True, fill=False)
    assert set(values["layer_types"]) == set(config.layer_types)
    assert values["num_hidden_layers"] == len(values["layer_types"])
    assert values["sliding_window"] < trial.LENGTH


def test_an_impossible_architecture_says_why() -> None:
    with pytest.raises(tiny.CannotBuild, match="scaled_dot_product_attention"):
        tiny.model("bloom", "sdpa")


def test_a_row_accounts_for_all_attention() -> None:
    row = trial.run("llama", tiny.model("llama", "eager"), LLAMA)
    assert (row.attention, row.converted, row.missed, row.problem) == (2, 2, 0, "")
    assert row.masks == {"causal & padding": 2}


def test_a_wrong_conversion_is_a_mismatch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trial._OPTIONS, "num_selected", 3)
    monkeypatch.setitem(trial._OPTIONS, "window", 4)
    row = trial.run("llama", tiny.model("llama", "eager"), LLAMA)
    assert row.problem == "mismatch", row.detail
    assert row.failed
