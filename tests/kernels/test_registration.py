"""The operators as torch sees them: opcheck, meta tensors, dynamic shapes, FLOPs, no Triton."""

from __future__ import annotations

import importlib.util
import itertools
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

import nsa_compile.kernels.library  # noqa: F401
from nsa_compile.kernels.launchers import launchers
from tests.kernels.inputs import TERMS, Site

nsa = torch.ops.nsa
PLAIN = (None,) * 6  # neither padding nor any further term


def calls(site: Site, requires_grad: bool, dense_len: int) -> dict[str, tuple[Any, ...]]:
    """Arguments of every operator for one site."""
    q, k, v = site.tensors(torch.float32, requires_grad=requires_grad)
    rich = site.but(ranges="random", segments="mixed", slopes=True, positions=True, softcap=2.0)
    valid, sizes = site.valid(), (site.compress_block, site.compress_stride)
    channels = nsa.channels(q, k, valid, 8, 0)
    pooled = nsa.compress(k, valid, *sizes)
    tiling = (site.query_tile, site.block)
    budget = (site.num_selected, site.init_blocks, site.local_window, *sizes, dense_len)
    select = ("channels", *site.logits, *tiling, *budget)
    blocks = nsa.select_blocks(q, k, channels, *site.terms(), *select)
    attention = (blocks, *site.attention, dense_len)
    out, lse = nsa.selected_attention(q, k, v, *attention)
    detached = [x.detach() for x in (q, k, v, out, lse)]
    pooled_values = nsa.compress(v, valid, *sizes)
    terms = (valid, rich.terms()[1], site.scale, site.causal, site.offset, *sizes, site.keys)
    over_pooled = [x.detach().requires_grad_(requires_grad) for x in (q, pooled, pooled_values)]
    pooled_out, pooled_lse = nsa.compressed_attention(*over_pooled, *terms)
    over_detached = [x.detach() for x in (*over_pooled, pooled_out, pooled_lse)]
    plain_terms = (None, None, *terms[2:])
    plain_pooled = nsa.compressed_attention(*over_pooled, *plain_terms)
    plain_detached = [x.detach() for x in (*over_pooled, *plain_pooled)]
    gates = torch.rand(*q.shape[:3], 3, requires_grad=requires_grad)
    branches = [v.repeat_interleave(site.group, 1).detach().clone() for _ in range(3)]
    combined = (gates, *(x.requires_grad_(requires_grad) for x in branches))
    scales = nsa.selection_scale(
        *over_pooled[:2], pooled_lse.detach(), blocks, *terms, *tiling,
        site.init_blocks, site.local_window, "overlap",
    ).detach()  # fmt: skip
    chosen = (
        *over_pooled[:2], pooled_lse.detach().requires_grad_(requires_grad), blocks, *terms,
        *tiling, site.init_blocks, site.local_window, "interpolate",
    )  # fmt: skip
    scaled = (*site.terms()[:4], *site.mask, *tiling)
    window = (valid, rich.terms()[1], *plain_terms[2:5], site.local_window)
    windowed = [x.detach() for x in nsa.sliding_window_attention(q, k, v, *window)]
    of_branches = (*plain_terms[:7], site.local_window, *tiling, True)
    learned = [x.detach().requires_grad_(requires_grad) for x in (pooled, pooled_values)]
    gated = (gates, q, k, v, *learned, *(x.detach() for x in plain_pooled), blocks, None)
    remembered = (*gated[:4], None, None, branches[0], None, *gated[8:], *of_branches)
    given = (*gated[:8], None, branches[1], *of_branches)
    gated = (*gated, *of_branches)
    return {
        "selection_scale": chosen,
        "selection_scale_backward": (
            scales,
            *(x.detach() if isinstance(x, torch.Tensor) else x for x in chosen),
        ),
        "scaled_attention": (
            q,
            k,
            v,
            blocks,
            scales.detach().requires_grad_(requires_grad),
            *scaled,
        ),
        "scaled_attention_backward": (detached[3], detached[4], *detached, blocks, *scaled),
        "combine": combined,
        "combine_backward": tuple(x.detach() for x in (branches[0], *combined)),
        "channels": (q, k, valid, 8, dense_len),
        "compress": (k, valid, *sizes),
        "compress, spare": (k, valid, *sizes, 2),
        "compress_backward": (pooled.detach(), valid, *sizes, k.shape[2]),
        "select_blocks": (q, k, channels, *site.terms(), *select),
        "select_blocks, mean": (q, k, pooled, *site.terms(), "mean", *select[1:]),
        "select_blocks, terms": (
            q,
            k,
            channels,
            *rich.terms(),
            "channels",
            *rich.logits,
            *select[6:],
        ),
        "select_blocks, lse": (
            *(q, k, pooled, *site.terms(), "mean", *select[1:]),
            pooled_lse.detach(),
        ),
        "gated_attention": gated,
        "gated_attention, not kept": (*_detached(gated), False),
        "gated_attention, memory": remembered,
        "gated_attention, selected": given,
        "gated_attention_backward": _backward_arguments(branches[0], gated),
        "gated_attention_backward, memory": _backward_arguments(branches[0], remembered),
        "gated_attention_backward, selected": _backward_arguments(branches[0], given),
        "sliding_window_attention": (q, k, v, *window),
        "sliding_window_attention_backward": (windowed[0], None, *detached[:3], *windowed, *window),
        "compressed_attention": (*over_pooled, *plain_terms),
        "compressed_attention, terms": (*over_pooled, *terms),
        "compressed_attention_backward": (plain_detached[3], None, *plain_detached, *plain_terms),
        "compressed_attention_backward, terms": (*over_detached[3:], *over_detached, *terms),
        "selected_attention": (q, k, v, *attention),
        "selected_attention_backward": (detached[3], None, *detached, *attention),
        "selected_attention_backward, lse": (detached[3], detached[4], *detached, *attention),
    }


