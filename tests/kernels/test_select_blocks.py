"""nsa::select_blocks: tile by tile the blocks that the float64 reference chooses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import nsa_compile.kernels.library  # noqa: F401
from nsa_compile.kernels.score import cpu as score_cpu
from nsa_compile.kernels.select import reference
from nsa_compile.kernels.select.cpu import best_blocks
from tests.kernels.inputs import MASKS, SIZES, TERMS, Site, poisoned

ALL = {**MASKS, **SIZES, **TERMS}


def summary(site: Site, scorer: str, q: Tensor, k: Tensor) -> Tensor:
    if scorer == "channels":
        return torch.ops.nsa.channels(q, k, site.valid(), site.channels, 0)
    return torch.ops.nsa.compress(k, site.valid(), site.compress_block, site.compress_stride)


def select(site: Site, scorer: str, q: Tensor, k: Tensor, dense_len: int = 0) -> Tensor:
    blocks = torch.ops.nsa.select_blocks(
        q, k, summary(site, scorer, q, k), *site.terms(), scorer, *site.logits, site.query_tile,
        site.block, site.num_selected, site.init_blocks, site.local_window, site.compress_block,
        site.compress_stride, dense_len, None, site.importance,
    )  # fmt: skip
    return blocks.reshape(site.batch, site.kv_heads, site.tiles, site.num_selected)


def reference_scores(site: Site, scorer: str, q: Tensor, k: Tensor) -> Tensor:
    return reference.ranked_scores(
        q, k, summary(site, scorer, q, k), *site.terms(), scorer, *site.logits, site.query_tile,
        site.block, site.init_blocks, site.local_window, site.compress_block, site.compress_stride,
        site.importance,
    )  # fmt: skip


def assert_best(got: Tensor, scores: Tensor, tolerance: float) -> None:
    """Ascending, none twice, none invisible, and nothing better was left out (ties by score)."""
    assert got.dtype == torch.int32
    slots = got.shape[-1]
    chosen = torch.zeros(*scores.shape[:-1], scores.shape[-1] + 1, dtype=torch.int32)
    chosen.scatter_add_(-1, got.long() % (scores.shape[-1] + 1), torch.ones_like(got))
    chosen = chosen[..., :-1]
    assert (chosen <= 1).all()
    later, earlier = got[..., 1:], got[..., :-1]
    assert ((later > earlier) | (later == -1)).all()
    visible = scores > -torch.inf
    assert not (chosen.bool() & ~visible).any()
    assert torch.equal(chosen.sum(-1), visible.sum(-1).clamp(max=slots).int())
    worst_in = scores.masked_fill(~chosen.bool(), torch.inf).amin(-1)
    best_out = scores.masked_fill(chosen.bool(), -torch.inf).amax(-1)
    assert (worst_in >= best_out - tolerance).all()


@pytest.mark.parametrize("scorer", ["channels", "mean"])
@pytest.mark.parametrize("name", ALL)
def test_equals_the_reference(name: str, scorer: str) -> None:
    site = ALL[name]
    q, k, _ = site.tensors()
    with poisoned():
        got = select(site, scorer, q, k)
    assert_best(got, reference_scores(site, scorer, q, k), 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scorer", ["channels", "mean"])
@pytest.mark.parametrize("name", ["causal", "scattered padding, window", "tile 64", "G=3"])
def test_low_precision_inputs(name: str, scorer: str, dtype: torch.dtype) -> None:
    """Halves are scored in float32: the same blocks as for the same numbers in float64."""
    site = ALL[name]
    q, k, _ = site.tensors(dtype)
    got = select(site, scorer, q, k)
    if scorer == "channels":
        q, k = q.double(), k.double()
        scores = reference_scores(site, scorer, q, k)
    else:
        pooled = summary(site, scorer, q, k).double()
        scores = reference.ranked_scores(
            q.double(), k.double(), pooled, *site.terms(), scorer, *site.logits, site.query_tile,
            site.block, site.init_blocks, site.local_window, site.compress_block,
            site.compress_stride,
        )  # fmt: skip
    assert_best(got, scores, 1e-4)


@pytest.mark.parametrize("scorer", ["channels", "mean"])
def test_many_small_pieces(scorer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_cpu, "_PIECE", 256)
    monkeypatch.setattr(score_cpu, "_ROWS", 48)
    sites = (
        Site(q_len=300), Site(q_len=300, window=80, padding="scattered"),
        Site(q_len=300, ranges="random", segments="mixed", slopes=True, softcap=1.5),
    )  # fmt: skip
    for site in sites:
        q, k, _ = site.tensors()
        assert_best(select(site, scorer, q, k), reference_scores(site, scorer, q, k), 1e-9)


@pytest.mark.parametrize("name", ["causal", "full", "left padding", "offset"])
def test_forced_blocks_are_always_there(name: str) -> None:
    site = ALL[name]
    q, k, _ = site.tensors()
    got, scores = select(site, "channels", q, k), reference_scores(site, "channels", q, k)
    forced = (scores == torch.inf).nonzero().tolist()
    assert forced
    assert all(s in got[b, h, t] for b, h, t, s in forced)


def test_strides_do_not_matter() -> None:
    site = Site(q_len=200)
    q, k, _ = site.tensors()
    expected = select(site, "channels", q, k)
    spread = torch.empty(*q.shape[:3], 2 * site.dim, dtype=q.dtype)[..., ::2].copy_(q)
    assert torch.equal(select(site, "channels", spread, k.contiguous()), expected)


def test_padding_may_hold_nan() -> None:
    for scorer in ("channels", "mean"):
        site = Site(padding="scattered")
        q, k, _ = site.tensors()
        expected = select(site, scorer, q, k)
        k = k.masked_fill(~site.valid()[:, None, :, None], torch.nan)
        assert torch.equal(select(site, scorer, q, k), expected)


def test_ties_go_to_the_lower_block() -> None:
    """All logits equal: after the forced blocks come the first ones."""
    site = Site(batch=1, kv_heads=1, q_len=160, causal=False, num_selected=5)
    q, k, _ = site.tensors(torch.float32)
    q = torch.zeros_like(q)
    for t, row in enumerate(select(site, "channels", q, k)[0, 0].tolist()):
        forced = {0, *range(max(0, (t * 16 - 9) // 16), min(9, (t * 16 + 25) // 16) + 1)}
        free = [s for s in range(10) if s not in forced]
        assert row == sorted([*forced, *free[: 5 - len(forced)]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_best_blocks_breaks_ties_downwards(dtype: torch.dtype) -> None:
    inf = torch.inf
    scores = torch.tensor([[1.0, 2.0, 1.0, inf, 0.0, 1.0], [-inf, 0.0, -inf, 0.0, -inf, -inf]])
    assert best_blocks(scores.to(dtype), 3).tolist() == [[0, 1, 3], [1, 3, -1]]
    assert best_blocks(scores.to(dtype), 7).tolist() == [
        [0, 1, 2, 3, 4, 5, -1], [1, 3, -1, -1, -1, -1, -1],
    ]  # fmt: skip


def test_budget_too_small_for_the_forced_blocks() -> None:
    site = Site(q_len=400, local_window=100)
    q, k, _ = site.tensors()
    with pytest.raises(ValueError, match=r"num_selected=5 .* local_window=100"):
        select(site, "channels", q, k)


def test_dense_length_skips_selection() -> None:
    site = Site(q_len=400, local_window=100)
    q, k, _ = site.tensors()
    assert (select(site, "channels", q, k, dense_len=400) == -1).all()
