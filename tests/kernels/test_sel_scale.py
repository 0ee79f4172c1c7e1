"""Straight-through scales of chosen blocks: their gradient, and what it is to the scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nsa_compile import functional
from nsa_compile.kernels.compressed import reference as compressed
from nsa_compile.kernels.compressed.site import Site as CompressedSite
from nsa_compile.kernels.importance import gradient
from nsa_compile.kernels.importance import reference as importance
from nsa_compile.kernels.scaled import reference as scaled
from nsa_compile.kernels.scaled.slots import by_slot, first_named
from tests.kernels import triton_cases
from tests.kernels.inputs import Site
from tests.kernels.triton_cases import Case

SMALL = Site(
    batch=2, q_len=45, dim=8, block=4, query_tile=1, num_selected=4, local_window=1, init_blocks=1
)
SITES = {
    "token granular": SMALL,
    "block 2": SMALL.but(block=2),
    "block 2, stride 8": SMALL.but(block=2, compress_stride=8),
    "stride 6": SMALL.but(block=8, compress_stride=6),
    "block 8, G=3": SMALL.but(block=8, group=3),
    "tile 8, short last": SMALL.but(query_tile=8, num_selected=9, local_window=5),
    "not causal": SMALL.but(causal=False),
    "padding": SMALL.but(padding="scattered"),
    "chunks": SMALL.but(ranges="chunks"),
    "offset": SMALL.but(q_len=20, kv_len=60, offset=40),
    "cross": SMALL.but(q_len=20, kv_len=60, causal=False),
    "D != Dv": SMALL.but(value_dim=12),
    "nothing compressed": SMALL.but(q_len=7),
}


def sizes(site: Site) -> dict[str, Any]:
    valid, ranges, *_ = site.terms()
    return {
        "causal": site.causal, "offset": site.offset, "valid": valid, "ranges": ranges,
        "scale": site.scale, "block": site.block, "query_tile": site.query_tile,
    }  # fmt: skip


def choose(site: Site, q: Tensor, k: Tensor, k_cmp: Tensor, kind: str) -> Any:
    return functional.select_blocks(
        q, k, scorer="mean", k_cmp=k_cmp, num_selected=site.num_selected,
        init_blocks=site.init_blocks, local_window=site.local_window, importance=kind,
        compress_block=site.compress_block, compress_stride=site.compress_stride, sel_scale=True,
        **sizes(site),
    )  # fmt: skip


def path(site: Site, q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor, kind: str) -> Tensor:
    blocks, scales = choose(site, q, k, k_cmp, kind)
    out = functional.selected_attention(q, k, v, blocks, sel_scale=scales, **sizes(site))
    assert isinstance(out, Tensor)
    return out


def exact(
    site: Site, q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor, blocks: Tensor, kind: str
) -> Tensor:
    valid, ranges, *_ = site.terms()
    scoring = (site.compress_block, site.compress_stride)
    mask = (valid, ranges, site.scale, site.causal, site.offset, *scoring)
    _, lse = compressed.compressed_attention(q, k_cmp, k_cmp, *mask)
    tiling = (site.query_tile, site.block)
    scales = importance.selection_scale(
        q, k_cmp, lse, blocks, *mask, site.keys, *tiling, site.init_blocks, site.local_window, kind
    )
    rest = (valid, ranges, None, None, *site.mask, *tiling)
    return scaled.scaled_attention(q, k, v, blocks, scales, *rest)[0]


def inputs(site: Site) -> list[Tensor]:
    """q, k, v and compressed keys that are their own."""
    q, k, v = site.tensors()
    count = max(0, (site.keys - site.compress_block) // site.compress_stride + 1)
    k_cmp = torch.randn(
        *k.shape[:2], count, k.shape[3], generator=torch.Generator().manual_seed(5)
    ).double()
    return [x.requires_grad_() for x in (q, k, v, k_cmp)]


@pytest.mark.parametrize("run", [1 << 20, 1])
@pytest.mark.parametrize("kind", ["overlap", "interpolate"])
@pytest.mark.parametrize("name", SITES)
def test_gradients_equal_the_reference(
    name: str, kind: str, run: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(gradient._GATHERED, "cpu", run)
    site, given = SITES[name], inputs(SITES[name])
    out = path(site, *given, kind)
    blocks, scales = choose(site, given[0], given[1], given[3], kind)
    assert torch.equal(scales, torch.ones(blocks.shape, dtype=scales.dtype))
    true = exact(site, *given, blocks, kind)
    torch.testing.assert_close(out, true)
    weights = torch.randn_like(true)
    grads, expected = (torch.autograd.grad((x * weights).sum(), given) for x in (out, true))
    for each, grad, other in zip(("q", "k", "v", "k_cmp"), grads, expected, strict=True):
        torch.testing.assert_close(grad, other, msg=lambda text, each=each: f"d{each}: {text}")
    assert bool(grads[3].any()) == (name != "nothing compressed")


class Surrogate(torch.autograd.Function):
    """Forward: scales that really are 1 + a(x) - a(x0). Backward: that of the operators at x0."""

    @staticmethod
    def forward(ctx: Any, site: Site, blocks: Tensor, start: list[Tensor], *given: Tensor) -> Any:
        ctx.site, ctx.start = site, start
        ctx.save_for_backward(*given)
        valid, ranges, *_ = site.terms()
        scoring, tiling = (site.compress_block, site.compress_stride), (site.query_tile, site.block)
        mask = (valid, ranges, site.scale, site.causal, site.offset, *scoring)

        def shares(q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor) -> Tensor:
            _, lse = compressed.compressed_attention(q, k_cmp, k_cmp, *mask)
            every = importance.importance(q, k_cmp, lse, *mask, site.keys, *tiling, "overlap")
            return every.gather(3, blocks.long().clamp(min=0))

        fixed = importance.forced(
            site.q_len, site.keys, site.causal, site.offset, *tiling, site.init_blocks,
            site.local_window,
        )  # fmt: skip
        moved = 1 + shares(*given) - shares(*start)
        listed = blocks.long().clamp(min=0)
        chosen = fixed.expand(*blocks.shape[:2], -1, -1).gather(3, listed)
        scales = moved.where(~chosen & (blocks >= 0), 1.0)
        rest = (valid, ranges, None, None, *site.mask, *tiling)
        return scaled.scaled_attention(*given[:3], blocks, scales, *rest)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        with torch.enable_grad():
            given = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            out = path(ctx.site, *given, "overlap")
        return None, None, None, *torch.autograd.grad(out, given, grad)


@pytest.mark.parametrize("changes", [{}, {"query_tile": 4, "num_selected": 5}], ids=str)
def test_gradcheck_against_scales_that_scale(changes: dict[str, Any]) -> None:
    """Differences of an attention whose scales follow the scores, around where they are 1."""
    site = SMALL.but(batch=1, q_len=21, kv_heads=1, dim=4, **changes)
    given = inputs(site)
    blocks, _ = choose(site, given[0], given[1], given[3], "overlap")
    start = [x.detach().clone() for x in given]
    assert torch.autograd.gradcheck(
        lambda *x: Surrogate.apply(site, blocks, start, *x), given, fast_mode=True
    )


def test_scales_of_a_list_in_any_order() -> None:
    """Empty slots and repeated blocks have no gradient, the first of a block has it all."""
    site = SMALL.but(block=8, num_selected=6)
    q, k, v = (x.requires_grad_() for x in site.tensors())
    blocks = torch.randint(-1, 8, (2, 2, 45, 6), generator=torch.Generator().manual_seed(0)).int()
    scales = torch.ones(blocks.shape, dtype=torch.float64, requires_grad=True)
    results = functional.selected_attention(
        q, k, v, blocks, sel_scale=scales, return_lse=True, **sizes(site)
    )
    rest = (None, None, None, None, *site.mask, 1, 8)
    true = scaled.scaled_attention(q, k, v, blocks, scales, *rest)
    weights = [torch.randn_like(x) for x in true]

    def objective(pair: Any) -> Tensor:
        return sum(
            (x.masked_fill(x.isinf(), 0) * w).sum() for x, w in zip(pair, weights, strict=True)
        )

    grads, expected = (
        torch.autograd.grad(objective(pair), (q, k, v, scales)) for pair in (results, true)
    )
    torch.testing.assert_close(grads, expected)
    assert not grads[3][~first_named(blocks) | (blocks < 0)].any()


def test_values_find_their_slots() -> None:
    blocks = torch.tensor([[4, -1, 2, 4, 9], [0, 1, 2, -1, -1]])
    index = torch.tensor([[2, 4, 9, -1, -1], [0, 1, 2, -1, -1]])
    values = torch.arange(1.0, 11).view(2, 5)
    assert by_slot(values, index, blocks).tolist() == [[2, 0, 1, 0, 3], [6, 7, 8, 0, 0]]


@pytest.mark.parametrize("away", [2.0, torch.nan])
def test_scales_must_be_1(away: float) -> None:
    q, k, v = SMALL.tensors()
    blocks = torch.zeros(2, 2, 45, 1, dtype=torch.int32)
    scales = torch.ones(blocks.shape)
    scales[1, 1, 7, 0] = away
    with pytest.raises(ValueError, match="for its gradient alone: expected 1 everywhere"):
        functional.selected_attention(q, k, v, blocks, block=4, query_tile=1, sel_scale=scales)


def test_what_scales_do_not_go_with() -> None:
    q, k, v = SMALL.tensors()
    blocks = torch.zeros(2, 2, 45, 1, dtype=torch.int32)
    attend = {"block": 4, "query_tile": 1, "sel_scale": torch.ones(blocks.shape)}
    with pytest.raises(ValueError, match="sel_scale and softcap do not go together"):
        functional.selected_attention(q, k, v, blocks, softcap=2.0, **attend)
    with pytest.raises(ValueError, match=r"floating \[2, 2, 45, 1\] as block_indices is"):
        functional.selected_attention(q, k, v, blocks, **{**attend, "sel_scale": torch.ones(2)})
    with pytest.raises(ValueError, match="needs scorer='mean', got 'channels'"):
        functional.select_blocks(q, k, sel_scale=True)
    with pytest.raises(ValueError, match="sel_scale=True and window do not go together"):
        functional.select_blocks(q, k, sel_scale=True, scorer="mean", window=9)


CASES = {
    "token granular, group of two": Case(q_len=17, kv_len=45, query_tile=1, block=8, offset=28),
    "block of 2": Case(heads=3, q_len=12, kv_len=30, query_tile=1, block=2, offset=18, count=6),
    "tile 32, group of four, padding": Case(
        heads=4, q_len=50, kv_len=60, query_tile=32, padded=True, batch=2, offset=10
    ),
    "long block, not causal, window": Case(
        q_len=20, kv_len=150, query_tile=4, block=128, causal=False, window=40, offset=30
    ),
    "two kv heads, D != Dv, negative scale": Case(
        heads=4, kv_heads=2, q_len=20, kv_len=40, dim=20, value_dim=40, query_tile=4, scale=-0.3
    ),
    "ranges, segments": Case(
        q_len=30, kv_len=40, ranges="chunks", segments="documents", query_tile=8, offset=10
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_scale_gradient_in_triton(name: str, interpreted) -> None:
    interpreted(triton_cases.scale_gradient, CASES[name], torch.float32)


def test_scale_gradient_in_half_precision(interpreted) -> None:
    case = CASES["tile 32, group of four, padding"]
    interpreted(triton_cases.scale_gradient, case, torch.float16)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = (x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))
        self.elements = max(self.elements, *made, 0)
        return out


def test_memory_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gradient._GATHERED, "cpu", 1 << 12)
    largest = []
    for length in (512, 2048):
        q, k_cmp = torch.randn(1, 2, length, 8), torch.randn(1, 1, length // 4 - 1, 8)
        blocks = torch.randint(0, length // 8, (1, 1, length, 4), dtype=torch.int32)
        site = CompressedSite(None, None, 0.3, True, 0, 8, 4, length)
        choice = gradient.Choice(1, 8, 0, 1, "overlap")
        given = (torch.ones(blocks.shape), q, k_cmp, torch.zeros(1, 2, length), blocks)
        with Largest() as seen:
            gradient.backward(*given, site, choice)
        largest.append(seen.elements)
    assert largest[1] == 4 * largest[0] == 2048 * 2 * 8  # queries and their gradient
