"""Models of one class, prepared and not, each run graphs of their own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import nsa_compile
from tests.backend.test_prepared import GPT, SIZES, ids, prepared

OPTIONS = {
    "inner": "eager", "dense_len": 0, "select_block": 8, "num_selected": 3, "window": 8,
    "query_tile": 4,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def compiled(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return torch.compile(model, backend="nsa", options=OPTIONS)


def alone(model: nn.Module, x: Tensor) -> Tensor:
    """What ``model`` gives when nothing else was compiled."""
    torch._dynamo.reset()
    out = compiled(model)(x)
    torch._dynamo.reset()
    return out


def test_a_prepared_model_does_not_run_the_graph_of_an_unprepared_one() -> None:
    plain, gated, x = GPT(), prepared(), ids()
    expected = [alone(model, x) for model in (plain, gated)]
    assert not torch.allclose(*expected)
    first, second = compiled(plain), compiled(gated)
    for _ in range(2):  # the later graph is the first that Dynamo tries
        assert torch.equal(first(x), expected[0])
        assert torch.equal(second(x), expected[1])
    torch._dynamo.reset()
    assert torch.equal(second(x), expected[1])
    assert torch.equal(first(x), expected[0])
    assert torch.equal(second(x), expected[1])


def test_a_model_may_be_prepared_after_it_was_compiled_and_unprepared_again() -> None:
    model, x = GPT(), ids()
    fast = compiled(model)
    before = fast(x)
    nsa_compile.prepare(model, SIZES)
    between = fast(x)
    assert not torch.allclose(before, between)
    assert torch.equal(between, alone(model, x))
    nsa_compile.unprepare(model)
    assert torch.equal(fast(x), before)


def test_a_second_model_without_hooks_runs_the_graph_of_the_first() -> None:
    x = ids()
    compiled(GPT())(x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(GPT())(x)
