"""The switches of the gated selection on the GPU: small blocks, interpolation, scales."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from tests.kernels import triton_cases
from tests.kernels.triton_cases import Case, inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

HALVES = [torch.bfloat16, torch.float16]
_SMALL = Case(
    heads=4, kv_heads=2, q_len=333, kv_len=399, dim=64, value_dim=64, query_tile=1, block=4,
    count=9, local_window=5, offset=66, batch=2, scale=0.3, channels=16,
)  # fmt: skip
SMALL = {
    **{
        f"block {block}, tile {tile}": _SMALL._replace(
            block=block, query_tile=tile, count=8 + 2 * tile // block, local_window=1
        )
        for block, tile in itertools.product((8, 4, 2), (1, 16, 64))
    },
    "block 2, group 16, padding": _SMALL._replace(block=2, heads=32, padded=True),
    "block 4, dim 128, not causal": _SMALL._replace(dim=128, value_dim=128, causal=False),
    "block 2, 2000 keys": _SMALL._replace(block=2, q_len=2000, kv_len=2000, offset=0, batch=1),
    "block 8, group 4, 2000 keys": _SMALL._replace(
        block=8, heads=8, q_len=2000, kv_len=2000, offset=0, batch=1
    ),
    "block 2, stride 8": _SMALL._replace(block=2, compress_block=16, compress_stride=8),
}
SCALED = {
    "64/4 heads": Case(
        heads=32, kv_heads=2, q_len=333, kv_len=399, dim=128, value_dim=128, query_tile=1,
        block=64, count=4, offset=66, scale=0.1,
    ),
    "tile 64, group 4, padding": Case(
        heads=8, kv_heads=2, q_len=333, kv_len=399, dim=128, value_dim=128, query_tile=64,
        block=64, count=4, offset=66, scale=0.1, padded=True, batch=2,
    ),
    "block 256, dims 192 and 128": Case(
        heads=4, kv_heads=2, q_len=300, kv_len=999, dim=192, value_dim=128, query_tile=16,
        block=256, count=3, offset=600, scale=0.1,
    ),
    "window, not causal, ranges": Case(
        heads=4, kv_heads=2, q_len=300, kv_len=300, dim=80, value_dim=80, query_tile=4, block=16,
        count=6, causal=False, window=90, ranges="random", scale=0.1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", SMALL)
def test_attention(name: str, dtype: torch.dtype) -> None:
    triton_cases.attend(SMALL[name], dtype, "cuda")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("importance", ["overlap", "interpolate"])
@pytest.mark.parametrize("name", SMALL)
def test_selection(name: str, importance: str, dtype: torch.dtype) -> None:
    case = SMALL[name]._replace(importance=importance)
    triton_cases.select(case, dtype, "mean", "cuda")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", [*SMALL, *SCALED])
def test_gradient_of_scales(name: str, dtype: torch.dtype) -> None:
    triton_cases.scale_gradient({**SMALL, **SCALED}[name], dtype, "cuda")


SWITCHES = [
    {"share_selection": False}, {"importance": "interpolate", "select_block": 8},
    {"sel_scale": True}, {"share_selection": False, "sel_scale": True, "select_block": 4},
    {"num_selected": 0},
]  # fmt: skip


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_whole_path(switches: dict[str, Any], causal: bool) -> None:
    """A budget of every block: the choice cannot differ from that of another precision."""
    from nsa_compile import functional

    sizes = {"compress_block": 8, "compress_stride": 4, "select_block": 16, "window": 40}
    config = {"merge": "gate", "num_selected": 128, **sizes, **switches}
    case = Case(heads=8, kv_heads=2, q_len=501, kv_len=501, dim=64, value_dim=64)
    generator = torch.Generator().manual_seed(5)
    gates = torch.rand(1, 8, 501, 3, generator=generator).bfloat16()
    upstream = torch.randn(1, 8, 501, 64, generator=generator).bfloat16()
    results = []
    for device, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float32)):
        q, k, v, g = (
            x.to(device, dtype).requires_grad_() for x in (*inputs(case, torch.bfloat16)[:3], gates)
        )
        out = functional.nsa_attention(q, k, v, gates=g, config=config, causal=causal)
        grads = torch.autograd.grad(out, (q, k, v, g), upstream.to(device, dtype))
        again = torch.autograd.grad(
            functional.nsa_attention(q, k, v, gates=g, config=config, causal=causal), (q, k, v, g),
            upstream.to(device, dtype),
        )  # fmt: skip
        assert all(torch.equal(x, y) for x, y in zip(grads, again, strict=True)), "two runs differ"
        results.append((out, *grads))
    for name, got, true in zip(("out", "dq", "dk", "dv", "dgates"), *results, strict=True):
        assert triton_cases.relative_error(got, true.double()) < 1.5e-2, name


def test_scaled_path_runs_inside_a_cuda_graph() -> None:
    from nsa_compile import functional

    config = {
        "merge": "gate", "num_selected": 6, "compress_block": 8, "compress_stride": 4,
        "select_block": 8, "window": 40, "sel_scale": True, "importance": "interpolate",
    }  # fmt: skip
    case = Case(heads=4, kv_heads=2, q_len=300, kv_len=300, dim=64, value_dim=64)
    tensors = [x.cuda().requires_grad_() for x in inputs(case, torch.bfloat16)[:3]]
    gates = torch.rand(1, 4, 300, 3, device="cuda", dtype=torch.bfloat16)

    def step() -> tuple[torch.Tensor, ...]:
        out = functional.nsa_attention(*tensors, gates=gates, config=config)
        return out, *torch.autograd.grad(out.float().square().sum(), tensors)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        once = step()
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    for x, y in zip(once, captured, strict=True):
        assert torch.equal(x, y)
