"""nsa::selected_attention against explicit matrices in float64, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import nsa_compile.kernels.library  # noqa: F401
from nsa_compile.kernels.attend import cpu, plan, reference
from tests.kernels.inputs import MASKS, SIZES, TERMS, Site, poisoned, relative_error

attend_split = cpu._attend_split
ALL = {**MASKS, **TERMS, **SIZES}


def attend(
    site: Site, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, dense_len: int = 0
) -> tuple[Tensor, Tensor]:
    return torch.ops.nsa.selected_attention(q, k, v, blocks, *site.attention, dense_len)


def expected_of(
    site: Site, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor
) -> tuple[Tensor, Tensor]:
    return reference.selected_attention(q, k, v, blocks, *site.attention)


def gradients(out: Tensor, lse: Tensor, inputs: tuple[Tensor, ...], with_lse: bool) -> list[Tensor]:
    """Gradients of a weighted sum; rows that see nothing (lse -inf) take no part in lse's."""
    rng = torch.Generator().manual_seed(5)
    weight = torch.randn(out.shape, generator=rng, dtype=torch.float64).to(out.dtype)
    loss = (out * weight).sum()
    if with_lse:
        weight = torch.randn(lse.shape, generator=rng, dtype=torch.float64).to(lse.dtype)
        loss = loss + torch.where(lse > -torch.inf, lse * weight, 0.0).sum()
    return list(torch.autograd.grad(loss, inputs))


@pytest.mark.parametrize("name", ALL)
def test_equals_the_reference(name: str) -> None:
    site = ALL[name]
    inputs = site.tensors(requires_grad=True)
    blocks = site.random_blocks()
    with poisoned():
        out, lse = attend(site, *inputs, blocks)
        got = gradients(out, lse, inputs, with_lse=True)
    expected = expected_of(site, *inputs, blocks)
    assert out.transpose(1, 2).is_contiguous()
    assert lse.is_contiguous()
    torch.testing.assert_close((out, lse), expected)
    torch.testing.assert_close(got, gradients(*expected, inputs, with_lse=True))


@pytest.mark.parametrize("dense_len", [0, 10**6])
@pytest.mark.parametrize("name", {**MASKS, **SIZES})
def test_full_budget_equals_sdpa(name: str, dense_len: int) -> None:
    """All blocks selected, and the dense path below ``dense_len``: both are SDPA."""
    site = ALL[name]
    q, k, v = inputs = site.tensors(requires_grad=True)
    mask = site.site_mask()
    blocks = site.all_blocks() if dense_len == 0 else torch.full_like(site.all_blocks(), -1)
    out, lse = attend(site, *inputs, blocks, dense_len)
    sees = mask.any(dim=-1, keepdim=True)
    expected = F.scaled_dot_product_attention(
        q, k.repeat_interleave(site.group, 1), v.repeat_interleave(site.group, 1),
        attn_mask=mask | ~sees, scale=site.scale,
    ).where(sees, 0.0)  # fmt: skip
    torch.testing.assert_close(out, expected)
    assert torch.equal(lse == -torch.inf, (~sees[..., 0]).expand_as(lse))
    got = gradients(out, lse, inputs, with_lse=False)
    torch.testing.assert_close(got, gradients(expected, lse, inputs, with_lse=False))


@pytest.mark.parametrize("name", {**MASKS, **TERMS})
def test_dense_path_has_lse_and_its_gradient(name: str) -> None:
    site = ALL[name]
    inputs = site.tensors(requires_grad=True)
    expected = expected_of(site, *inputs, site.all_blocks())
    with poisoned():
        out, lse = attend(site, *inputs, site.all_blocks(), dense_len=10**6)
        got = gradients(out, lse, inputs, with_lse=True)
    torch.testing.assert_close((out, lse), expected)
    torch.testing.assert_close(got, gradients(*expected, inputs, with_lse=True))


@pytest.mark.parametrize("dense_len", [0, 10**6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "name",
    ["causal", "causal, window", "left padding", "G=3", "D=128, Dv=96", "documents", "alibi",
     "cap"],
)  # fmt: skip
def test_low_precision(name: str, dtype: torch.dtype, dense_len: int) -> None:
    site = ALL[name].but(scale=0.1)
    inputs = site.tensors(dtype, requires_grad=True)
    blocks = site.random_blocks() if dense_len == 0 else site.all_blocks()
    out, lse = attend(site, *inputs, blocks, dense_len)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    exact = tuple(x.detach().double().requires_grad_() for x in inputs)
    expected, expected_lse = expected_of(site, *exact, blocks)
    tolerance = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert relative_error(out, expected) < tolerance
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-3, atol=1e-3)
    got = gradients(out, lse, inputs, with_lse=False)
    wanted = gradients(expected, expected_lse, exact, with_lse=False)
    for mine, true in zip(got, wanted, strict=True):
        assert mine.dtype == dtype
        assert relative_error(mine, true) < 3 * tolerance