def _detached(forward: tuple[Any, ...]) -> tuple[Any, ...]:
    """All arguments but the last, without gradients."""
    return tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in forward[:-1])


def _backward_arguments(grad: torch.Tensor, forward: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments of the backward of nsa::gated_attention."""
    arguments = _detached(forward)
    saved = nsa.gated_attention(*arguments, True)[1:]
    return grad.detach(), *arguments[:10], *saved, *arguments[10:]


NAMES = list(calls(Site(), False, 0))


# Each value of each once, all combinations with ``-m slow``: gradients, padding and dense_len.
EVERYDAY = [(True, "none", 0), (True, "right", 10**6), (False, "right", 0)]
COMBINATIONS = [
    pytest.param(*case, marks=() if case in EVERYDAY else pytest.mark.slow)
    for case in itertools.product((False, True), ("none", "right"), (0, 10**6))
]


@pytest.mark.parametrize(("requires_grad", "padding", "dense_len"), COMBINATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str, requires_grad: bool, padding: str, dense_len: int) -> None:
    site = Site(q_len=70, dim=16, value_dim=8, padding=padding)
    arguments = calls(site, requires_grad, dense_len)[name]
    torch.library.opcheck(getattr(nsa, name.split(",")[0]), arguments)


@pytest.mark.parametrize("dense_len", [0, 10**6])
@pytest.mark.parametrize("terms", ["documents", "everything"])
@pytest.mark.parametrize("name", [name for name in NAMES if "attention" in name])
def test_opcheck_of_modified_attention(name: str, terms: str, dense_len: int) -> None:
    site = TERMS[terms].but(q_len=70, dim=16, value_dim=8)
    arguments = calls(site, True, dense_len)[name]
    torch.library.opcheck(getattr(nsa, name.split(",")[0]), arguments)


@pytest.mark.parametrize("name", NAMES)
def test_meta_tensors(name: str) -> None:
    arguments = calls(Site(), False, 0)[name]
    op = getattr(nsa, name.split(",")[0])
    on_meta = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in arguments]
    real, meta = op(*arguments), op(*on_meta)
    for a, b in zip(
        *((x,) if isinstance(x, torch.Tensor) else x for x in (real, meta)), strict=True
    ):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        assert b.is_meta


@pytest.mark.parametrize("offset", [0, 5])
def test_one_compilation_serves_lengths_and_offsets(offset: int) -> None:
    def whole(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, offset: int) -> torch.Tensor:
        channels = nsa.channels(q, k, None, 8, 64)
        budget = (5, 1, 20, 8, 4, 64)
        mask = (0.3, True, offset, None)
        absent, logits = (None,) * 6, (0.3, 0.0, *mask[1:])
        blocks = nsa.select_blocks(q, k, channels, *absent, "channels", *logits, 16, 16, *budget)
        return nsa.selected_attention(q, k, v, blocks, *absent, *logits, 16, 16, 64)[0]

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(whole, backend=counter, dynamic=True, fullgraph=True)
    for step, length in enumerate((100, 40, 300, 64, 65)):
        inputs = Site(q_len=length).tensors(torch.float32, requires_grad=True)
        start = offset + step * (offset > 0)
        out, expected = compiled(*inputs, start), whole(*inputs, start)
        torch.testing.assert_close(out, expected)
        got = torch.autograd.grad(out.square().sum(), inputs)
        torch.testing.assert_close(got, torch.autograd.grad(expected.square().sum(), inputs))
    assert counter.frame_count == 1


def flops(function: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_flops_count_what_is_read() -> None:
    q, k, v = torch.empty(1, 8, 1024, 64), *(torch.empty(1, 2, 1024, 64) for _ in range(2))
    channels = torch.zeros(1, 2, 16, dtype=torch.int32)
    blocks = torch.zeros(1, 2, 16 * 4, dtype=torch.int32)
    q, k, v, channels, blocks = (x.to("meta") for x in (q, k, v, channels, blocks))
    mask = (0.1, True, 0, None, 64, 64)
    dense = 2 * 8 * 1024 * 1024 * 128
    attend = (q, k, v, blocks, *PLAIN, 0.1, 0.0, *mask[1:])
    assert flops(lambda: nsa.selected_attention(*attend, 1024)) == dense
    assert flops(lambda: nsa.selected_attention(*attend, 0)) == dense // 4
    budget = (4, 1, 64, 32, 16)
    logits = (*(None,) * 6, "channels", 0.1, 0.0, *mask[1:], *budget)
    select = (q, k, channels, *logits)
    assert flops(lambda: nsa.select_blocks(*select, 0)) == 2 * 8 * 1024 * 1024 * 16
    assert flops(lambda: nsa.select_blocks(*select, dense_len=1024)) == 0
    pooled = nsa.compress(k, None, 32, 16)
    mean = (q, k, pooled, *logits[:6], "mean", *logits[7:], 0)
    assert flops(lambda: nsa.select_blocks(*mean)) == 2 * 8 * 1024 * 63 * 64


def test_flops_of_the_backward_are_two_and_a_half_forwards() -> None:
    site = Site()
    inputs = site.tensors(torch.float32, requires_grad=True)
    blocks = site.random_blocks()
    sizes = (*site.attention, 0)

    def forward() -> torch.Tensor:
        return nsa.selected_attention(*inputs, blocks, *sizes)[0]

    once = flops(forward)
    assert flops(lambda: forward().sum().backward()) == once * 7 // 2


def test_without_triton_the_cuda_path_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    launchers.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"\(attend\) are written in Triton, .* not installed"):
        launchers("attend")


@pytest.mark.parametrize("dense_len", [0, 10**6])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_inputs_of_different_dtypes_are_named(device: str, dense_len: int) -> None:
    site = Site(q_len=20)
    q, k, v = (x.to(device) for x in site.tensors(torch.float32))
    blocks = site.all_blocks().to(device)
    expected = "q in torch.float32, k in torch.bfloat16, v in torch.float32"
    with pytest.raises(ValueError, match=f"one floating dtype, got {expected}"):
        nsa.selected_attention(q, k.bfloat16(), v, blocks, *site.attention, dense_len)
