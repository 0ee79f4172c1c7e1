"""In-place nodes that only fed a replaced attention go with it; those that something sees stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from nsa_compile import NSAConfig
from nsa_compile.passes import dialect
from nsa_compile.passes.pipeline import convert

Tensor = torch.Tensor
OPTIONS = {"dense_len": 0, "select_block": 16, "query_tile": 16, "window": 16, "num_selected": 8}
T = 40


def hidden(x: Tensor) -> Tensor:
    return torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)


def fills(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
    scores = q @ k.transpose(-1, -2)
    scores /= 4.0
    scores.masked_fill_(hidden(q), -float("inf"))
    return torch.softmax(scores, -1) @ v


def adds_and_casts(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(-1, -2)).mul_(0.25)
    mask = torch.zeros(T, T).masked_fill_(hidden(q), -float("inf"))
    scores += mask
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(v.dtype)
    return weights @ v


def reads_scores_again(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    scores = q @ k.transpose(-1, -2) / 4.0
    scores.masked_fill_(hidden(q), -1e9)
    return torch.softmax(scores, -1) @ v, scores.flatten(1)


def writes_to_an_input(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
    """The scores are copied into a tensor of the caller."""
    scores = q @ k.transpose(-1, -2)
    scores /= 4.0
    kept.copy_(scores)
    scores.masked_fill_(hidden(q), -float("inf"))
    return torch.softmax(scores, -1) @ v


def scales_the_query_in_place(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
    q *= 0.25
    scores = q @ k.transpose(-1, -2)
    scores.masked_fill_(hidden(q), -float("inf"))
    return torch.softmax(scores, -1) @ v


def converted(f: Callable[..., Any]) -> tuple[list[str], bool]:
    """Names of the in-place nodes left, after checking results and inputs; is it converted?"""
    torch._dynamo.reset()
    torch.manual_seed(0)
    inputs = [*torch.randn(3, 2, 4, T, 16).unbind(), torch.zeros(2, 4, T, T)]
    graphs: list[fx.GraphModule] = []
    found = []

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        found.append(convert(gm, NSAConfig.from_options(OPTIONS)).converts)
        graphs.append(gm)
        return gm

    outcomes = []
    for run in (f, torch.compile(f, backend=backend)):
        given = [x.clone() for x in inputs]
        outcomes.append((run(*given), given))
    torch.testing.assert_close(outcomes[1], outcomes[0], rtol=1e-4, atol=1e-4)
    (gm,) = graphs
    return [dialect.name(n) for n in gm.graph.nodes if dialect.written(n)], found[0]


@pytest.mark.parametrize("f", [fills, adds_and_casts])
def test_scores_written_in_place_go(f: Callable[..., Any]) -> None:
    assert converted(f) == ([], True)


def test_scores_that_are_read_again_stay() -> None:
    left, _ = converted(reads_scores_again)
    assert left == ["masked_fill_"]


def test_what_writes_to_an_input_stays() -> None:
    left, _ = converted(writes_to_an_input)
    assert "copy_" in left
    assert "itruediv" in left


def test_a_write_to_an_operand_that_lives_on_stays() -> None:
    left, was_converted = converted(scales_the_query_in_place)
    assert "imul" in left
    assert was_converted == ("masked_fill_" not in left)
