"""The Triton kernels on the GPU: every size class against float64, and inside a CUDA graph."""

from __future__ import annotations

import pytest
import torch

from tests.kernels import triton_cases
from tests.kernels.triton_cases import Case, inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

HALVES = [torch.bfloat16, torch.float16]
COMPRESSION = {"compress_block": 32, "compress_stride": 16}

GROUPS = {
    f"group {g}": Case(
        heads=2 * g, kv_heads=2, q_len=507, kv_len=507, dim=64, value_dim=64, query_tile=64,
        block=64, count=4, local_window=100, scale=0.2, channels=16, **COMPRESSION,
    )
    for g in (1, 2, 3, 4, 7, 8, 16)
}  # fmt: skip
DIMS = {
    f"dims {d} and {dv}": Case(
        heads=4, kv_heads=2, q_len=300, kv_len=333, dim=d, value_dim=dv, query_tile=64, block=64,
        count=4, local_window=70, offset=33, scale=1.5 * d**-0.5, channels=max(16, d // 4),
        **COMPRESSION,
    )
    for d, dv in (
        (32, 32), (80, 80), (96, 96), (128, 128), (192, 192), (256, 256), (64, 128), (192, 128),
        (80, 48),
    )
}  # fmt: skip
TILES = {
    f"tile {r}, block {b}": Case(
        heads=4, kv_heads=2, q_len=450, kv_len=450, dim=128, value_dim=128, query_tile=r, block=b,
        count=3 + 320 // b, local_window=60, scale=0.15, channels=32, **COMPRESSION,
    )
    for r, b in (
        (1, 64), (2, 32), (8, 64), (16, 64), (32, 16), (32, 64), (64, 32), (128, 64), (128, 16),
        (128, 128), (256, 64), (64, 256),
    )
}  # fmt: skip
_MASKED = Case(
    heads=4, kv_heads=2, q_len=333, kv_len=399, dim=128, value_dim=128, query_tile=64, block=64,
    count=6, local_window=90, scale=0.15, channels=32, batch=2, offset=66, **COMPRESSION,
)  # fmt: skip
MASKS = {
    "padding": _MASKED._replace(padded=True),
    "window": _MASKED._replace(window=130),
    "window and padding": _MASKED._replace(window=130, padded=True),
    "not causal": _MASKED._replace(causal=False),
    "not causal, window, padding": _MASKED._replace(causal=False, window=130, padded=True),
    "token granular, padding": _MASKED._replace(query_tile=1, padded=True),
    "tile 16, window, padding": _MASKED._replace(query_tile=16, window=130, padded=True),
    "negative scale": _MASKED._replace(scale=-0.15),
    "negative offset": _MASKED._replace(offset=-20),
    "one query": _MASKED._replace(q_len=1, offset=398),
    "31 keys": _MASKED._replace(q_len=31, kv_len=31, offset=0),
    "111 keys, block 24": _MASKED._replace(q_len=111, kv_len=111, offset=0, block=24, count=12,
    compress_stride=8), "2000 keys": _MASKED._replace(q_len=2000, kv_len=2000, offset=0, count=9,
    batch=1),
}  # fmt: skip
CASES = {**GROUPS, **DIMS, **TILES, **MASKS}
# Many blocks and few free slots: a kernel that forgets a term chooses worse blocks.
_FEW = _MASKED._replace(
    q_len=200, kv_len=1399, offset=1199, query_tile=32, block=32, count=6, local_window=20,
    scale=0.3,
)  # fmt: skip
TERMS = {
    "chunks": _FEW._replace(ranges="chunks"),
    "prefix, padding": _FEW._replace(ranges="prefix", causal=False, padded=True),
    "random ranges, window, padding": _FEW._replace(ranges="random", window=130, padded=True),
    "random ranges, token granular": _FEW._replace(ranges="random", query_tile=1),
    "documents": _FEW._replace(segments="documents"),
    "mixed segments, padding": _FEW._replace(segments="mixed", causal=False, padded=True),
    "alibi": _FEW._replace(slopes=True),
    "alibi, positions, padding": _FEW._replace(slopes=True, positions=True, padded=True),
    "alibi, block 24": _FEW._replace(slopes=True, block=24, compress_stride=8),
    "alibi, 2000 keys": MASKS["2000 keys"]._replace(slopes=True, scale=0.3),
    "alibi, group 7, dim 80": _FEW._replace(slopes=True, heads=14, dim=80),
    "cap": _FEW._replace(softcap=1.0),
    "cap, negative scale": _FEW._replace(softcap=1.0, scale=-0.4),
    "cap, alibi": _FEW._replace(softcap=1.0, slopes=True),
    "everything": _FEW._replace(
        ranges="random", segments="mixed", slopes=True, positions=True, softcap=1.0, padded=True,
    ),
    "everything, tile 16": _FEW._replace(
        ranges="random", segments="documents", slopes=True, softcap=1.0, query_tile=16, window=130,
    ),
}  # fmt: skip
# Further ways in which the terms meet the sizes of the attention kernels.
ATTENDED = {
    "chunks, group 1, tile 128": _MASKED._replace(ranges="chunks", heads=2, query_tile=128),
    "prefix, not causal": _MASKED._replace(ranges="prefix", causal=False),
    "documents, token granular": _MASKED._replace(segments="documents", query_tile=1),
    "documents, block 16": _MASKED._replace(segments="documents", block=16, count=20),
    "alibi, dim 64, group 4": _MASKED._replace(
        slopes=True, dim=64, value_dim=64, heads=8, scale=0.2
    ),
    "cap, dim 256, negative scale": _MASKED._replace(
        softcap=1.5, dim=256, value_dim=256, scale=-0.1
    ),
    "cap, window, group 8": _MASKED._replace(softcap=2.0, window=130, heads=16),
    "everything, block 24": _MASKED._replace(
        ranges="random", segments="mixed", slopes=True, positions=True, softcap=2.0, block=24,
        count=12, query_tile=32,
    ),
}  # fmt: skip
# Token-granular lists, whose blocks gather their readers.
_TOKENS = _MASKED._replace(query_tile=1, count=5)
GATHERED = {
    "group 1, 2000 keys": MASKS["2000 keys"]._replace(heads=2, query_tile=1, count=16),
    "group 4": _TOKENS._replace(heads=8),
    "group 7, dims 80": _TOKENS._replace(heads=14, dim=80, value_dim=80),
    "group 16, padding": _TOKENS._replace(heads=32, padded=True),
    "group 16, 2000 keys": MASKS["2000 keys"]._replace(heads=32, query_tile=1, count=16),
    "window and padding": _TOKENS._replace(window=130, padded=True),
    "not causal, dims 192 and 128": _TOKENS._replace(causal=False, dim=192),
    "tile 4, block 16": _TOKENS._replace(query_tile=4, block=16, count=12),
    "block 24": _TOKENS._replace(block=24, count=9),
    "negative scale and offset": _TOKENS._replace(scale=-0.15, offset=-20),
}  # fmt: skip


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("scratch", [1 << 17, 1 << 29])
@pytest.mark.parametrize("name", GATHERED)
def test_gathered_attention(name: str, scratch: int, dtype: torch.dtype) -> None:
    triton_cases.gathered(GATHERED[name], dtype, "cuda", scratch)


# Token-granular lists of large groups, a program a query.
LARGE_GROUPS = {
    "group 16, 2000 keys": GATHERED["group 16, 2000 keys"],
    "group 16, padding": GATHERED["group 16, padding"],
    "group 12, dims 80": _TOKENS._replace(heads=24, dim=80, value_dim=80),
    "group 16, window and padding": _TOKENS._replace(heads=32, window=130, padded=True),
    "not causal, dim 64": _TOKENS._replace(heads=32, causal=False, dim=64, value_dim=64),
    "tile 4": _TOKENS._replace(heads=8, query_tile=4),
    "block 128": _TOKENS._replace(heads=32, block=128),
    "negative scale and offset": _TOKENS._replace(heads=32, scale=-0.15, offset=-20),
}


# The three branches with one backward, by every kernel that serves the selected one.
GATED = {
    "tile 64": MASKS["2000 keys"],
    "tile 64, group 1, padding": MASKS["padding"]._replace(heads=2),
    "group 4": GATHERED["group 4"],
    "group 4, 2000 keys": MASKS["2000 keys"]._replace(heads=8, query_tile=1, count=16),
    "group 16, 2000 keys": GATHERED["group 16, 2000 keys"],
    "not causal, dims 192 and 128": GATHERED["not causal, dims 192 and 128"],
    "negative scale and offset": GATHERED["negative scale and offset"],
}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", GATED)
def test_gated_backward(name: str, dtype: torch.dtype) -> None:
    triton_cases.gated(GATED[name], dtype, "cuda")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", LARGE_GROUPS)
def test_attention_of_large_groups(name: str, dtype: torch.dtype) -> None:
    triton_cases.few(LARGE_GROUPS[name], dtype, "cuda")


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("name", ["group 7", "dims 80 and 48", "padding", "one query"])
def test_gated_sum(name: str, dtype: torch.dtype) -> None:
    triton_cases.combine(CASES[name], dtype, "cuda")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", {**CASES, **TERMS, **ATTENDED})
def test_attention(name: str, dtype: torch.dtype) -> None:
    triton_cases.attend({**CASES, **TERMS, **ATTENDED}[name], dtype, "cuda")


_COMPLETE = _MASKED._replace(query_tile=1, count=5, local_window=64)
COMPRESSED = {
    "group 1": _COMPLETE._replace(heads=2),
    "group 7": _COMPLETE._replace(heads=14),
    "group 16": _COMPLETE._replace(heads=32, dim=64, value_dim=64, scale=0.2),
    "dims 192 and 128": _COMPLETE._replace(dim=192, scale=0.1),
    "padding": _COMPLETE._replace(padded=True),
    "not causal, padding": _COMPLETE._replace(causal=False, padded=True),
    "negative scale": _COMPLETE._replace(scale=-0.15),
    "2000 keys": _COMPLETE._replace(q_len=2000, kv_len=2000, offset=0, batch=1),
}  # fmt: skip
COMPRESSED_RANGES = {
    "chunks": _COMPLETE._replace(ranges="chunks", compress_block=8, compress_stride=4),
    "prefix, padding": _COMPLETE._replace(ranges="prefix", causal=False, padded=True),
    "random ranges": _COMPLETE._replace(ranges="random", kv_len=1399, offset=1066),
}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", {**COMPRESSED, **COMPRESSED_RANGES})
def test_compressed_attention(name: str, dtype: torch.dtype) -> None:
    triton_cases.compressed({**COMPRESSED, **COMPRESSED_RANGES}[name], dtype, "cuda")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", COMPRESSED)
def test_selection_with_its_sums(name: str, dtype: torch.dtype) -> None:
    triton_cases.select(COMPRESSED[name], dtype, "mean", "cuda", with_lse=True)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("scorer", ["channels", "mean"])
@pytest.mark.parametrize("name", CASES)
def test_selection(name: str, scorer: str, dtype: torch.dtype) -> None:
    triton_cases.select(CASES[name], dtype, scorer, "cuda")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", [*TILES, "padding", "2000 keys", "dims 80 and 48", "window"])
def test_selection_in_eight_bits(name: str, dtype: torch.dtype) -> None:
    triton_cases.select_in_eight_bits(CASES[name], dtype, "cuda")


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("scorer", ["channels", "mean"])
@pytest.mark.parametrize("name", TERMS)
def test_selection_with_terms(name: str, scorer: str, dtype: torch.dtype) -> None:
    triton_cases.select(TERMS[name], dtype, scorer, "cuda")


@pytest.mark.parametrize("name", ["group 3", "dims 80 and 48", "token granular, padding"])
def test_float32(name: str) -> None:
    case = CASES[name]
    triton_cases.attend(case, torch.float32, "cuda")
    for scorer in ("channels", "mean"):
        triton_cases.select(case, torch.float32, scorer, "cuda")
    triton_cases.channels(case, torch.float32, "cuda")
    triton_cases.compress(case, torch.float32, "cuda")


@pytest.mark.parametrize("name", ["chunks", "documents", "alibi", "cap", "everything"])
def test_modified_attention_in_float32(name: str) -> None:
    triton_cases.attend(TERMS[name], torch.float32, "cuda")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", [*DIMS, *MASKS])
def test_statistics(name: str, dtype: torch.dtype) -> None:
    triton_cases.channels(CASES[name], dtype, "cuda")
    triton_cases.compress(CASES[name], dtype, "cuda")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "name", ["group 4", "tile 16, block 64", "padding", "token granular, padding", "everything"]
)
def test_readers_of_a_block_in_several_pieces(name: str, dtype: torch.dtype) -> None:
    triton_cases.attend({**CASES, **TERMS}[name], dtype, "cuda", PIECE_ROWS=256)


