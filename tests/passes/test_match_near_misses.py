"""What looks like attention and is not, or not one that the grammar can read: never converted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsa_compile.passes.site import Mask
from tests.passes.match_checking import match

B, H, T, D = 2, 4, 8, 8  # as long as wide, so that a wrong transposition has the right shape
Spelling = Callable[[Tensor, Tensor, Tensor], Tensor]


def qkv() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(B, H, T, D) for _ in range(3))


def over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-2) @ v


def over_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(1) @ v


def weights_transposed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1).mT @ v


def mixed_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mix = torch.eye(H) + q[0, 0, :H, :H]
    return torch.einsum("hg,bgij->bhij", mix, (q @ k.mT).softmax(-1)) @ v


def weights_squared(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1).square() @ v


def weights_shifted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT).softmax(-1) + 0.1) @ v


def weights_masked_otherwise(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = torch.ones(T, T, dtype=torch.bool)
    a = (q @ k.mT).masked_fill(hidden.triu(1), float("-inf")).softmax(-1)
    return a.masked_fill(hidden.triu(2), 0.0).masked_fill(hidden.tril(-3), 0.0) @ v


def part_of_the_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1)[..., :-1] @ v[:, :, :-1]


def two_sinks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a = torch.cat([q @ k.mT, v[..., :2]], -1)
    return a.softmax(-1)[..., :-2] @ v


def sink_of_each_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([q @ k.mT, v[..., :1]], -1).softmax(-1)[..., :-1] @ v


def values_of_each_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a = (q @ k.mT).softmax(-1)
    values = v[:, :, None] * q[:, :, :, None]
    return torch.einsum("bhij,bhijd->bhid", a, values)


def soft_cap_over_the_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
    return (torch.tanh((q @ k.mT).masked_fill(hidden, -30.0) / 9) * 9).softmax(-1) @ v


def clamped_low(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).clamp(min=-1.0).softmax(-1) @ v


def two_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT + k @ v.mT).softmax(-1) @ v


def keys_changed_in_between(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = k * 2
    a = q @ k.mT
    k.zero_()
    return a.softmax(-1) @ v + k


def weights_changed_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a = (q @ k.mT).softmax(-1)
    a.mul_(0.5)
    return a @ v


def scores_rounded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).int().float().softmax(-1) @ v


UNRECOGNISED = (
    over_queries, over_heads, weights_transposed, mixed_heads, weights_squared, weights_shifted,
    weights_masked_otherwise, part_of_the_keys, two_sinks, soft_cap_over_the_mask, clamped_low,
    two_products, keys_changed_in_between, weights_changed_in_place, scores_rounded,
)  # fmt: skip


@pytest.mark.parametrize("spelling", UNRECOGNISED)
def test_a_softmax_between_two_products_is_reported(spelling: Spelling) -> None:
    found = match(spelling, qkv())
    assert found.masks == ["unrecognised_attention"]
    assert "%" in found.site.mask.detail  # type: ignore[union-attr]


def test_a_sink_of_each_query_is_no_modifier() -> None:
    assert match(sink_of_each_query, qkv()).masks == ["modifier_not_supported"]


def test_values_that_differ_between_queries_are_no_attention() -> None:
    assert match(values_of_each_query, qkv()).masks == []


@pytest.mark.parametrize(
    ("spelling", "agrees"),
    [
        (lambda q, k, v: (q @ k).softmax(-1) @ v, False),
        (lambda q, k, v: (q.mT @ k).softmax(-1) @ v, False),
        (lambda q, k, v: (q @ k.mT).softmax(-1) @ v.mT, False),
        (lambda q, k, v: (q.permute(0, 2, 1, 3) @ k.permute(0, 2, 3, 1)).softmax(-1) @ v, False),
        (lambda q, k, v: (q.transpose(0, 1) @ k.mT.transpose(0, 1)).softmax(-1) @ v, False),
        (lambda q, k, v: (q @ k.mT).softmax(-1) @ v, True),
    ],
)
def test_other_transpositions_are_followed_or_refused(spelling: Spelling, agrees: bool) -> None:
    """Whatever is converted is compared with the run; only the last is plain attention."""

    def square(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return spelling(*(x[:, :, :T, :T] for x in (q, k, v)))

    torch.manual_seed(0)
    arguments = tuple(torch.randn(T, T, T, T) for _ in range(3))
    found = match(square, arguments)
    converted = [site for site in found.sites if isinstance(site.mask, Mask)]
    assert found.checked == len(converted)
    if agrees:
        assert len(converted) == 1


def test_scores_that_escape() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        scores = q @ k.mT
        return scores.softmax(-1) @ v, scores

    assert match(f, qkv()).masks == ["weights_escape"]


def test_weights_that_escape() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        weights = (q @ k.mT).softmax(-1)
        return F.dropout(weights, 0.1, False) @ v, weights

    assert match(f, qkv()).masks == ["weights_escape"]


def test_weights_that_nobody_needs_do_not_escape() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.mT).softmax(-1)
        weights.mean(1)
        return weights @ v

    found = match(f, qkv())
    assert (found.masks, found.checked) == (["full"], 1)


def test_one_query_is_a_decode_step() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q[:, :, -1:] @ k.mT).softmax(-1) @ v

    assert match(f, qkv()).masks == ["decode_step"]


def test_a_learned_bias_is_no_mask() -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.randn(H, T, T))

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return (q @ k.mT + self.bias).softmax(-1) @ v

    assert match(Biased(), qkv()).masks == ["additive_bias"]


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, 4, bias=False)
        self.experts = nn.Parameter(torch.randn(4, D, D))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        return torch.einsum(
            "bte,bted->btd", weights, torch.einsum("btc,ecd->bted", x, self.experts)
        )


class NormalisedRouter(Router):
    def forward(self, x: Tensor) -> Tensor:
        weights = F.linear(F.normalize(x, dim=-1), F.normalize(self.gate.weight, dim=-1)).softmax(
            -1
        )
        return (weights[..., None, :] @ torch.einsum("btc,ecd->bted", x, self.experts))[..., 0, :]


class DepthPooling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor) -> Tensor:
        layers = torch.stack([x, x * 2, x.sin()])
        weights = torch.einsum("d,nbtd->nbt", self.query, layers).softmax(0)
        return torch.einsum("nbt,nbtd->btd", weights, layers)


class DepthPoolingByActivations(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        layers = torch.stack([x, x * 2, x.sin()])
        weights = torch.einsum("btd,nbtd->nbt", x, layers).softmax(0)
        return torch.einsum("nbt,nbtd->btd", weights, layers)


class LinearAttention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.softmax(-1) @ (x.softmax(-2).mT @ x)


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(D, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.mean(1)).softmax(-1)


class ExternalMemory(nn.Module):
    """Keys and values are parameters: a mixture of learned vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.keys, self.values = (nn.Parameter(torch.randn(6, D)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.keys.T).softmax(-1) @ self.values


class ChannelAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(D, 3 * D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return ((F.normalize(q.mT, dim=-1) @ F.normalize(k.mT, dim=-1).mT).softmax(-1) @ v.mT).mT


@pytest.mark.parametrize(
    "module",
    [
        Router, NormalisedRouter, DepthPooling, DepthPoolingByActivations, LinearAttention,
        Classifier, ExternalMemory, ChannelAttention,
    ],
)  # fmt: skip
def test_what_is_no_attention_is_never_called_one(module: type[nn.Module]) -> None:
    assert match(module(), (torch.randn(B, 12, D),)).masks == []
