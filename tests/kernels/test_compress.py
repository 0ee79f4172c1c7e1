"""nsa::compress against its reference, forward and backward."""

from __future__ import annotations

import pytest
import torch

import nsa_compile.kernels.library  # noqa: F401
from nsa_compile.kernels.compress import reference
from tests.kernels.inputs import Site, poisoned, relative_error

SIZES = [(8, 4), (8, 8), (32, 16), (6, 4), (1, 1), (4, 9)]


@pytest.mark.parametrize("padding", ["none", "left", "right", "scattered", "nothing valid"])
@pytest.mark.parametrize(("block", "stride"), SIZES)
@pytest.mark.parametrize("length", [1, 31, 63, 111])
def test_equals_the_reference(length: int, block: int, stride: int, padding: str) -> None:
    site = Site(q_len=length, padding=padding)
    _, x, _ = site.tensors(requires_grad=True)
    with poisoned():
        pooled = torch.ops.nsa.compress(x, site.valid(), block, stride)
    expected = reference.compress(x, site.valid(), block, stride)
    assert pooled.is_contiguous()
    torch.testing.assert_close(pooled, expected)
    if pooled.numel() == 0:
        return
    weight = torch.randn_like(pooled)
    (got,) = torch.autograd.grad((pooled * weight).sum(), x)
    (wanted,) = torch.autograd.grad((expected * weight).sum(), x)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_summed_in_float32(dtype: torch.dtype) -> None:
    _, x, _ = Site(q_len=507).tensors(dtype)
    pooled = torch.ops.nsa.compress(x, None, 64, 16)
    assert pooled.dtype == dtype
    expected = reference.compress(x.double(), None, 64, 16)
    assert relative_error(pooled, expected) < torch.finfo(dtype).eps / 2


def test_padding_may_hold_nan() -> None:
    site = Site(padding="right")
    _, x, _ = site.tensors()
    expected = torch.ops.nsa.compress(x, site.valid(), 8, 4)
    poisoned_x = x.masked_fill(~site.valid()[:, None, :, None], torch.nan)
    torch.testing.assert_close(torch.ops.nsa.compress(poisoned_x, site.valid(), 8, 4), expected)


def test_spare_rows_are_zero_and_belong_to_no_block() -> None:
    _, x, _ = Site().tensors(requires_grad=True)
    pooled = torch.ops.nsa.compress(x, None, 8, 4, 2)
    torch.testing.assert_close(pooled[:, :, :-2], torch.ops.nsa.compress(x, None, 8, 4))
    assert not pooled[:, :, -2:].any()
    (grad,) = torch.autograd.grad(pooled.sum(), x)
    (expected,) = torch.autograd.grad(torch.ops.nsa.compress(x, None, 8, 4).sum(), x)
    torch.testing.assert_close(grad, expected)


def test_differentiating_the_gradient_is_an_error() -> None:
    _, x, _ = Site(q_len=20).tensors(requires_grad=True)
    (grad,) = torch.autograd.grad(
        torch.ops.nsa.compress(x, None, 8, 4).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="no double backward"):
        grad.sum().backward()


def test_a_short_sequence_is_not_pooled():
    x = torch.randn(1, 2, 40, 8, requires_grad=True)
    pooled = torch.ops.nsa.compress(x, None, 8, 4, 2, 40)
    assert pooled.shape == torch.ops.nsa.compress(x, None, 8, 4, 2, 39).shape
    assert not pooled.any()
    (dx,) = torch.autograd.grad(pooled.sum(), x)
    assert not dx.any()
