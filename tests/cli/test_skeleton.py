"""Building without weights and capturing: what is kept, what is shared, what is forgotten."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nsa_compile.capture import capture
from nsa_compile.passes.config import NSAConfig
from nsa_compile.passes.pipeline import convert
from nsa_compile.passes.record import record
from nsa_compile.targets import skeleton
from nsa_compile.targets.skeleton import build_skeleton
from tests.cli.models import Model, ids


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.norm = nn.LayerNorm(3)
        self.head.weight = self.embed.weight
        self.register_buffer("positions", torch.arange(4))
        self.same = self.positions
        self.plain = torch.tensor([1.0, 2.0])


def test_everything_is_on_meta_and_what_was_shared_stays_shared() -> None:
    built = build_skeleton(Tied)
    model = built.result
    assert all(p.is_meta and p.requires_grad for p in model.parameters())
    assert model.head.weight is model.embed.weight
    assert model.same is model.positions
    assert model.plain.is_meta
    torch.testing.assert_close(built.values[id(model.positions)], torch.arange(4))
    torch.testing.assert_close(built.values[id(model.plain)], torch.tensor([1.0, 2.0]))
    assert not any(id(p) in built.values for p in model.parameters())


def test_a_large_model_costs_nothing() -> None:
    built = build_skeleton(lambda: nn.Linear(1 << 20, 1 << 20))
    assert built.result.weight.shape == (1 << 20, 1 << 20)


def test_beyond_the_budget_values_are_left_out_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(skeleton, "BUDGET", 20_000)
    built = build_skeleton(lambda: Model(layers=2))
    first, second = (layer.bias for layer in built.result.layers)
    assert id(first) in built.values
    assert id(second) not in built.values
    assert "were built without values" in built.notes[0]


def test_the_builders_own_error_comes_through() -> None:
    with pytest.raises(RuntimeError, match=r"^mine$"):
        build_skeleton(lambda: (_ for _ in ()).throw(RuntimeError("mine")))


@pytest.mark.parametrize("dynamic", [False, True])
def test_capture_gives_graphs_whose_buffers_have_values(dynamic: bool) -> None:
    built = build_skeleton(lambda: (Model(), ids(2, 40)))
    model, inputs = built.result
    captured = capture(model.eval(), (inputs,), {}, dynamic=dynamic, values=built.values)
    assert (captured.error, captured.failures, captured.notes) == (None, [], [])
    (graph,) = captured.graphs
    assert graph.compile_id == "0/0"
    assert len(graph.values) == 2
    decisions = convert(graph.gm, NSAConfig(dense_len=0), values=graph.values).decisions
    rows = [record(decision, graph.compile_id) for decision in decisions]
    assert [(row.decision, row.mask) for row in rows] == [("converted", "causal")] * 2
    assert isinstance(rows[0].kv_len, str if dynamic else int)


def test_an_error_of_the_forward_is_a_value() -> None:
    captured = capture(nn.Linear(3, 4, device="meta"), (torch.ones(2, 5, device="meta"),), {})
    assert captured.error is not None
    assert captured.graphs == []
