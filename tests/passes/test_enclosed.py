"""Attention inside each higher-order operator is converted or reported, never missed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._higher_order_ops import map as mapped
from torch._higher_order_ops import scan, while_loop
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import nsa_compile

Tensor = torch.Tensor
OPTIONS = {
    "dense_len": 0, "select_block": 16, "query_tile": 16, "window": 16, "num_selected": 32,
    "inner": "aot_eager",
}  # fmt: skip


def attend(x: Tensor) -> Tensor:
    q = x.unflatten(-1, (4, 8)).transpose(-3, -2)
    y = F.scaled_dot_product_attention(q, q, q, is_causal=True)
    return y.transpose(-3, -2).flatten(-2)


class Doubled(torch.autograd.Function):
    """Its gradient is its own: the attention inside may not be replaced."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return attend(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


def save_products(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    saved = "mm" in str(op)
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


@torch.compiler.disable
def outside_of_the_graph(x: Tensor) -> Tensor:
    return attend(x)


def without_gradient(x: Tensor) -> Tensor:
    with torch.no_grad():
        y = attend(x)
    return x + y


def hidden_in_a_call(x: Tensor) -> Tensor:
    weight = torch.eye(32)
    y, _ = F.multi_head_attention_forward(
        x, x, x, 32, 4, weight.repeat(3, 1), None, None, None, False, 0.0, weight, None,
        need_weights=False,
    )  # fmt: skip
    return y


selective = partial(create_selective_checkpoint_contexts, save_products)
CONVERTED: dict[str, Callable[[Tensor], Tensor]] = {
    "checkpoint": lambda x: checkpoint(attend, x, use_reentrant=False),
    "reentrant": lambda x: checkpoint(attend, x, use_reentrant=True),
    "selective": lambda x: checkpoint(attend, x, use_reentrant=False, context_fn=selective),
    "region": lambda x: torch.compiler.nested_compile_region(attend)(x),
    "no_grad": without_gradient,
    "graph break": lambda x: attend(outside_of_the_graph(x + 1) * 2),
}
REPORTED: dict[str, Callable[[Tensor], Tensor]] = {
    "cond": lambda x: torch.cond(x.sum() > 0, attend, torch.sin, (x,)),
    "while_loop": lambda x: while_loop(
        lambda i, x: i < 2, lambda i, x: (i + 1, attend(x)), (torch.tensor(0), x.detach())
    )[1],
    "scan": lambda x: scan(lambda c, y: (attend(c), y.clone()), x, torch.randn(3, 2), dim=0)[0],
    "map": lambda x: mapped(lambda y, z: attend(y) + z, torch.stack([x, x + 1]), x),
    "autograd_function": Doubled.apply,
    "torch.func.vmap": lambda x: torch.vmap(attend)(torch.stack([x, x + 1])),
    "torch.func.grad": lambda x: torch.func.grad(lambda y: attend(y).square().sum())(x),
    "torch.func.jvp": lambda x: torch.func.jvp(attend, (x,), (x,))[1],
    "cond, hidden": lambda x: torch.cond(x.sum() > 0, hidden_in_a_call, torch.sin, (x,)),
    "vmap, checkpointed": lambda x: checkpoint(
        lambda x: torch.vmap(attend)(torch.stack([x, x])), x, use_reentrant=False
    ),
}


def outcome(run: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor | None]:
    torch.manual_seed(0)
    x = torch.rand(2, 40, 32, requires_grad=True)
    y = run(x)
    if y.requires_grad:
        y.square().mean().backward()
    return y.detach(), x.grad


def rows(function: Callable[[Tensor], Tensor]) -> list[Any]:
    """The report, after comparing output and gradient with those of the dense function."""
    torch._dynamo.reset()
    fast = torch.compile(function, backend="nsa", options=OPTIONS)
    with sdpa_kernel(SDPBackend.MATH):
        torch.testing.assert_close(outcome(fast), outcome(function), rtol=1e-4, atol=1e-4)
    report = nsa_compile.report(fast)
    assert not report.failures
    return list(report.sites)


@pytest.mark.parametrize("name", CONVERTED)
def test_converted(name: str) -> None:
    assert [row.decision for row in rows(CONVERTED[name])] == ["converted"]


# torch 2.11 fails at these two with any backend.
SINCE_TORCH_2_12 = pytest.mark.skipif(
    torch.__version__ < "2.12", reason="torch compiles no scan of a view, nor a region in a cond"
)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=SINCE_TORCH_2_12) if n == "scan" else n for n in REPORTED]
)
def test_reported(name: str) -> None:
    (row,) = rows(REPORTED[name])
    assert (row.decision, row.reason) == ("kept", "inside_operator")
    assert name.partition(",")[0] in row.reason_text


@SINCE_TORCH_2_12
def test_a_body_with_a_second_use_stays_dense() -> None:
    """One body, called in the graph and inside an operator whose body is not rewritten."""
    region = torch.compiler.nested_compile_region(attend)
    function = lambda x: region(torch.cond(x.sum() > 0, region, torch.sin, (x,)))  # noqa: E731
    outer, inner = rows(function)
    assert (outer.reason, inner.reason) == ("mask_not_understood", "inside_operator")
    assert "another call of the same body" in outer.reason_text


def test_strict_counts_what_is_enclosed() -> None:
    torch._dynamo.reset()
    fast = torch.compile(REPORTED["cond"], backend="nsa", options={**OPTIONS, "strict": True})
    with pytest.raises(Exception, match="inside_operator"):
        fast(torch.rand(2, 40, 32))
