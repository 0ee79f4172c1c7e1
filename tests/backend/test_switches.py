"""The switches of the gated selection through prepare and torch.compile, and how they combine."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nsa_compile
from nsa_compile import NSAConfig, NSAConfigError, functional
from nsa_compile.passes import merges
from tests.nn.test_switches import LENGTHS, combinations, told

SIZES: dict[str, Any] = {
    "merge": "gate", "compress_block": 8, "compress_stride": 4, "window": 6, "init_blocks": 0,
    "compression": "weighted",
}  # fmt: skip


class Attention(nn.Module):
    """Eight query heads of width 4; attends to ``context``, or to what it is given."""

    def __init__(self, kv_heads: int, causal: bool) -> None:
        super().__init__()
        self.kv_heads, self.causal = kv_heads, causal
        self.q, self.kv = nn.Linear(16, 32), nn.Linear(16, 8 * kv_heads)
        self.out = nn.Linear(32, 16)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q = self.q(x).unflatten(-1, (8, 4)).transpose(1, 2)
        k, v = self.kv(context).unflatten(-1, (2, self.kv_heads, 4)).permute(2, 0, 3, 1, 4)
        gqa = {"enable_gqa": True} if self.kv_heads < 8 else {}
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, **gqa)
        return self.out(y.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, kv_heads: int = 4, causal: bool = True) -> None:
        super().__init__()
        self.attention = Attention(kv_heads, causal)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return x + self.attention(x, context)


@contextmanager
def by_operators(model: nn.Module) -> Iterator[None]:
    """Run ``model`` eagerly with its gated branches in the place of its attention."""
    owner, given = model.attention, []

    def enter(module: nn.Module, args: Any) -> None:
        given[:] = args[:1]

    def attend(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, **_: Any) -> Tensor:
        own = owner.nsa
        learned = own(given[0], k, v, None)
        return merges.gated(q, k, v, learned, own.config, None, None, 4**-0.5, is_causal, 0)

    hook = owner.register_forward_pre_hook(enter)
    with mock.patch.object(F, "scaled_dot_product_attention", attend):
        yield
    hook.remove()


def prepared(kv_heads: int = 4, causal: bool = True, cross: bool = False, **options: Any) -> Model:
    torch.manual_seed(0)
    example = [torch.randn(2, 41, 16), *([torch.randn(2, 67, 16)] if cross else [])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # num_selected=0 says what it leaves out
        model = nsa_compile.prepare(
            Model(kv_heads, causal), {**SIZES, **options}, example_inputs=tuple(example)
        )
    with torch.no_grad():
        for parameter in model.attention.nsa.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def same_gradients(model: Model, fast: Any, *inputs: Tensor) -> None:
    other = copy.deepcopy(model)
    with by_operators(other):
        expected = other(*inputs)
        expected.square().sum().backward()
    model.zero_grad()
    out = fast(*inputs)
    out.square().sum().backward()
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    for (name, p), true in zip(model.named_parameters(), other.parameters(), strict=True):
        got, wanted = (torch.zeros_like(x) if x.grad is None else x.grad for x in (p, true))
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4, msg=name)


def check(lengths: tuple[int, ...], options: dict[str, Any]) -> None:
    """One dynamic compilation for all lengths; the report has the switches."""
    torch._dynamo.reset()
    model = prepared(**options)
    fast = torch.compile(model, backend="nsa", options={"inner": "aot_eager"}, dynamic=True)
    for length in lengths:
        same_gradients(model, fast, torch.randn(2, length, 16))
    rows = nsa_compile.report(fast).sites
    assert {row.reason for row in rows} == {None}
    names = [name for name in options if name not in ("kv_heads", "causal")]
    for row in rows:
        assert {name: row.config[name] for name in names} == {name: options[name] for name in names}


A_FEW = (
    {"kv_heads": 8, "select_block": 8, "num_selected": 2, "share_selection": True,
     "importance": "overlap", "sel_scale": True, "causal": True},
    {"kv_heads": 4, "select_block": 2, "num_selected": 2, "share_selection": False,
     "importance": "interpolate", "sel_scale": True, "causal": False},
    {"kv_heads": 4, "select_block": 4, "num_selected": 0, "share_selection": False,
     "importance": "overlap", "sel_scale": False, "causal": True},
)  # fmt: skip


@pytest.mark.parametrize("options", A_FEW, ids=told)
def test_compiled_equals_the_operators(options: dict[str, Any]) -> None:
    check((31, 4, 1, 32), dict(options))


@pytest.mark.slow
@pytest.mark.parametrize("options", combinations(), ids=told)
def test_every_combination_compiles(options: dict[str, Any]) -> None:
    check(LENGTHS[::-1], dict(options))


@pytest.mark.parametrize("causal", [True, False])
def test_cross_attention(causal: bool) -> None:
    torch._dynamo.reset()
    switches = {"share_selection": False, "importance": "interpolate", "sel_scale": True}
    model = prepared(causal=causal, cross=True, select_block=4, num_selected=3, **switches)
    fast = torch.compile(model, backend="nsa", options={"inner": "aot_eager"}, dynamic=True)
    for q_len, kv_len in ((20, 47), (50, 23)):
        same_gradients(model, fast, torch.randn(2, q_len, 16), torch.randn(2, kv_len, 16))
    assert {row.reason for row in nsa_compile.report(fast).sites} == {None}


EVERY: dict[str, tuple[Any, ...]] = {
    "merge": ("softmax", "gate"),
    "scorer": ("mean", "channels"),
    "selector": ("nsa", "local", "topk"),
    "query_tile": (1, 16),
    "select_block": (8, 2),
    "num_selected": (0, 2, 16),
    "init_blocks": (0, 1),
    "share_selection": (True, False),
    "importance": ("overlap", "interpolate"),
    "sel_scale": (False, True),
    "num_mem_kv": (0, 1),
}


SMALL = {"window": 6, "compress_block": 8, "compress_stride": 4}


def sorted_out() -> tuple[list[NSAConfig], list[str]]:
    """The configurations of the product of all switches, and what the others are refused with."""
    works, refusals = [], []
    for values in itertools.product(*EVERY.values()):
        options = dict(zip(EVERY, values, strict=True))
        try:
            works.append(NSAConfig(**SMALL, **options))
        except NSAConfigError as error:
            refusals.append(str(error))
    return works, refusals


def test_every_combination_is_accepted_or_the_refusal_names_two_options() -> None:
    works, refusals = sorted_out()
    assert len(works) > 500
    texts = set(refusals)
    assert len(texts) > 10
    # Of no other option: without gates there has to be something to read.
    texts.discard("num_selected must be at least 1, got 0")
    for text in texts:
        named = [name for name in (*EVERY, *SMALL) if f"{name}=" in text or f"{name} " in text]
        assert len(named) >= 2, text


def some_tensors(length: int) -> list[Tensor]:
    """q, k, v and gates."""
    torch.manual_seed(0)
    shapes = (1, 4, length, 8), (1, 2, length, 8), (1, 2, length, 8)
    return [*map(torch.randn, shapes), torch.rand(1, 4, length, 3)]


def test_accepted_combinations_are_computed() -> None:
    works, _ = sorted_out()
    for config in works[:: len(works) // 100]:
        run(config, *some_tensors(21))


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 21, 70])
def test_every_accepted_combination_is_computed(length: int) -> None:
    for config in sorted_out()[0]:
        run(config, *some_tensors(length))


def run(config: NSAConfig, q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> None:
    """Forward and backward without a complaint, and without what is no number."""
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    if config.merge == "gate":
        learned = merges.pooled(gates, k, v, config, None)
        if config.num_mem_kv:
            memory = torch.randn(2, config.num_mem_kv, 8)
            learned = learned._replace(k_mem=memory, v_mem=memory)
        out = merges.gated(q, k, v, learned, config, None, None, 8**-0.5, True, 0)
    else:
        config = NSAConfig(**{**config.sizes(), "dense_len": 0})
        out = functional.nsa_attention(q, k, v, config=config)
    assert bool(out.isfinite().all())
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(bool(grad.isfinite().all()) for grad in grads)
