"""A snapshot builds the graph that was, whatever became of the one it was taken from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

import nsa_compile
from nsa_compile.passes.rewrite import Rewriter
from nsa_compile.passes.snapshot import Snapshot

OPTIONS = {"dense_len": 0, "select_block": 16, "query_tile": 16, "window": 16, "inner": "eager"}


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def layer(x: torch.Tensor, linear: nn.Module) -> torch.Tensor:
            q = linear(x).unflatten(-1, (2, 8)).transpose(1, 2)
            y = nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
            return x + y.transpose(1, 2).flatten(2)

        for linear in self.layers:
            x = checkpoint(layer, x, linear, use_reentrant=False)
        return x


def test_a_snapshot_outlives_what_is_done_to_the_graph() -> None:
    torch._dynamo.reset()
    seen: list[tuple[str, str]] = []

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        readable = gm.print_readable(print_output=False)
        snapshot = Snapshot(gm)
        for module in (gm.wrap_body_0, gm):
            for node in reversed(module.graph.nodes):
                if node.op != "placeholder":
                    module.graph.erase_node(node)
        rebuilt = snapshot.module()
        # Running it marks nodes, in torch 2.11, so it is read now.
        seen.append((readable, rebuilt.print_readable(print_output=False)))
        return rebuilt

    model, x = Checkpointed(), torch.randn(1, 40, 16)
    torch.testing.assert_close(torch.compile(model, backend=backend)(x), model(x))
    ((readable, rebuilt),) = seen
    assert rebuilt == readable


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_failure_in_the_middle_of_the_bodies_leaves_the_graph_as_it_was(
    after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    replace, calls, handed = Rewriter._replace, [], []

    def fails_late(self: Rewriter, decision: Any) -> Any:
        calls.append(decision)
        if len(calls) > after:
            raise RuntimeError("boom")
        return replace(self, decision)

    def inner(gm: fx.GraphModule, *_: Any) -> Any:
        handed.append(gm.print_readable(print_output=False))
        return gm

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        handed.append(gm.print_readable(print_output=False))
        return nsa_compile.backend.nsa(gm, inputs, options=OPTIONS)

    monkeypatch.setattr(Rewriter, "_replace", fails_late)
    monkeypatch.setattr(nsa_compile.backend, "_inner", inner)
    model, x = Checkpointed(), torch.randn(1, 40, 16)
    with pytest.warns(nsa_compile.ConversionWarning, match="boom") as warned:
        torch.testing.assert_close(torch.compile(model, backend=backend)(x), model(x))
    assert len(warned) == 1
    given, compiled = handed
    assert compiled == given
