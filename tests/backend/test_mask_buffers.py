"""A mask that was proven from a buffer: equal buffers serve, changed ones run dense."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import nsa_compile
from nsa_compile import ConversionWarning
from nsa_compile.guards import Unchanged
from tests.nn.training import NanoGPT, Sizes, tokens

SPARSE: dict[str, Any] = {
    "dense_len": 0, "window": 8, "select_block": 8, "num_selected": 3, "query_tile": 8,
    "inner": "eager",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


@contextmanager
def sparse(expected: bool) -> Iterator[None]:
    if expected:
        yield
    else:
        with pytest.warns(ConversionWarning, match=r"a mask buffer .* changed"):
            yield


def differs(model: nn.Module, fast: Any) -> bool:
    ids = tokens(64, 2, 0)
    with torch.no_grad():
        return not torch.allclose(fast(ids), model(ids), atol=1e-6)


def test_models_that_share_code_have_buffers_of_their_own() -> None:
    for _ in range(2):
        model = NanoGPT(Sizes())
        fast = torch.compile(model, backend="nsa", options=SPARSE)
        assert differs(model, fast)
        assert not nsa_compile.report(fast).failures


def test_blocks_that_share_code_have_buffers_of_their_own() -> None:
    model = NanoGPT(Sizes(layers=3))
    eager = copy.deepcopy(model)
    for block in model.h:
        block.compile(backend="nsa", options=SPARSE)
    assert differs(eager, model)
    assert not nsa_compile.report(model).failures


def test_values_that_were_written_again_serve_and_others_do_not() -> None:
    model = NanoGPT(Sizes(layers=1))
    fast = torch.compile(model, backend="nsa", options=SPARSE)
    assert differs(model, fast)
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert differs(model, fast)
    model.h[0].attn.bias[..., 40, 3] = 0
    with sparse(False):
        assert not differs(model, fast)
    model.h[0].attn.bias[..., 40, 3] = 1
    assert differs(model, fast)


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.int64])
def test_tensors_are_compared_by_value(dtype: torch.dtype) -> None:
    mask = torch.ones(6, 6).tril().to(dtype)
    guard = Unchanged(0, mask)
    for equal in (mask, mask.clone(), mask.T.clone().T, mask[None][0]):
        assert guard([equal]) is None
        assert guard([equal]) is None
    assert guard([mask.T]) is not None
    assert guard([mask.reshape(36)]) is not None
    other = mask.clone()
    other[3, 1] = 0
    assert guard([other]) == "a mask buffer (graph input 0) changed"
    other[3, 1] = 1
    assert guard([other]) is None
    with torch.inference_mode():
        assert guard([mask.clone()]) is not None
    assert Unchanged(0, torch.tensor(3))([torch.tensor(3)]) is None
