"""The paper's three branches and their gated sum, against float64 references."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nsa_compile import functional
from nsa_compile.kernels.attend import reference as attend
from nsa_compile.kernels.compress import reference as compress
from nsa_compile.kernels.compressed import reference as compressed
from nsa_compile.kernels.select import reference as select
from nsa_compile.passes.config import NSAConfig
from tests.kernels.inputs import MASKS, TERMS, Site

SMALL = Site(batch=1, q_len=70, block=16, query_tile=1, num_selected=5)
SITES = {
    **{f"G={group}": SMALL.but(group=group) for group in range(1, 9)},
    **{f"T={length}": SMALL.but(q_len=length) for length in (1, 7, 31, 130)},
    "tile 64": SMALL.but(query_tile=64, q_len=200, num_selected=8),
    "odd offset": SMALL.but(q_len=37, kv_len=100, offset=63),
    "queries past the keys": SMALL.but(kv_len=50),
    "not causal": SMALL.but(causal=False),
    "left padding": SMALL.but(padding="left", batch=2),
    "chunks": SMALL.but(ranges="chunks"),
    "D != Dv": SMALL.but(dim=16, value_dim=24),
}


def config(site: Site, **changes: Any) -> dict[str, Any]:
    return {
        "merge": "gate", "query_tile": site.query_tile, "select_block": site.block,
        "num_selected": site.num_selected, "init_blocks": site.init_blocks,
        "window": site.local_window, "compress_block": site.compress_block,
        "compress_stride": site.compress_stride, **changes,
    }  # fmt: skip


def expected(site: Site, q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
    """The three branches with explicit matrices, composed of the specifications."""
    valid, ranges, *_ = site.terms()
    sizes, nothing = (site.compress_block, site.compress_stride), (None,) * 4
    k_cmp, v_cmp = (compress.compress(x, valid, *sizes) for x in (k, v))
    mask = (site.scale, site.causal, site.offset)
    o_cmp, _ = compressed.compressed_attention(q, k_cmp, v_cmp, valid, ranges, *mask, *sizes)
    logits = (site.scale, 0.0, site.causal, site.offset)
    tiling = (site.query_tile, site.block)
    with torch.no_grad():
        blocks = select.select_blocks(
            q, k, k_cmp, valid, ranges, *nothing, "mean", *logits, None, *tiling,
            site.num_selected, site.init_blocks, site.block + 1, *sizes,
        )  # fmt: skip
    terms = (valid, ranges, *nothing)
    o_slc, _ = attend.selected_attention(q, k, v, blocks, *terms, *logits, None, *tiling)
    everything = site.all_blocks()
    o_win, _ = attend.selected_attention(
        q, k, v, everything, *terms, *logits, site.local_window, *tiling
    )
    branches = torch.stack((o_cmp, o_slc, o_win), dim=-1)
    return (branches * gates[..., None, :]).sum(-1)


@pytest.mark.parametrize("name", SITES)
def test_gate_path_equals_its_references(name: str) -> None:
    site = SITES[name]
    inputs = [x.requires_grad_() for x in site.tensors()]
    generator = torch.Generator().manual_seed(3)
    shape = (*inputs[0].shape[:3], 3)
    gates = torch.rand(shape, generator=generator, dtype=torch.float64).requires_grad_()
    inputs.append(gates)
    valid, ranges, *_ = site.terms()
    out = functional.nsa_attention(
        *inputs[:3], gates=gates, config=config(site), causal=site.causal, offset=site.offset,
        valid=valid, ranges=ranges, scale=site.scale,
    )  # fmt: skip
    exact = expected(site, *inputs)
    torch.testing.assert_close(out, exact)
    weights = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    got = torch.autograd.grad((out * weights).sum(), inputs)
    for name, grad, true in zip(
        ("q", "k", "v", "gates"), got, torch.autograd.grad((exact * weights).sum(), inputs),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(grad, true, msg=lambda text, name=name: f"d{name}: {text}")


def test_dense_len_has_no_part_in_it() -> None:
    q, k, v = SMALL.tensors(torch.float32)
    gates = torch.rand(*q.shape[:3], 3)
    outs = [
        functional.nsa_attention(q, k, v, gates=gates, config=config(SMALL, dense_len=dense_len))
        for dense_len in (0, 10**6)
    ]
    assert torch.equal(*outs)


def test_branches_are_kept_where_a_gradient_follows_alone() -> None:
    q, k, v = SMALL.tensors(torch.float32)
    gates = torch.rand(*q.shape[:3], 3)
    kept = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            results = func(*args, **kwargs or {})
            if func is torch.ops.nsa.gated_attention.default:
                kept.append([x.numel() > 0 for x in results[1:]])
            return results

    with Calls():
        outs = [
            functional.nsa_attention(q, k, v, gates=gates.requires_grad_(own), config=config(SMALL))
            for own in (False, True)
        ]
        with torch.no_grad():
            outs.append(functional.nsa_attention(q, k, v, gates=gates, config=config(SMALL)))
    assert kept == [[False] * 4, [True] * 4, [False] * 4]
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_what_is_not_kept_has_no_gradient() -> None:
    q, k, v = SMALL.tensors(torch.float32)
    gates = torch.rand(*q.shape[:3], 3).requires_grad_()
    branch = torch.zeros_like(q)
    site = (None, None, 1.0, True, 0, 32, 16, 20, 1, 16)
    tensors = (gates, q, k, v, None, None, branch, None, None, branch)
    out = torch.ops.nsa.gated_attention(*tensors, *site, False)[0]
    with pytest.raises(RuntimeError, match="pass keep=True"):
        out.sum().backward()


def test_nothing_after_a_query_reaches_it() -> None:
    """Choice included: other keys, values and gates from position 40 on change nothing before."""
    q, k, v = SMALL.tensors(torch.float32)
    other = SMALL.tensors(torch.float32, seed=1)
    gates = torch.rand(*q.shape[:3], 3)
    changed = [
        torch.cat((x[:, :, :40], y[:, :, 40:]), 2) for x, y in zip((q, k, v), other, strict=True)
    ]
    first, second = (
        functional.nsa_attention(*x, gates=gates, config=config(SMALL))
        for x in ((q, k, v), changed)
    )
    assert torch.equal(first[:, :, :40], second[:, :, :40])
    assert not torch.equal(first[:, :, 40:], second[:, :, 40:])


def test_channels_may_score_for_the_gates() -> None:
    q, k, v = SMALL.tensors(torch.float32)
    gates = torch.zeros(*q.shape[:3], 3)
    gates[..., 1] = 1
    sizes = config(SMALL, scorer="channels", num_selected=10)
    out = functional.nsa_attention(q, k, v, gates=gates, config=sizes)
    torch.testing.assert_close(
        out,
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
    )


def test_one_softmax_over_single_queries() -> None:
    """merge="softmax" at query_tile=1, a budget of everything: the dense layer."""
    q, k, v = SMALL.tensors(torch.float32)
    sizes = {"dense_len": 0, "query_tile": 1, "select_block": 16, "window": 20, "num_selected": 9}
    out = functional.nsa_attention(q, k, v, config=sizes)
    torch.testing.assert_close(
        out,
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
    )


WINDOWS = {
    **{f"window {w}": Site(batch=1, window=w) for w in (1, 5, 63, 64, 65, 100, 10**6)},
    **{name: site.but(window=37) for name, site in MASKS.items()},
    "T=1": Site(q_len=1, window=9),
    "G=1": Site(group=1, window=70),
    **{f"G=4, offset {at}": Site(group=4, window=70, offset=at, batch=1) for at in (0, 33, -40)},
    "G=4, not causal": Site(group=4, window=33, causal=False, batch=1),
    "T=300": Site(q_len=300, window=130, batch=1),
    "ranges": TERMS["chunks"].but(window=20),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_sliding_window_equals_reference(name: str) -> None:
    site = WINDOWS[name]
    inputs = [x.requires_grad_() for x in site.tensors()]
    valid, ranges, *_ = site.terms()
    out, lse = functional.sliding_window_attention(
        *inputs, window=site.window, causal=site.causal, offset=site.offset, valid=valid,
        scale=site.scale, ranges=ranges, return_lse=True,
    )  # fmt: skip
    exact, exact_lse = attend.selected_attention(*inputs, site.all_blocks(), *site.attention)
    torch.testing.assert_close(out, exact)
    torch.testing.assert_close(lse, exact_lse)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).double()
    got = torch.autograd.grad((out * weights).sum(), inputs)
    torch.testing.assert_close(got, torch.autograd.grad((exact * weights).sum(), inputs))


def test_one_compilation_serves_many_lengths() -> None:
    """The whole gate path under torch.compile, dynamic shapes, no graph break."""
    compilations = []

    def count(graph: Any, example: Any) -> Any:
        compilations.append(graph)
        return graph.forward

    options = NSAConfig(**config(SMALL))

    def path(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
        return functional.nsa_attention(q, k, v, gates=gates, config=options)

    compiled = torch.compile(path, backend=count, dynamic=True, fullgraph=True)
    for length in (130, 200, 333):
        q, k, v = SMALL.but(q_len=length).tensors(torch.float32)
        gates = torch.rand(*q.shape[:3], 3)
        torch.testing.assert_close(compiled(q, k, v, gates), path(q, k, v, gates))
    assert len(compilations) == 1
