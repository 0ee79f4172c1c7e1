"""nsa::refine_blocks: of the proposed blocks, those that the float64 reference chooses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import nsa_compile.kernels.library  # noqa: F401
from nsa_compile.kernels.refine import reference
from tests.kernels import refine_cases
from tests.kernels.inputs import MASKS, SIZES, TERMS, Site
from tests.kernels.test_select_blocks import select

ALL = {**MASKS, **SIZES, **TERMS}


def propose(site: Site, q: Tensor, k: Tensor) -> Tensor:
    """[B, Hkv, NT, n + 4] candidates."""
    return select(site.but(num_selected=site.num_selected + 4), "channels", q, k)


def refine(site: Site, q: Tensor, k: Tensor, candidates: Tensor, dense_len: int = 0) -> Tensor:
    blocks = torch.ops.nsa.refine_blocks(
        q, k, candidates.flatten(2), *site.terms(), *site.logits, site.query_tile, site.block,
        site.num_selected, site.init_blocks, site.local_window, dense_len,
    )  # fmt: skip
    return blocks.unflatten(2, (site.tiles, site.num_selected))


def expected(site: Site, q: Tensor, k: Tensor, candidates: Tensor) -> Tensor:
    return reference.refine_blocks(
        q, k, candidates, *site.terms(), *site.logits, site.query_tile, site.block,
        site.num_selected, site.init_blocks, site.local_window,
    )  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_equals_the_reference(name: str) -> None:
    site = ALL[name]
    q, k, _ = site.tensors()
    candidates = propose(site, q, k)
    assert torch.equal(refine(site, q, k, candidates), expected(site, q, k, candidates))


@pytest.mark.parametrize("name", ["padding", "window", "not causal", "group of three"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_triton_chooses_the_best(name: str, dtype: torch.dtype, interpreted) -> None:
    cases = {
        "padding": Site(padding="left", kv_heads=1),
        "window": Site(window=50, q_len=100, group=1),
        "not causal": Site(causal=False, q_len=70, block=8, local_window=8),
        "group of three": Site(
            group=3, dim=24, kv_heads=1, block=32, query_tile=32, local_window=9
        ),
    }
    interpreted(refine_cases.chooses_the_best, cases[name], dtype)


@pytest.mark.parametrize(
    "changes",
    [
        {"ranges": "chunks", "window": 50},
        {"ranges": "random", "causal": False, "padding": "left"},
        {"segments": "documents", "group": 3, "kv_heads": 1},
        {"slopes": True, "positions": True, "block": 8, "local_window": 8},
        {"softcap": 1.5},
        {"softcap": 1.5, "slopes": True, "ranges": "chunks", "segments": "mixed"},
    ],
)
def test_triton_knows_ranges_segments_alibi_and_caps(changes: dict, interpreted) -> None:
    site = Site(q_len=80, kv_heads=1).but(**changes)
    interpreted(refine_cases.chooses_the_best, site, torch.float32)


def test_an_exact_second_look_finds_what_few_channels_hide() -> None:
    """One key far back matches only on a channel that the scorer does not read."""
    site = Site(batch=1, kv_heads=1, group=1, q_len=512, dim=32, num_selected=5, channels=4)
    q, k, _ = site.tensors()
    q[..., -1] = 0.0
    k[..., -1] = 0.0
    q[:, :, -16:, -1] = 8.0
    k[:, :, 200, -1] = 8.0
    candidates = torch.arange(site.blocks).expand(1, 1, site.tiles, -1)
    seen = candidates <= torch.arange(site.tiles)[:, None]
    candidates = candidates.masked_fill(~seen, -1).to(torch.int32)
    assert 200 // site.block not in select(site, "channels", q, k)[0, 0, -1]
    assert 200 // site.block in refine(site, q, k, candidates)[0, 0, -1]


def test_dense_lengths_and_small_proposals_pass_through() -> None:
    site = Site(num_selected=6)
    q, k, _ = site.tensors()
    few = select(site.but(num_selected=5), "channels", q, k)
    padded = torch.nn.functional.pad(few, (0, 1), value=-1)
    assert torch.equal(refine(site, q, k, few), padded)
    nothing = torch.full_like(propose(site, q, k), -1)
    assert (refine(site, q, k, nothing, dense_len=site.keys) == -1).all()


@pytest.mark.parametrize("site", [Site(), TERMS["everything"]])
def test_opcheck(site: Site) -> None:
    q, k, _ = site.tensors(torch.float32)
    args = (
        q, k, propose(site, q, k).flatten(2), *site.terms(), *site.logits, site.query_tile,
        site.block, site.num_selected, site.init_blocks, site.local_window, 0,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.nsa.refine_blocks.default, args)
