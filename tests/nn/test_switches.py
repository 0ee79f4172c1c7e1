"""Every switch of the gated selection against references in float64, forward and backward."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_compile.nn import NSAParameters
from nsa_compile.passes import merges
from tests.nn import learned_reference

LENGTHS = (1, 4, 31, 32, 120, 507)
SWITCHES: dict[str, tuple[Any, ...]] = {
    "kv_heads": (8, 4),
    "select_block": (8, 4, 2),
    "num_selected": (0, 2),
    "share_selection": (True, False),
    "importance": ("overlap", "interpolate"),
    "sel_scale": (False, True),
    "causal": (True, False),
}


def made(**options: Any) -> tuple[NSAParameters, bool]:
    """Parameters in float64 that are not at their beginning, and whether they are causal."""
    torch.manual_seed(0)
    causal, kv_heads = options.pop("causal", True), options.pop("kv_heads", 4)
    sizes = {
        "merge": "gate", "compress_block": 8, "compress_stride": 4, "window": 6,
        "compression": "weighted", "num_mem_kv": 1, "select_block": 4, "num_selected": 4,
        "init_blocks": 0,
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # num_selected=0 says what it leaves out
        own = NSAParameters(
            {**sizes, **options}, width=6, q_heads=8, kv_heads=kv_heads, head_dim=8
        ).double()
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return own, causal


def inputs(own: NSAParameters, q_len: int, kv_len: int, batch: int = 1) -> list[Tensor]:
    """Hidden states, q, k and v."""
    torch.manual_seed(q_len)
    shapes = [
        (batch, q_len, 6), (batch, own.q_heads, q_len, 8), (batch, own.kv_heads, kv_len, 8),
        (batch, own.kv_heads, kv_len, 8),
    ]  # fmt: skip
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def run(
    own: NSAParameters, given: list[Tensor], causal: bool, valid: Tensor | None = None,
    offset: int = 0,
) -> Tensor:  # fmt: skip
    hidden, q, k, v = given
    learned = own(hidden, k, v, valid)
    return merges.gated(q, k, v, learned, own.config, valid, None, 8**-0.5, causal, offset)


def compare(
    q_len: int, kv_len: int | None = None, offset: int = 0, padded: bool = False, **options: Any
) -> None:
    """Output and the gradient of every input and parameter."""
    own, causal = made(**options)
    kv_len = q_len if kv_len is None else kv_len
    given, valid = inputs(own, q_len, kv_len, 1 + padded), None
    if padded:
        valid = torch.arange(kv_len).expand(2, -1) >= torch.tensor([[0], [kv_len // 3]])
    out = run(own, given, causal, valid, offset)
    exact = learned_reference.attention(own, *given, causal=causal, valid=valid, offset=offset)
    learned_reference.assert_equal_with_gradients(own, given, out, exact)


def combinations() -> list[dict[str, Any]]:
    return [
        dict(zip(SWITCHES, values, strict=True)) for values in itertools.product(*SWITCHES.values())
    ]


def told(options: dict[str, Any]) -> str:
    return "-".join(str(value) for value in options.values())


def a_few() -> list[dict[str, Any]]:
    """Combinations in which every pair of two switches' values meets."""
    chosen: list[dict[str, Any]] = []
    missing = {pair for each in combinations() for pair in itertools.combinations(each.items(), 2)}
    while missing:
        best = max(
            combinations(),
            key=lambda each: len(missing & set(itertools.combinations(each.items(), 2))),
        )
        chosen.append(best)
        missing -= set(itertools.combinations(best.items(), 2))
    return chosen


@pytest.mark.parametrize("length", [1, 4, 31, 32])
@pytest.mark.parametrize("options", a_few(), ids=told)
def test_pairs_of_switches(options: dict[str, Any], length: int) -> None:
    compare(length, **options)


@pytest.mark.slow
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("options", combinations(), ids=told)
def test_all_combinations(options: dict[str, Any], length: int) -> None:
    compare(length, **options)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("lengths", [(20, 47, 27), (20, 47, 0), (40, 23, -9), (1, 30, 29)], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_cross_attention(lengths: tuple[int, int, int], causal: bool, share: bool) -> None:
    compare(*lengths, causal=causal, share_selection=share, importance="interpolate")


@pytest.mark.parametrize(
    "options",
    [{"share_selection": False}, {"importance": "interpolate", "select_block": 2}],
    ids=str,
)
def test_padding(options: dict[str, Any]) -> None:
    compare(41, padded=True, **options)


def test_queries_in_tiles() -> None:
    compare(45, query_tile=4, select_block=4, num_selected=6, share_selection=False)


@pytest.mark.parametrize(
    "options",
    [
        {"share_selection": False},
        {"importance": "interpolate", "select_block": 2},
        {"select_block": 2, "causal": False},
        {"num_selected": 0},
        {"num_selected": 2, "select_block": 8, "kv_heads": 8},
    ],
    ids=str,
)
def test_gradcheck(options: dict[str, Any]) -> None:
    """The choice stays the same under small steps; that of scales is in test_sel_scale.py."""
    own, causal = made(compression="attention", **options)
    given = inputs(own, 13, 13)

    def out(*tensors: Tensor) -> Tensor:
        return run(own, list(tensors), causal)

    assert torch.autograd.gradcheck(out, given, nondet_tol=1e-9, fast_mode=True)


@pytest.mark.parametrize("share", [True, False])
def test_only_scales_let_the_compression_learn_from_the_selection(share: bool) -> None:
    for sel_scale in (False, True):
        own, causal = made(sel_scale=sel_scale, share_selection=share, num_selected=3)
        with torch.no_grad():  # the selected branch alone
            own.gate.weight.zero_()
            own.gate.bias.copy_(torch.tensor([-50.0, 50.0, -50.0]).repeat(8))
        run(own, inputs(own, 60, 60), causal).square().sum().backward()
        grads = dict(own.named_parameters())
        assert bool((grads["compress_k.logits"].grad.abs() > 1e-6).any()) == sel_scale
        assert not bool((grads["compress_v.logits"].grad.abs() > 1e-6).any())
        assert grads["memory_k"].grad is None or not grads["memory_k"].grad.abs().max() > 1e-6


def test_equal_switches_share_a_template() -> None:
    switches = ({}, {"share_selection": False}, {"importance": "interpolate"}, {"sel_scale": True})
    names = [made(**options)[0].template for options in (*switches, *switches)]
    assert len(set(names)) == 4
