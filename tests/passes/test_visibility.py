"""The operands built for a mask let through exactly the keys that the mask does."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from nsa_compile.passes.emit import Caller
from nsa_compile.passes.site import Mask
from nsa_compile.passes.visibility import Visibility

BATCH, Q_LEN, KV_LEN = 2, 9, 13
OFFSET = KV_LEN - Q_LEN
SORTED = torch.tensor(
    [[0, 0, 0, 3, 3, 3, 3, 3, 4, 4, 4, 4, 9], [1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2]]
)
MIXED = torch.tensor(
    [[5, 2, 2**40, 5, 5, -1, 2, 2, 7, 7, 2**40, 5, 0], [0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 3]]
)


class Graph:
    """A graph with q, k and further inputs, to which operands are appended and which then runs."""

    def __init__(self, **inputs: torch.Tensor) -> None:
        self.graph = fx.Graph()
        self.inputs = {
            "q": torch.zeros(BATCH, 4, Q_LEN, 8), "k": torch.zeros(BATCH, 2, KV_LEN, 8), **inputs
        }  # fmt: skip
        self.nodes = {name: self.graph.placeholder(name) for name in self.inputs}
        for name, node in self.nodes.items():
            node.meta["example_value"] = self.inputs[name]
        self.visibility = Visibility()

    def operands(self, mask: Mask):
        q, k = self.nodes["q"], self.nodes["k"]
        return self.visibility.operands(mask, q, k, Caller(self.graph, q))

    def run(self, *nodes: fx.Node | None) -> list[torch.Tensor | None]:
        self.graph.output(tuple(node for node in nodes if node is not None))
        results = iter(fx.GraphModule({}, self.graph)(**self.inputs))
        return [None if node is None else next(results) for node in nodes]

    def seen(self, mask: Mask) -> torch.Tensor:
        """bool [B, Tq, Tk]: what an operator lets through."""
        operands = self.operands(mask)
        valid, ranges, query_ids, key_ids = self.run(*operands[:4])
        i = torch.arange(Q_LEN)[:, None] + mask.offset
        j = torch.arange(KV_LEN)
        keep = torch.ones(BATCH, Q_LEN, KV_LEN, dtype=torch.bool)
        if operands.causal:
            keep &= j <= i
        if valid is not None:
            assert valid.dtype == torch.bool
            keep &= valid[:, None]
        if ranges is not None:
            assert ranges.dtype == torch.int32
            assert ranges.shape[1:] == (Q_LEN, 2)
            keep &= (j >= ranges[:, :, :1]) & (j < ranges[:, :, 1:])
        if query_ids is not None:
            assert query_ids.dtype == key_ids.dtype == torch.int32
            keep &= query_ids[:, :, None] == key_ids[:, None]
        return keep


def positions() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(Q_LEN)[:, None] + OFFSET, torch.arange(KV_LEN)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("chunk", [1, 4, 5, 64])
def test_chunks(chunk: int, causal: bool) -> None:
    i, j = positions()
    expected = (i // chunk == j // chunk) & ((j <= i) | (not causal))
    seen = Graph().seen(Mask(causal=causal, offset=OFFSET, chunk=chunk))
    assert torch.equal(seen, expected.expand_as(seen))


@pytest.mark.parametrize(
    "prefix", [0, 3, torch.tensor(4), torch.tensor([2, 12]), torch.tensor([[6], [0]])]
)
def test_prefix(prefix: int | torch.Tensor) -> None:
    graph, given = Graph(), prefix
    if isinstance(prefix, torch.Tensor):
        graph = Graph(prefix=prefix)
        given = graph.nodes["prefix"]
    i, j = positions()
    length = prefix.reshape(-1, 1, 1) if isinstance(prefix, torch.Tensor) else prefix
    seen = graph.seen(Mask(causal=True, offset=OFFSET, prefix=given))
    assert torch.equal(seen, ((j <= i) | (j < length)).expand_as(seen))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("ids", ["sorted", "mixed"])
def test_documents(ids: str, dtype: torch.dtype, causal: bool) -> None:
    keys = (
        SORTED if ids == "sorted" else MIXED.clamp(max=1000 if dtype == torch.int32 else 2**50)
    ).to(dtype)
    queries = keys[:, OFFSET:]
    graph = Graph(queries=queries, keys=keys)
    nodes = (graph.nodes["queries"], graph.nodes["keys"])
    i, j = positions()
    expected = (queries[:, :, None] == keys[:, None]) & ((j <= i) | (not causal))
    for known_sorted in {False, ids == "sorted"}:
        graph = Graph(queries=queries, keys=keys)
        nodes = (graph.nodes["queries"], graph.nodes["keys"])
        mask = Mask(causal, OFFSET, segments=nodes, segments_sorted=known_sorted)
        assert torch.equal(graph.seen(mask), expected)


def test_a_query_of_a_document_without_keys_sees_nothing() -> None:
    graph = Graph(queries=torch.full((BATCH, Q_LEN), 6), keys=MIXED)
    mask = Mask(causal=False, segments=(graph.nodes["queries"], graph.nodes["keys"]))
    assert not graph.seen(mask).any()


def test_chunks_documents_and_padding_together() -> None:
    valid = torch.tensor([[0, 1], [1, 1]]).repeat_interleave(torch.tensor([3, KV_LEN - 3]), dim=1)
    graph = Graph(queries=SORTED[:, OFFSET:], keys=SORTED, valid=valid)
    segments = (graph.nodes["queries"], graph.nodes["keys"])
    mask = Mask(
        True, OFFSET, valid=graph.nodes["valid"], chunk=6, segments=segments, segments_sorted=True
    )
    i, j = positions()
    expected = (i // 6 == j // 6) & (j <= i) & (SORTED[:, OFFSET:, None] == SORTED[:, None])
    assert torch.equal(graph.seen(mask), expected & valid.bool()[:, None])


def test_layers_with_one_mask_share_its_operands() -> None:
    graph = Graph(valid=torch.ones(1, KV_LEN))
    first = graph.operands(Mask(True, OFFSET, valid=graph.nodes["valid"], chunk=4))
    count = len(graph.graph.nodes)
    assert graph.operands(Mask(True, OFFSET, valid=graph.nodes["valid"], chunk=4)) == first
    assert len(graph.graph.nodes) == count


def test_a_plain_mask_needs_no_operands() -> None:
    assert Graph().operands(Mask(causal=True, window=5)) == (None, None, None, None, True)
