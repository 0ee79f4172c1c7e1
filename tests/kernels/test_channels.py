"""nsa::channels: the channels that carry the product of queries and keys."""

from __future__ import annotations

import pytest
import torch

import nsa_compile.kernels.library  # noqa: F401
from nsa_compile.kernels.score import reference
from tests.kernels.inputs import MASKS, SIZES, Site


@pytest.mark.parametrize("name", [*MASKS, *SIZES])
def test_equals_the_reference(name: str) -> None:
    site = {**MASKS, **SIZES}[name]
    q, k, _ = site.tensors()
    got = torch.ops.nsa.channels(q, k, site.valid(), 8, 0)
    assert got.dtype == torch.int32
    assert torch.equal(got, reference.channels(q, k, site.valid(), 8))


def test_strong_channels_of_each_group_are_found() -> None:
    q, k, _ = Site(kv_heads=2, group=2).tensors(torch.float32)
    q[:, :2, :, 5] *= 9
    k[:, 0, :, 11] *= 9
    k[:, 1, :, 3] = 100.0  # Constant over keys: the softmax never notices it.
    got = torch.ops.nsa.channels(q, k, None, 2, 0)
    assert got[:, 0].tolist() == [[5, 11]] * 2
    assert not (got[:, 1] == 3).any()


def test_ties_go_to_the_lower_channel() -> None:
    q, k = torch.ones(1, 2, 8, 32), torch.zeros(1, 1, 8, 32)
    assert torch.ops.nsa.channels(q, k, None, 4, 0).tolist() == [[[0, 1, 2, 3]]]


def test_no_more_channels_than_there_are() -> None:
    q, k, _ = Site(dim=32).tensors()
    expected = torch.arange(32, dtype=torch.int32).expand(2, 2, 32)
    assert torch.equal(torch.ops.nsa.channels(q, k, None, 64, 0), expected)


def test_dense_length_skips_the_work() -> None:
    q, k, _ = Site(q_len=40).tensors()
    assert not torch.ops.nsa.channels(q, k, None, 8, 40).any()
    assert torch.ops.nsa.channels(q, k, None, 8, 39).any()


def test_padding_may_hold_nan() -> None:
    site = Site(padding="left")
    q, k, _ = site.tensors()
    expected = torch.ops.nsa.channels(q, k, site.valid(), 8, 0)
    k = k.masked_fill(~site.valid()[:, None, :, None], torch.nan)
    assert torch.equal(torch.ops.nsa.channels(q, k, site.valid(), 8, 0), expected)
