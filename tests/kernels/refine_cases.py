"""Runs the Triton kernel of refine_blocks on one site and holds it against the reference."""

from __future__ import annotations

import torch

import nsa_compile.kernels.library  # noqa: F401
from nsa_compile.kernels.modifiers import Modifiers
from nsa_compile.kernels.refine import reference
from nsa_compile.kernels.visibility import Visibility
from tests.kernels.inputs import Site


def chooses_the_best(site: Site, dtype: torch.dtype, device: str = "cpu") -> None:
    """Forced blocks kept, ascending, and no free candidate left out that beats a chosen one."""
    from nsa_compile.kernels.refine import triton_kernel

    q, k, _ = (x.to(dtype).to(device) for x in site.tensors())
    valid, *_ = terms = site.terms()
    placed = [x if x is None else x.to(device) for x in terms]
    visibility, modifiers = Visibility(*placed[:4]), Modifiers(*placed[4:], site.softcap)
    wide = q.double().cpu(), k.double().cpu()
    channels = torch.ops.nsa.channels(*wide, valid, site.channels, 0)
    candidates = torch.ops.nsa.select_blocks(
        *wide, channels, *terms, "channels", *site.logits, site.query_tile, site.block,
        site.num_selected + 4, site.init_blocks, site.local_window, site.compress_block,
        site.compress_stride, 0,
    ).unflatten(2, (site.tiles, -1))  # fmt: skip
    got = triton_kernel.refine_blocks(
        q, k, candidates.to(device), visibility, modifiers, *site.mask, site.query_tile, site.block,
        site.num_selected, site.init_blocks, site.local_window,
    ).cpu()  # fmt: skip
    forced = reference.forced_candidates(
        candidates, site.q_len, site.causal, site.offset, site.query_tile, site.block,
        site.init_blocks, site.local_window,
    )  # fmt: skip
    scores = reference.candidate_scores(
        *wide, candidates, forced, *terms, *site.logits, site.query_tile, site.block
    )
    scores = scores.masked_fill(forced, torch.inf).masked_fill(candidates < 0, -torch.inf)
    chosen = ((candidates[..., None] == got[..., None, :]) & (candidates[..., None] >= 0)).any(-1)
    assert torch.equal(chosen.sum(-1), (got >= 0).sum(-1))
    assert torch.equal((got >= 0).sum(-1), (candidates >= 0).sum(-1).clamp(max=site.num_selected))
    assert ((got[..., 1:] > got[..., :-1]) | (got[..., 1:] == -1)).all()
    worst_in = scores.masked_fill(~chosen, torch.inf).amin(-1)
    best_out = scores.masked_fill(chosen, -torch.inf).amax(-1)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    assert (worst_in >= best_out - tolerance).all()
