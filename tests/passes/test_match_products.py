"""Products in further spellings: read, or reported, and never read wrongly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.passes.match_checking import match

B, H, T, D = 2, 4, 12, 8
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def qkv() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(B, H, T, D) for _ in range(3))


def one(attend: Attend) -> Attend:
    """``attend`` on matrices."""
    return lambda q, k, v: attend(q[0, 0], k[0, 0], v[0, 0])


def interleaved(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum(q, [0, 1, 2, 3], k, [0, 1, 4, 3], [0, 1, 2, 4])
    return torch.einsum(scores.softmax(-1), [..., 2, 4], v, [..., 4, 3], [..., 2, 3])


def multiplied_and_summed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q[:, :, :, None] * k[:, :, None]).sum(-1).softmax(-1)
    return (weights[..., None] * v[:, :, None]).sum(dim=-2)


@pytest.mark.parametrize(
    "attend",
    [
        multiplied_and_summed,
        interleaved,
        one(lambda q, k, v: torch.tensordot(q, k, dims=([1], [1])).softmax(-1) @ v),
        one(lambda q, k, v: torch.tensordot((q @ k.t()).softmax(-1), v, dims=1)),
        one(lambda q, k, v: torch.inner(q, k).softmax(-1) @ v),
        one(lambda q, k, v: torch.inner((q @ k.t()).softmax(-1), v.t())),
        one(lambda q, k, v: torch.addmm(torch.zeros(T, T), q, k.t(), alpha=0.5).softmax(-1) @ v),
        lambda q, k, v: torch.linalg.matmul(q, k.mT).softmax(-1) @ v,
        lambda q, k, v: (q @ k.movedim(-1, -2)).softmax(-1) @ v,
    ],
)
def test_read(attend: Attend) -> None:
    found = match(attend, qkv())
    assert (found.masks, found.checked) == (["full"], 1)


def written_in_between(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q * 1.0
    products = q[:, :, :, None] * k[:, :, None]
    q.mul_(2)
    return products.sum(-1).softmax(-1) @ v + q.mean()


def into_a_buffer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.empty(B, H, T, T)
    for head in range(H):
        scores[:, head] = q[:, head] @ k[:, head].mT
    return scores.softmax(-1) @ v


def weights_into_a_buffer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.zeros(B, H, T, T)
    weights[...] = (q @ k.mT).softmax(-1)
    return weights @ v


def out_argument(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.empty(B, H, T, T)
    torch.matmul(q, k.mT, out=scores)
    return scores.softmax(-1) @ v


def three_operands(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhij,bhjd,de->bhie", (q @ k.mT).softmax(-1), v, q[0, 0, :D])


@pytest.mark.parametrize(
    "attend",
    [
        written_in_between,
        into_a_buffer,
        weights_into_a_buffer,
        out_argument,
        three_operands,
        one(lambda q, k, v: torch.addmm(v, (q @ k.t()).softmax(-1), v)),
        lambda q, k, v: torch.baddbmm(v[0], (q[0] @ k[0].mT).softmax(-1), v[0]),
        lambda q, k, v: torch.baddbmm(v[0], (q[0] @ k[0].mT).softmax(-1), v[0], beta=0, alpha=2),
        one(lambda q, k, v: torch.tensordot((q @ k.t()).softmax(-1), v, dims=([0], [0]))),
        one(lambda q, k, v: torch.linalg.multi_dot([(q @ k.t()).softmax(-1), v, q[:D]])),
        lambda q, k, v: torch.addbmm(torch.zeros(T, T), q[0], k[0].mT).softmax(-1) @ v[0],
    ],
)
def test_reported(attend: Attend) -> None:
    (site,) = match(attend, qkv()).sites
    assert site.mask.code == "unrecognised_attention"  # type: ignore[union-attr]
    assert "%" in site.mask.detail  # type: ignore[union-attr]