@pytest.mark.parametrize("scorer", ["channels", "mean"])
def test_rounds_of_tiles(scorer: str) -> None:
    triton_cases.select(CASES["2000 keys"], torch.bfloat16, scorer, "cuda", SCRATCH_BYTES=10000)


@pytest.mark.parametrize("scorer", ["channels", "mean"])
def test_runs_inside_a_cuda_graph(scorer: str) -> None:
    """No host synchronisation, no allocation that depends on data: replayed on other inputs."""
    import nsa_compile.kernels.library  # noqa: F401

    case = CASES["2000 keys"]
    q, k, v, _ = (x if x is None else x.cuda() for x in inputs(case, torch.bfloat16))
    ops = torch.ops.nsa

    def path() -> tuple[torch.Tensor, ...]:
        if scorer == "channels":
            summary = ops.channels(q, k, None, case.channels, 0)
        else:
            summary = ops.compress(k, None, case.compress_block, case.compress_stride)
        blocks = ops.select_blocks(
            q, k, summary, *case.terms(None), scorer, *case.logits, case.query_tile, case.block,
            case.count, 1, case.local_window, case.compress_block, case.compress_stride, 0,
        )  # fmt: skip
        site = (blocks, *case.terms(None), *case.logits, case.query_tile, case.block, 0)
        out, lse = ops.selected_attention(q, k, v, *site)
        grads = ops.selected_attention_backward(out, None, q, k, v, out, lse, *site)
        return blocks, out, lse, *grads

    path()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = path()
    for x, fresh in zip((q, k, v), inputs(case, torch.bfloat16, seed=9), strict=False):
        x.copy_(fresh)
    graph.replay()
    for got, expected in zip(captured, path(), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("scorer", ["channels", "mean"])
def test_selection_with_terms_runs_inside_a_cuda_graph(scorer: str) -> None:
    import nsa_compile.kernels.library  # noqa: F401

    case = TERMS["everything"]
    q, k, _, valid = (x.cuda() for x in inputs(case, torch.bfloat16))
    terms = [x if x is None else x.cuda() for x in case.terms(valid)]
    ops = torch.ops.nsa

    def path() -> tuple[torch.Tensor, ...]:
        summary = ops.channels(q, k, valid, case.channels, 0)
        if scorer == "mean":
            summary = ops.compress(k, valid, case.compress_block, case.compress_stride)
        sizes = (case.query_tile, case.block)
        candidates = ops.select_blocks(
            q, k, summary, *terms, scorer, *case.logits, *sizes, case.count, 1, case.local_window,
            case.compress_block, case.compress_stride, 0,
        )  # fmt: skip
        kept = ops.refine_blocks(
            q, k, candidates, *terms, *case.logits, *sizes, case.count - 2, 1, case.local_window, 0
        )
        return candidates, kept

    path()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = path()
    for x, fresh in zip((q, k), inputs(case, torch.bfloat16, seed=9), strict=False):
        x.copy_(fresh)
    graph.replay()
    for got, expected in zip(captured, path(), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("name", ["documents", "everything", "prefix, not causal"])
def test_short_modified_attention_is_exact_and_runs_inside_a_cuda_graph(name: str) -> None:
    """Up to dense_len keys every block is read, whatever block_indices say."""
    import nsa_compile.kernels.library  # noqa: F401
    from nsa_compile.kernels.attend import reference

    case = {**TERMS, **ATTENDED}[name]
    *qkv, valid = inputs(case, torch.bfloat16)
    terms = [x if x is None else x.cuda() for x in case.terms(valid)]
    site = (*terms, *case.logits, case.query_tile, case.block)
    q, k, v = (x.cuda() for x in qkv)
    tiles = -(-case.q_len // case.query_tile)
    nothing = torch.full((case.batch, case.kv_heads, tiles, 2), -1, dtype=torch.int32).cuda()

    def path() -> tuple[torch.Tensor, ...]:
        out, lse = torch.ops.nsa.selected_attention(q, k, v, nothing, *site, 10**6)
        backward = torch.ops.nsa.selected_attention_backward
        return out, *backward(out, None, q, k, v, out, lse, nothing, *site, 10**6)

    once = path()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = path()
    graph.replay()
    everything = torch.arange(-(-case.kv_len // case.block), dtype=torch.int32).cuda()
    everything = everything.expand(case.batch, case.kv_heads, tiles, -1)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    out, _ = reference.selected_attention(*exact, everything, *site)
    expected = (out, *torch.autograd.grad(out, exact, once[0].double()))
    for got, again, true in zip(once, captured, expected, strict=True):
        assert torch.equal(got, again)
        assert triton_cases.relative_error(got, true.cpu()) < 1e-2


@pytest.mark.parametrize("query_tile", [1, 64])
@pytest.mark.parametrize("group", [1, 4, 16])
def test_gated_path(group: int, query_tile: int) -> None:
    """A budget of every block: the choice cannot differ from that of another precision."""
    from nsa_compile import functional

    config = {"merge": "gate", "query_tile": query_tile, "num_selected": 18, "window": 100}
    case = Case(heads=2 * group, kv_heads=2, q_len=1111, kv_len=1111, dim=64, value_dim=64)
    generator = torch.Generator().manual_seed(5)
    gates = torch.rand(1, case.heads, case.q_len, 3, generator=generator).bfloat16()
    upstream = torch.randn(1, case.heads, case.q_len, 64, generator=generator).bfloat16()
    results = []
    for device, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float32)):
        q, k, v, g = (
            x.to(device, dtype).requires_grad_() for x in (*inputs(case, torch.bfloat16)[:3], gates)
        )
        out = functional.nsa_attention(q, k, v, gates=g, config=config)
        results.append((out, *torch.autograd.grad(out, (q, k, v, g), upstream.to(device, dtype))))
    for name, got, true in zip(("out", "dq", "dk", "dv", "dgates"), *results, strict=True):
        assert triton_cases.relative_error(got, true.double()) < 1.5e-2, name