@pytest.mark.parametrize("name", ["causal", "causal, window", "offset", "G=4", "tile 64"])
def test_tiles_in_several_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs along the diagonal share a mask; the first tiles read all they see."""
    site = ALL[name].but(q_len=200, kv_len=200, offset=0)
    inputs = site.tensors(requires_grad=True)
    last = (torch.arange(1, site.tiles + 1) * site.query_tile - 1) // site.block
    window = last[:, None] + torch.arange(-3, 1)
    blocks = torch.cat((torch.zeros(site.tiles, 1), window.clamp(min=-1)), dim=1)
    site = site.but(num_selected=blocks.shape[1])
    blocks = blocks.sort(dim=1).values.to(torch.int32).expand(site.batch, site.kv_heads, -1, -1)
    # Four tiles a run.
    size = site.num_selected * site.block * site.dim
    monkeypatch.setattr(plan, "_GATHERED", 4 * size // torch.get_num_threads())
    out, lse = attend(site, *inputs, blocks)
    got = gradients(out, lse, inputs, with_lse=True)
    expected = expected_of(site, *inputs, blocks)
    torch.testing.assert_close((out, lse), expected)
    torch.testing.assert_close(got, gradients(*expected, inputs, with_lse=True))


def nearby_blocks(site: Site) -> Tensor:
    """Block 0, one of the tile's own choice, the three next to its queries."""
    own = torch.arange(site.tiles)[:, None]
    blocks = torch.cat((own * 0, 1 + own % 3, own + torch.arange(4, 7)), dim=1)
    return blocks.to(torch.int32).repeat(site.batch, site.kv_heads, 1, 1)


NEARBY = Site(q_len=160, kv_len=300, num_selected=5, offset=96)


