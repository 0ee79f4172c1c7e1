"""One million tokens on one GPU: offsets beyond 2^31 elements, memory linear in the length."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nsa_compile.functional import compress, nsa_attention, select_blocks, selected_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LENGTH, HEADS, KV_HEADS, DIM = 1 << 20, 32, 8, 128
TILE, BLOCK, COUNT, WINDOW = 64, 64, 16, 512
SCALE = DIM**-0.5
# A tile near the start, two inside, the last: the last head's rows end beyond 2^31 elements.
TILES = (100, 4_000, 9_001, LENGTH // TILE - 1)


@pytest.fixture(scope="module")
def qkv() -> tuple[Tensor, Tensor, Tensor]:
    if torch.cuda.mem_get_info()[1] < 60 << 30:
        pytest.skip("needs 60 GB of GPU memory")
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(1, LENGTH, heads, DIM, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    return q, k, v


def test_a_million_tokens(qkv: tuple[Tensor, Tensor, Tensor]):
    q, k, v = qkv
    config = {"scorer": "mean", "num_selected": COUNT, "window": WINDOW}
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = nsa_attention(q, k, v, config=config)
    # The output, and no more scratch memory than that again.
    assert torch.cuda.max_memory_allocated() - before < 2 * q.numel() * q.element_size()
    blocks = select_blocks(q, k, scorer="mean", num_selected=COUNT, local_window=WINDOW)
    assert torch.equal(out, selected_attention(q, k, v, blocks, block=BLOCK, query_tile=TILE))
    for tile in TILES:
        for head in (0, KV_HEADS - 1):
            scores = _scores(q, k, head, tile)
            chosen = blocks[0, head, tile].long()
            assert (chosen >= 0).all()
            left = scores.clone()
            left[chosen] = -torch.inf
            # bf16 pooled keys decide close calls otherwise than float64.
            assert scores[chosen].min() >= 0.98 * left.max()
            expected = _attended(q, k, v, head, tile, chosen)
            rows = slice(tile * TILE, (tile + 1) * TILE)
            group = slice(head * HEADS // KV_HEADS, (head + 1) * HEADS // KV_HEADS)
            found = out[0, group, rows].double()
            assert (found - expected).norm() / expected.norm() < 5e-3


def _scores(q: Tensor, k: Tensor, head: int, tile: int) -> Tensor:
    """[Ns] float64: block scores of scorer "mean" (DESIGN: overlap in units of the stride)."""
    pooled = compress(k[:, head : head + 1], block=32, stride=16)[0, 0].double()
    rows = _rows(q, head, tile).flatten(0, 1)
    position = torch.arange(tile * TILE, (tile + 1) * TILE, device="cuda")
    last = torch.arange(len(pooled), device="cuda") * 16 + 31
    hidden = (last > position[:, None]).repeat(HEADS // KV_HEADS, 1)
    shares = (SCALE * rows @ pooled.T).masked_fill(hidden, -torch.inf).softmax(dim=-1).sum(dim=0)
    scores = torch.zeros(LENGTH // BLOCK, dtype=torch.float64, device="cuda")
    first = torch.arange(len(pooled), device="cuda") * 16
    for part in (0, 16):
        scores.index_add_(0, (first + part) // BLOCK, shares)
    near = (tile * TILE - WINDOW + 1) // BLOCK
    scores[max(0, near) : tile + 1] = torch.inf
    scores[0] = torch.inf
    scores[tile + 1 :] = -torch.inf
    return scores


def _attended(q: Tensor, k: Tensor, v: Tensor, head: int, tile: int, chosen: Tensor) -> Tensor:
    """[G, R, D] float64: attention of the tile's queries over the chosen blocks."""
    keys = (chosen[:, None] * BLOCK + torch.arange(BLOCK, device="cuda")).flatten()
    position = torch.arange(tile * TILE, (tile + 1) * TILE, device="cuda")
    logits = SCALE * _rows(q, head, tile) @ k[0, head, keys].double().T
    weights = logits.masked_fill(keys > position[:, None], -torch.inf).softmax(dim=-1)
    return weights @ v[0, head, keys].double()


def _rows(q: Tensor, head: int, tile: int) -> Tensor:
    """[G, R, D] float64: the queries of a tile that share the kv head."""
    group = slice(head * HEADS // KV_HEADS, (head + 1) * HEADS // KV_HEADS)
    return q[0, group, tile * TILE : (tile + 1) * TILE].double()
