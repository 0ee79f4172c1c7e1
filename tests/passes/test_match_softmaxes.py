"""Softmaxes by other names and written out: read, or reported, and never read wrongly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.passes.match_checking import match

B, H, T, D = 2, 4, 12, 8
Softmax = Callable[[Tensor], Tensor]
aten = torch.ops.aten


def attention(softmax: Softmax) -> Callable[..., Tensor]:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
        return softmax((q @ k.mT * D**-0.5).masked_fill(hidden, -torch.inf)) @ v

    return f


def qkv() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(B, H, T, D) for _ in range(3))


def exp_over_sum(x: Tensor) -> Tensor:
    e = torch.exp(x)
    return e / e.sum(-1, keepdim=True)


@pytest.mark.parametrize(
    "softmax",
    [
        lambda x: torch.special.softmax(x, -1),
        lambda x: F.softmin(-x, dim=-1),
        lambda x: x.log_softmax(-1).exp(),
        lambda x: torch.exp(torch.special.log_softmax(x, -1)),
        lambda x: torch.exp(x - torch.logsumexp(x, -1, keepdim=True)),
        lambda x: exp_over_sum(x - x.amax(-1, keepdim=True)),
        lambda x: exp_over_sum(x - x.max(dim=-1, keepdim=True).values.detach()),
        exp_over_sum,
        lambda x: aten._safe_softmax(x, -1),
        lambda x: aten._softmax(x, -1, False),
    ],
)
def test_read(softmax: Softmax) -> None:
    found = match(attention(softmax), qkv())
    assert (found.masks, found.checked) == (["causal"], 1)


def late(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = torch.exp(q @ k.mT)
    return (e @ v) / e.sum(-1, keepdim=True)


def changed_in_between(x: Tensor) -> Tensor:
    e = torch.exp(x)
    total = e.sum(-1, keepdim=True)
    e.mul_(2)
    return e / total


@pytest.mark.parametrize(
    "f",
    [
        late,
        attention(lambda x: F.gumbel_softmax(x, dim=-1)),
        attention(lambda x: F.normalize(x.exp(), p=1, dim=-1)),
        attention(lambda x: torch.exp2(x) / torch.exp2(x).sum(-1, keepdim=True)),
        attention(lambda x: x.exp() / (1 + x.exp().sum(-1, keepdim=True))),
        attention(lambda x: x.exp() / x.exp().sum((-1, -2), keepdim=True)),
        attention(lambda x: torch.exp(x) / torch.exp(x / 2).sum(-1, keepdim=True)),
        attention(lambda x: torch.exp(x - torch.logsumexp(x, -2, keepdim=True))),
        attention(lambda x: (2 * x.log_softmax(-1)).exp()),
        attention(lambda x: x.log_softmax(-2).exp()),
        attention(changed_in_between),
        attention(lambda x: x.softmax(-1) / x.softmax(-1).sum(-2, keepdim=True)),
        attention(lambda x: torch.zeros_like(x).copy_(x.softmax(-1))),
    ],
)
def test_reported(f: Callable[..., Tensor]) -> None:
    found = match(f, qkv())
    assert set(found.masks) == {"unrecognised_attention"}
    assert all("%" in site.mask.detail for site in found.sites)  # type: ignore[union-attr]


@pytest.mark.parametrize("f", [attention(torch.sigmoid), attention(torch.relu)])
def test_weights_that_are_not_normalised_are_no_softmax(f: Callable[..., Tensor]) -> None:
    assert match(f, qkv()).masks == []


@pytest.mark.parametrize("scale", [2.0, 0.5])
def test_sinks_that_are_scaled_with_the_scores(scale: float) -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sinks = torch.arange(float(H)).view(1, H, 1, 1).expand(B, H, T, 1)
        return (torch.cat([q @ k.mT, sinks], -1) * scale).softmax(-1)[..., :-1] @ v

    assert match(f, qkv()).masks == ["unrecognised_attention"]


def test_vmap_hides_a_dimension() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.vmap(lambda q, k, v: (q @ k.mT).softmax(-1) @ v)(q, k, v)

    (site,) = match(f, qkv()).sites
    assert "vmap" in site.mask.text  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "call",
    [
        lambda q, k, v: aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)[0],
        lambda q, k, v: aten._scaled_dot_product_attention_math(q, k, v, None, 0.0, True)[0],
        lambda q, k, v: torch._C._nn.scaled_dot_product_attention(q, k, v, None, 0.0, True),
    ],
)
def test_operators_inside_sdpa(call: Callable[..., Tensor]) -> None:
    found = match(call, qkv())
    assert (found.masks, found.checked) == (["causal"], 1)


def test_weights_of_an_operator_inside_sdpa() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, weights = aten._scaled_dot_product_attention_math(q, k, v)
        return out + weights.mean()

    assert match(f, qkv()).masks == ["weights_escape"]