@pytest.mark.parametrize(
    "site",
    {
        "causal": NEARBY,
        "two tiles a run": NEARBY.but(group=1),
        "short last tile": NEARBY.but(q_len=150),
        "keys end with the queries": NEARBY.but(kv_len=250, q_len=154),
        "narrow values": NEARBY.but(value_dim=16),
        "tile of two blocks": NEARBY.but(block=8, q_len=80, kv_len=180, offset=48),
        "rows that see no near key": NEARBY.but(offset=56),
    }.values(),
    ids=str,
)
def test_blocks_next_to_the_queries_are_read_in_place(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "_SPLIT", 0)
    monkeypatch.setattr(plan, "_GATHERED", 4 * site.block * site.dim // torch.get_num_threads())
    inputs, blocks = site.tensors(), nearby_blocks(site)
    if site.block == 8:
        own = 2 * torch.arange(site.tiles)[:, None]
        blocks[..., 2:] = (own + torch.arange(6, 9)).to(torch.int32)
    split = []
    monkeypatch.setattr(cpu, "_attend_split", lambda *x: (split.append(x), attend_split(*x)))
    out, lse = attend(site, *inputs, blocks)
    assert split
    torch.testing.assert_close((out, lse), expected_of(site, *inputs, blocks))


@pytest.mark.parametrize(
    ("changes", "place", "block"),
    [
        ({}, (3, 3), -1),  # a gap in the row, an empty slot at the end
        ({}, (3, 4), 12),  # does not move with the tiles
        ({"offset": 16}, (0, 0), 0),  # slots far away that the mask cuts
        ({"padding": "right"}, (0, 0), 0),
        ({"slopes": True}, (0, 0), 0),
        ({"softcap": 5.0}, (0, 0), 0),
    ],
)
def test_blocks_that_cannot_be_read_in_place(
    changes: dict[str, Any], place: tuple[int, int], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "_SPLIT", 0)
    monkeypatch.setattr(cpu, "_attend_split", lambda *x: pytest.fail("read in place"))
    site = NEARBY.but(**changes)
    inputs, blocks = site.tensors(), nearby_blocks(site)
    blocks[:, :, place[0], place[1]] = block
    blocks = blocks.masked_fill(blocks < 0, site.blocks).sort(dim=-1).values
    blocks = blocks.masked_fill(blocks == site.blocks, -1)
    torch.testing.assert_close(attend(site, *inputs, blocks), expected_of(site, *inputs, blocks))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("q_len", [40, 100, 111])
def test_leading_tiles_that_read_all_they_see(q_len: int, causal: bool) -> None:
    """They are dense attention, whichever tiles follow."""
    site = Site(q_len=q_len, kv_len=111, causal=causal, num_selected=7)
    inputs = site.tensors()
    blocks = site.all_blocks().clone()
    blocks[:, :, 3:] = site.random_blocks()[:, :, 3:]
    torch.testing.assert_close(attend(site, *inputs, blocks), expected_of(site, *inputs, blocks))


def test_unordered_repeated_and_missing_blocks() -> None:
    """A block named twice counts once, in any order; -1 and blocks past the end count never."""
    site = Site(q_len=100)
    inputs = site.tensors()
    blocks = torch.tensor([5, 2, 5, -1, 2, 0, 99], dtype=torch.int32)
    blocks = blocks.expand(site.batch, site.kv_heads, site.tiles, -1)
    ordered = torch.tensor([0, 2, 5], dtype=torch.int32)
    ordered = ordered.expand(site.batch, site.kv_heads, site.tiles, -1)
    torch.testing.assert_close(attend(site, *inputs, blocks), expected_of(site, *inputs, ordered))


@pytest.mark.parametrize("dense_len", [0, 10**6])
def test_rows_that_see_nothing(dense_len: int) -> None:
    site = Site(padding="nothing valid", q_len=40)
    inputs = site.tensors(torch.float32, requires_grad=True)
    out, lse = attend(site, *inputs, site.all_blocks(), dense_len)
    assert not out[-1].any()
    assert (lse[-1] == -torch.inf).all()
    # A loss of lse itself has infinite gradients there.
    grad_lse = torch.where(lse == -torch.inf, torch.inf, 1.0)
    for results, upstream in (((out,), (out,)), ((out, lse), (out, grad_lse))):
        for grad in torch.autograd.grad(results, inputs, upstream, retain_graph=True):
            assert not grad[-1].any()
            assert grad[0].isfinite().all()
            assert grad[0].any()


@pytest.mark.parametrize("dense_len", [0, 10**6])
def test_strides_do_not_matter(dense_len: int) -> None:
    site = Site(q_len=100)
    inputs = site.tensors(torch.float32)
    blocks = site.random_blocks()
    expected = attend(site, *inputs, blocks, dense_len)
    spread = [torch.empty(*x.shape[:3], 2 * x.shape[3])[..., ::2].copy_(x) for x in inputs]
    torch.testing.assert_close(attend(site, *spread, blocks, dense_len), expected)
    torch.testing.assert_close(
        attend(site, *(x.contiguous() for x in inputs), blocks, dense_len), expected
    )


def test_padding_may_hold_nan() -> None:
    site = Site(padding="right")
    q, k, v = site.tensors()
    blocks = site.random_blocks()
    expected = attend(site, q, k, v, blocks)
    hidden = ~site.valid()[:, None, :, None]
    k, v = k.masked_fill(hidden, torch.nan), v.masked_fill(hidden, torch.nan)
    torch.testing.assert_close(attend(site, q, k, v, blocks), expected)


def test_dense_length_is_compared_with_the_number_of_keys() -> None:
    site = Site(q_len=20, kv_len=64, offset=44)
    inputs = site.tensors()
    nothing = torch.full_like(site.all_blocks(), -1)
    out, lse = attend(site, *inputs, nothing, dense_len=63)
    assert not out.any()
    assert (lse == -torch.inf).all()
    out, _ = attend(site, *inputs, nothing, dense_len=64)
    torch.testing.assert_close(out, expected_of(site, *inputs, site.all_blocks())[0])


def test_only_lse_is_used() -> None:
    site = Site(q_len=40)
    inputs = site.tensors(requires_grad=True)
    blocks = site.all_blocks()
    got = torch.autograd.grad(attend(site, *inputs, blocks)[1].sum(), inputs[:2])
    expected = torch.autograd.grad(expected_of(site, *inputs, blocks)[1].sum(), inputs[:2])
    torch.testing.assert_close(got, expected)


def test_differentiating_the_gradient_is_an_error() -> None:
    site = Site(q_len=20)
    q, k, v = site.tensors(requires_grad=True)
    out, _ = attend(site, q, k, v, site.all_blocks())
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no double backward"):
        grad.sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("length", [31, 507, 2000])
@pytest.mark.parametrize("name", {**MASKS, **TERMS})
def test_grid(name: str, length: int, group: int) -> None:
    site = ALL[name].but(q_len=length, kv_len=length, group=group, query_tile=64, block=32)
    inputs = site.tensors(requires_grad=True)
    blocks = site.random_blocks(seed=group)
    out, lse = attend(site, *inputs, blocks)
    expected = expected_of(site, *inputs, blocks)
    torch.testing.assert_close((out, lse), expected)
    torch.testing.assert_close(
        gradients(out, lse, inputs, True), gradients(*expected, inputs, True)
    )
