"""Scores from 16-bit products: what they choose is as good as the reference's choice."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import nsa_compile.kernels.library  # noqa: F401
from nsa_compile.kernels.refine import reference as refine_reference
from nsa_compile.kernels.score import half
from tests.kernels.inputs import MASKS, SIZES, TERMS, Site, poisoned
from tests.kernels.test_refine_blocks import propose, refine
from tests.kernels.test_select_blocks import assert_best, reference_scores, select

ALL = {**MASKS, **SIZES, **TERMS}
# A share off by a hundredth, times the rows of a tile and the heads of a group that add up.
TOLERANCE = {torch.float16: 0.01, torch.bfloat16: 0.3}


@pytest.fixture(autouse=True, params=[torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """Every product in 16 bits, on a CPU without matrix units too."""
    monkeypatch.setattr(half, "half_dtype", lambda: request.param)
    monkeypatch.setattr(half, "_LEAST_LOGITS", 0)
    return request.param


def assert_chosen(site: Site, q: Tensor, k: Tensor, tolerance: float) -> None:
    scores = reference_scores(site, "channels", q.double(), k.double())
    with poisoned():
        got = select(site, "channels", q, k)
    assert_best(got, scores, tolerance)


@pytest.mark.parametrize("name", ALL)
def test_chooses_what_the_reference_chooses(name: str, dtype: torch.dtype) -> None:
    site = ALL[name]
    q, k, _ = site.tensors(torch.float32)
    assert_chosen(site, q, k, TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["causal", "scattered padding, window", "G=3"])
def test_a_second_look(name: str, dtype: torch.dtype) -> None:
    site = ALL[name]
    q, k, _ = site.tensors(torch.float32)
    candidates = propose(site, q, k)
    forced = refine_reference.forced_candidates(
        candidates, site.q_len, site.causal, site.offset, site.query_tile, site.block,
        site.init_blocks, site.local_window,
    )  # fmt: skip
    scores = refine_reference.candidate_scores(
        q.double(), k.double(), candidates, forced, *site.terms(), *site.logits, site.query_tile,
        site.block,
    )  # fmt: skip
    scores = scores.masked_fill(forced, torch.inf).masked_fill(candidates < 0, -torch.inf)
    got = refine(site, q, k, candidates)
    chosen = ((candidates[..., None] == got[..., None, :]) & (candidates[..., None] >= 0)).any(-1)
    assert torch.equal((got >= 0).sum(-1), chosen.sum(-1))
    worst_in = scores.masked_fill(~chosen, torch.inf).amin(-1)
    best_out = scores.masked_fill(chosen, -torch.inf).amax(-1)
    assert (worst_in >= best_out - 2e-3).all()


@pytest.mark.parametrize("size", [1e-6, 1e6])
def test_numbers_outside_the_range_of_float16(size: float, dtype: torch.dtype) -> None:
    site = Site(q_len=300)
    q, k, _ = site.tensors(torch.float32)
    assert_chosen(site, q * size, k / size, TOLERANCE[dtype])
    assert_chosen(site.but(scale=site.scale / size), q * size, k, TOLERANCE[dtype])


def test_what_all_keys_share_costs_no_digits(dtype: torch.dtype) -> None:
    for site in (Site(q_len=300), Site(q_len=300, padding="scattered")):
        q, k, _ = site.tensors(torch.float32)
        assert_chosen(site, q, k + 300.0, TOLERANCE[dtype])


def test_a_negative_scale(dtype: torch.dtype) -> None:
    q, k, _ = Site(q_len=300).tensors(torch.float32)
    assert_chosen(Site(q_len=300, scale=-0.3), q, k, TOLERANCE[dtype])


def test_blocks_whose_best_key_is_below_the_average(dtype: torch.dtype) -> None:
    """Neighbouring keys alike, so that whole blocks have negative logits."""
    site = Site(q_len=300)
    q, k, _ = site.tensors(torch.float32)
    drift = torch.randn(300 // 16 + 1, 1, generator=torch.Generator().manual_seed(2))
    k = 0.1 * k + drift.repeat_interleave(16, dim=0)[:300] * torch.ones(site.dim)
    assert_chosen(site, q, k, TOLERANCE[dtype])


def test_padding_and_single_keys_may_hold_anything() -> None:
    site = Site(padding="scattered")
    q, k, _ = site.tensors(torch.float32)
    clean = select(site, "channels", q, k)
    hidden = ~site.valid()[:, None, :, None]
    for filler in (torch.nan, torch.inf, 1e30):
        assert torch.equal(select(site, "channels", q, k.masked_fill(hidden, filler)), clean)
    q[0, 0, 0, 0] = torch.nan
    assert_chosen(site, q.nan_to_num(0.0), k, 0.3)
    select(site, "channels", q, k)
    assert q[0, 0, 0, 0].isnan()


@pytest.mark.parametrize("signed", [True, None])
def test_block_maxima(signed: bool | None, dtype: torch.dtype) -> None:
    logits = torch.randn(7, 16, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[1] -= 9.0
    logits[2, :, ::2] = -torch.inf
    logits[3] = -logits[3].abs()
    logits[3, ::3] = -torch.inf
    logits[4] = -torch.inf
    out = torch.empty(7, 24, dtype=dtype)
    half.block_maxima(half.bits(logits), half.bits(out), signed)
    assert torch.equal(out, logits.amax(dim=1))


def test_slopes_and_float64_keep_their_digits() -> None:
    from nsa_compile.kernels.modifiers import Modifiers

    slanted = Modifiers(torch.ones(2), None, 0.0)
    assert half.score_dtype(torch.float32, slanted, 1 << 30) == torch.float32
    assert half.score_dtype(torch.float64, Modifiers(None, None, 0.0), 1 << 30) == torch.float64
