"""With a budget that covers every key, the converted model equals the dense one."""

from __future__ import annotations

import copy

import pytest
import torch

import nsa_compile
from tests.models.architectures import build, run
from tests.models.equality import (
    FULL_BUDGET,
    PADDED,
    assert_all_converted,
    assert_equal,
    extra_arguments,
    padding_for,
    token_ids,
)

LENGTHS = (1, 31, 63, 507)
CASES = [("tril_gpt", "none")] + [(m, side) for m in PADDED for side in ("none", "left", "right")]


def _cases(*everyday: tuple[object, ...], of: list[tuple[object, ...]]) -> list[object]:
    """All cases ``of``; those that are not ``everyday`` run with ``-m slow`` only."""
    return [pytest.param(*case, marks=() if case in everyday else pytest.mark.slow) for case in of]


@pytest.mark.parametrize(
    ("name", "side", "length"),
    _cases(
        *[(name, side, 507) for name, side in CASES[:13] if side != "right"],
        *[("llama", side, length) for side in ("none", "right") for length in LENGTHS],
        *[("mistral", "left", length) for length in LENGTHS],
        *[(name, "left", 63) for name in ("gemma2", "gpt_oss", "bloom")],
        *[("gpt_oss", side, 1) for side in ("none", "left")],
        of=[(*case, length) for case in CASES for length in LENGTHS],
    ),
)
def test_static_shapes(name: str, side: str, length: int) -> None:
    torch._dynamo.reset()
    model = build(name)
    fast = torch.compile(model, backend="nsa", dynamic=False, options=FULL_BUDGET)
    assert_equal(model, fast, token_ids(length), padding_for(side, length), extra_arguments(name))
    assert_all_converted(fast)


@pytest.mark.parametrize(
    ("name", "side", "scorer"),
    _cases(
        ("tril_gpt", "none", "channels"),
        ("llama", "left", "channels"),
        ("llama", "none", "mean"),
        ("gpt2", "left", "mean"),
        ("bloom", "right", "channels"),
        of=[(*case, scorer) for case in CASES for scorer in ("channels", "mean")],
    ),
)
def test_one_dynamic_compile_serves_many_lengths(name: str, side: str, scorer: str) -> None:
    torch._dynamo.reset()
    model = build(name)
    options = {**FULL_BUDGET, "scorer": scorer}
    fast = torch.compile(model, backend="nsa", dynamic=True, options=options)
    for length in (63, 31, 507):
        assert_equal(
            model, fast, token_ids(length), padding_for(side, length), extra_arguments(name)
        )
    assert_all_converted(fast)
    assert {row.compile_id for row in nsa_compile.report(fast).sites} == {"0/0"}


@pytest.mark.parametrize("name", ["tril_gpt", pytest.param("llama", marks=pytest.mark.slow)])
def test_inductor_compiles_the_converted_graph(name: str) -> None:
    torch._dynamo.reset()
    model = build(name)
    fast = torch.compile(model, backend="nsa", options={**FULL_BUDGET, "inner": "inductor"})
    assert_equal(model, fast, token_ids(63), {}, extra_arguments(name))
    assert_all_converted(fast)


def test_a_changed_mask_buffer_falls_back_to_dense_and_says_so() -> None:
    torch._dynamo.reset()
    model = build("tril_gpt")
    fast = torch.compile(model, backend="nsa", options=FULL_BUDGET)
    ids = token_ids(63)
    run(fast, ids)
    with torch.no_grad():
        model.layers[0].bias[..., :, 5] = 0
        expected = run(copy.deepcopy(model), ids)
    with pytest.warns(nsa_compile.ConversionWarning, match="runs dense"):
        torch.testing.assert_close(run(fast, ids), expected)
    assert nsa_compile.report(fast).failures
