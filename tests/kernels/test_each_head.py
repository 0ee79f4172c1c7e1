"""A choice for each query head: the same as that many key/value heads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nsa_compile import functional
from tests.kernels.inputs import Site

SITE = Site(q_len=60, group=3, block=4, query_tile=1, num_selected=6, local_window=5)
SITES = {
    "plain": SITE,
    "tile 16": SITE.but(query_tile=16, num_selected=12),
    "padding, not causal": SITE.but(padding="left", causal=False),
    "alibi": SITE.but(slopes=True, positions=True),
    "one head a group": SITE.but(group=1),
}


def expanded(x: Tensor, site: Site) -> Tensor:
    return x.repeat_interleave(site.group, 1)


@pytest.mark.parametrize("scorer", ["channels", "mean"])
@pytest.mark.parametrize("name", SITES)
def test_equals_as_many_kv_heads(name: str, scorer: str) -> None:
    site = SITES[name]
    q, k, v = site.tensors(requires_grad=True)
    valid, ranges, _, _, slopes, positions = site.terms()
    mask = {
        "causal": site.causal, "offset": site.offset, "valid": valid, "ranges": ranges,
        "slopes": slopes, "positions": positions, "scale": site.scale, "block": site.block,
        "query_tile": site.query_tile,
    }  # fmt: skip
    choice = {
        "scorer": scorer, "num_selected": site.num_selected, "local_window": site.local_window,
        "compress_block": 8, "compress_stride": 4,
    }  # fmt: skip
    blocks = functional.select_blocks(q, k, share_selection=False, **choice, **mask)
    assert blocks.shape == (2, 2 * site.group, site.tiles, site.num_selected)
    many = [expanded(x.detach(), site).requires_grad_() for x in (k, v)]
    assert torch.equal(blocks, functional.select_blocks(q, many[0], **choice, **mask))
    results = [
        functional.selected_attention(*inputs, blocks, return_lse=True, **mask)
        for inputs in ((q, k, v), (q, *many))
    ]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    weights = torch.randn_like(results[0][0])
    sums = [(out * weights).sum() + lse.masked_fill(lse.isinf(), 0).sum() for out, lse in results]
    grads = torch.autograd.grad(sums[0], (q, k, v))
    true = torch.autograd.grad(sums[1], (q, *many))
    torch.testing.assert_close(grads[0], true[0])
    for grad, other in zip(grads[1:], true[1:], strict=True):
        torch.testing.assert_close(grad, other.unflatten(1, (2, site.group)).sum(2))


def test_other_numbers_of_heads_are_refused() -> None:
    q, k, v = SITE.tensors()
    blocks = torch.zeros(2, 3, 60, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"\[2, 2, 60, n\], or with Hq=6 for Hkv, got \[2, 3, 60"):
        functional.selected_attention(q, k, v, blocks, block=4, query_tile=1)


def test_interpolation_is_for_compressed_keys() -> None:
    q, k, _ = SITE.tensors()
    with pytest.raises(ValueError, match="needs scorer='mean', got scorer='channels'"):
        functional.select_blocks(q, k, importance="interpolate")
    with pytest.raises(ValueError, match="'overlap' or 'interpolate', got 'nearest'"):
        functional.select_blocks(q, k, importance="nearest")
