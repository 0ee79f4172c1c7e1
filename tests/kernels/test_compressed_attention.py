"""nsa::compressed_attention on the CPU: the float64 reference, gradients, what it never reads."""

from __future__ import annotations

import pytest
import torch

import nsa_compile.kernels.library  # noqa: F401
from nsa_compile import functional
from nsa_compile.kernels.compressed import reference
from tests.kernels.inputs import MASKS, SIZES, TERMS, Site, poisoned, relative_error

nsa = torch.ops.nsa
SITES = {
    **{name: site for name, site in MASKS.items() if site.window is None},
    **{name: SIZES[name] for name in ("T=1", "T=31", "T=507", "G=3", "G=7", "D=32, Dv=64")},
    **{
        name: site
        for name, site in TERMS.items()
        if site.ranges != "none" and site.softcap == 0 and site.window is None
    },
    "paper's sizes": Site(q_len=300, compress_block=32, compress_stride=16),
    "gaps": Site(compress_block=3, compress_stride=5),
}


def problem(
    site: Site, dtype: torch.dtype
) -> tuple[list[torch.Tensor], tuple[torch.Tensor | None, torch.Tensor | None], tuple[object, ...]]:
    """q and pooled k and v; valid and ranges; the sizes."""
    q, k, v = site.tensors(dtype)
    compression = (site.compress_block, site.compress_stride)
    valid, ranges, *_ = site.terms()
    pooled = (functional.compress(x, block=compression[0], stride=compression[1]) for x in (k, v))
    sizes = (site.scale, site.causal, site.offset, *compression)
    return [q, *pooled], (valid, ranges), sizes


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("name", SITES)
def test_equals_reference(name: str, with_lse: bool) -> None:
    qkv, terms, sizes = problem(SITES[name], torch.float64)
    exact = [x.clone().requires_grad_() for x in qkv]
    out, lse = reference.compressed_attention(*exact, *terms, *sizes)
    sees = ~lse.isinf()
    inputs = [x.clone().requires_grad_() for x in qkv]
    with poisoned():
        got, got_lse = nsa.compressed_attention(*inputs, *terms, *sizes)
        torch.testing.assert_close(got, out)
        torch.testing.assert_close(got_lse, lse)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).double()
        objectives = [(x * weights).sum() for x in (out, got)]
        if with_lse:
            objectives = [
                total + x[sees].square().sum()
                for total, x in zip(objectives, (lse, got_lse), strict=True)
            ]
        expected = torch.autograd.grad(objectives[0], exact)
        grads = torch.autograd.grad(objectives[1], inputs)
    for grad, exact_grad in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, exact_grad)


def test_half_precision() -> None:
    qkv, terms, sizes = problem(Site(padding="scattered"), torch.bfloat16)
    out, lse = nsa.compressed_attention(*qkv, *terms, *sizes)
    expected, _ = reference.compressed_attention(*(x.double() for x in qkv), *terms, *sizes)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    assert relative_error(out, expected) < 1e-2


@pytest.mark.parametrize("boundary", [32, 37, 44])
def test_a_block_across_two_documents_is_read_by_neither(boundary: int) -> None:
    """Values of one document never reach the other, whatever they are."""
    q, k, v = Site(batch=1, q_len=80).tensors(torch.float32)
    at = torch.arange(80, dtype=torch.int32)
    low = torch.where(at < boundary, 0, boundary)
    high = torch.where(at < boundary, boundary, 80)
    ranges = torch.stack((low, high), dim=-1)[None].int()

    def attend(values: torch.Tensor, causal: bool) -> torch.Tensor:
        pooled = (functional.compress(x, block=8, stride=4) for x in (k, values))
        return functional.compressed_attention(
            q, *pooled, block=8, stride=4, causal=causal, ranges=ranges
        )

    other = v.clone()
    other[:, :, boundary:] += 100
    for causal in (True, False):
        before, after = (attend(x, causal)[:, :, :boundary] for x in (v, other))
        assert torch.equal(before, after)
    other = v.clone()
    other[:, :, :boundary] += 100
    assert torch.equal(attend(v, True)[:, :, boundary:], attend(other, True)[:, :, boundary:])


def test_spare_rows_are_not_blocks() -> None:
    qkv, terms, sizes = problem(Site(), torch.float64)
    spare = [torch.nn.functional.pad(x, (0, 0, 0, 2), value=torch.nan) for x in qkv[1:]]
    out, lse = nsa.compressed_attention(*qkv, *terms, *sizes)
    got, got_lse = nsa.compressed_attention(qkv[0], *spare, *terms, *sizes, 111)
    torch.testing.assert_close(got, out)
    torch.testing.assert_close(got_lse, lse)


def test_its_sums_choose_the_same_blocks() -> None:
    site = Site(query_tile=1, padding="left")
    q, k, v = site.tensors(torch.float32)
    valid = site.valid()
    pooled = (functional.compress(x, block=8, stride=4, valid=valid) for x in (k, v))
    k_cmp, v_cmp = pooled
    sizes = {"block": 8, "stride": 4, "valid": valid, "return_lse": True}
    _, lse = functional.compressed_attention(q, k_cmp, v_cmp, **sizes)
    rest = {
        "scorer": "mean", "k_cmp": k_cmp, "valid": valid, "query_tile": 1, "block": 16,
        "num_selected": 5, "local_window": 20, "compress_block": 8, "compress_stride": 4,
    }  # fmt: skip
    expected = functional.select_blocks(q, k, **rest)
    assert torch.equal(functional.select_blocks(q, k, **rest, lse=lse), expected)


def test_wrong_inputs_are_named() -> None:
    q, k, v = Site().tensors(torch.float32)
    with pytest.raises(ValueError, match=r"got k_cmp in torch.float16 and q in torch.float32"):
        functional.compressed_attention(q, k.half(), v, block=8, stride=4)
    with pytest.raises(ValueError, match=r"v_cmp must be .B, Hkv, Nc, Dv. with"):
        functional.compressed_attention(q, k, v[:, :1], block=8, stride=4)
    with pytest.raises(ValueError, match="valid covers 26 compressed blocks of block=8"):
        functional.compressed_attention(
            q, k, v, block=8, stride=4, valid=torch.ones(2, 111, dtype=torch.bool)
        )
    with pytest.raises(ValueError, match="lse is that of scorer 'mean', got scorer 'channels'"):
        functional.select_blocks(q, k, lse=torch.zeros(q.shape[:3]))
    with pytest.raises(ValueError, match=r"lse must be float32 .B, Hq, Tq. = .2, 4, 111."):
        functional.select_blocks(q, k, scorer="mean", lse=torch.zeros(1))


def test_flops_are_two_and_five_products() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    qkv, terms, sizes = problem(Site(), torch.float32)
    inputs = [x.requires_grad_() for x in qkv]
    with FlopCounterMode(display=False) as counter:
        out, _ = nsa.compressed_attention(*inputs, *terms, *sizes)
    once = counter.get_total_flops()
    assert once == 2 * 2 * 4 * 111 * qkv[1].shape[2] * (32 + 32)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == once * 5 // 2
