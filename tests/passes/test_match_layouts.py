"""Heads, groups and layouts: whatever the views, the axes of an attention are told apart."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from nsa_compile.passes.config import NSAConfig
from nsa_compile.passes.pipeline import convert
from tests.passes.match_checking import match

B, T, D = 2, 11, 8
Spelling = Callable[[Tensor, Tensor], Tensor]


def split(x: Tensor, heads: int) -> Tensor:
    """[B, T, heads * D] -> [B, heads, T, D]."""
    return x.view(x.shape[0], x.shape[1], heads, D).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    t = q.shape[-2]
    hidden = torch.ones(t, t, dtype=torch.bool).triu(1)
    return (q @ k.mT / D**0.5).masked_fill(hidden, float("-inf")).softmax(-1) @ v


def repeated(q: Tensor, kv: Tensor) -> Tensor:
    kv = split(kv, 2)
    b, h, t, d = kv.shape
    kv = kv[:, :, None].expand(b, h, 2, t, d).reshape(b, 2 * h, t, d)
    return attend(split(q, 4), kv, kv)


def interleaved_by_tokens(q: Tensor, kv: Tensor) -> Tensor:
    """Repetition in [B, T, H, D]."""
    b, t, _ = kv.shape
    kv = kv.view(b, t, 2, D).repeat_interleave(2, dim=2).transpose(1, 2)
    return attend(split(q, 4), kv, kv)


def tiled(q: Tensor, kv: Tensor) -> Tensor:
    """Head h reads key head h mod 2: the queries are reordered and the result put back."""
    kv = split(kv, 2).repeat(1, 2, 1, 1)
    return attend(split(q, 4), kv, kv)


def grouped(q: Tensor, kv: Tensor) -> Tensor:
    """[B, Hkv, G, T, D] times keys with a group of 1."""
    q, kv = split(q, 4).unflatten(1, (2, 2)), split(kv, 2)[:, :, None]
    return attend(q, kv, kv).flatten(1, 2)


def groups_outside(q: Tensor, kv: Tensor) -> Tensor:
    """[B, G, Hkv, T, D] times keys [B, 1, Hkv, T, D]."""
    q, kv = split(q, 4).unflatten(1, (2, 2)), split(kv, 2)[:, None]
    return attend(q, kv, kv).flatten(1, 2)


def grouped_einsum(q: Tensor, kv: Tensor) -> Tensor:
    q, kv = q.view(*q.shape[:2], 2, 2, D), kv.view(*kv.shape[:2], 2, D)
    t = q.shape[1]
    a = torch.einsum("b t k g d, b s k d -> b k g t s", q, kv) / D**0.5
    a = a.masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), float("-inf"))
    return torch.einsum("b k g t s, b s k d -> b t k g d", a.softmax(-1), kv)


def flattened_pairs(q: Tensor, kv: Tensor) -> Tensor:
    """[B * H, T, D] with keys repeated before they are flattened."""
    b, t, _ = q.shape
    kv = split(kv, 2).repeat_interleave(2, 1).reshape(b * 4, t, D)
    return attend(split(q, 4).reshape(b * 4, t, D), kv, kv).view(b, 4, t, D)


SPELLINGS = (
    repeated, interleaved_by_tokens, tiled, grouped, groups_outside, grouped_einsum,
    flattened_pairs,
)  # fmt: skip


def inputs(heads: int, kv_heads: int, batch: int = B) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return torch.randn(batch, T, heads * D), torch.randn(batch, T, kv_heads * D)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_groups_of_queries_share_keys(spelling: Spelling, batch: int) -> None:
    found = match(spelling, inputs(4, 2, batch), dynamic=False)
    site = found.site
    assert found.masks == ["causal"], site.mask
    assert (site.q_heads, site.kv_heads, site.batch) == (4, 2, batch)
    assert found.checked == 1


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_groups_of_queries_at_run_time_sizes(spelling: Spelling) -> None:
    arguments = inputs(4, 2)
    for tensor in arguments:
        torch._dynamo.mark_dynamic(tensor, 0)
        torch._dynamo.mark_dynamic(tensor, 1)
    found = match(spelling, arguments)
    assert (found.masks, found.checked) == (["causal"], 1), found.site.mask
    assert (found.site.q_heads, found.site.kv_heads) == (4, 2)


def one_head(q: Tensor, kv: Tensor) -> Tensor:
    return attend(split(q, 4), kv[:, None], kv[:, None])


def one_head_expanded(q: Tensor, kv: Tensor) -> Tensor:
    kv = kv[:, None].expand(-1, 4, -1, -1)
    return attend(split(q, 4), kv, kv)


def one_head_folded(q: Tensor, kv: Tensor) -> Tensor:
    """All heads' queries as rows of one product: [B, T * H, D] @ [B, D, T]."""
    b, t, _ = q.shape
    a = torch.bmm(q.view(b, t * 4, D), kv.mT).view(b, t, 4, t) / D**0.5
    hidden = torch.ones(t, t, dtype=torch.bool).triu(1)[:, None]
    weights = a.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.bmm(weights.view(b, t * 4, t), kv)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("spelling", [one_head, one_head_expanded, one_head_folded])
def test_one_key_head_serves_all(spelling: Spelling, dynamic: bool) -> None:
    arguments = inputs(4, 1)
    if dynamic:
        for tensor in arguments:
            torch._dynamo.mark_dynamic(tensor, 1)
    found = match(spelling, arguments, dynamic=None if dynamic else False)
    assert (found.masks, found.checked) == (["causal"], 1), found.site.mask
    assert (found.site.q_heads, found.site.kv_heads) == (4, 1)


@pytest.mark.parametrize("shape", [(T, D), (4, T, D), (2, 3, 4, T, D)])
def test_any_number_of_leading_dimensions(shape: tuple[int, ...]) -> None:
    def f(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x * 2, x + 1, is_causal=True)

    found = match(f, (torch.randn(shape),))
    assert (found.masks, found.checked) == (["causal"], 1)


def test_other_key_heads_for_every_query_are_not_merged() -> None:
    def f(q: Tensor, kv: Tensor) -> Tensor:
        k, v = split(kv, 2).repeat_interleave(2, 1), split(kv, 2).repeat(1, 2, 1, 1)
        return attend(split(q, 4), k, v)

    found = match(f, inputs(4, 2))
    assert (found.site.kv_heads, found.checked) == (4, 1)


def captured(spelling: Spelling, arguments: tuple[Tensor, ...]) -> fx.GraphModule:
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, inputs: object) -> object:
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(spelling, backend=backend, dynamic=False)(*arguments)
    return graphs[0]


def calls(gm: fx.GraphModule) -> list[str]:
    """The operators of a graph, one a node, in order."""
    return [
        node.target if isinstance(node.target, str) else node.target.__name__
        for node in gm.graph.nodes
        if node.op.startswith("call_")
    ]


def test_graph_before_and_after() -> None:
    gm = captured(tiled, inputs(4, 2))
    assert calls(gm) == [
        "view", "transpose", "repeat", "view", "transpose", "ones", "triu", "getattr", "matmul",
        "truediv", "masked_fill", "softmax", "matmul",
    ]  # fmt: skip
    assert convert(gm, NSAConfig()).converts
    assert calls(gm) == [
        "view", "transpose", "view", "transpose", "unflatten", "permute", "flatten",
        "channels.default", "select_blocks.default", "selected_attention.default", "getitem",
        "unflatten", "permute", "flatten",
    ]  # fmt: skip


def test_a_kept_graph_stays_as_it_was() -> None:
    def biased(q: Tensor, kv: Tensor) -> Tensor:
        q, kv = split(q, 4), split(kv, 4)
        return (q @ kv.mT + q[:, :, :1, :1] * kv[:, :, None, :, 0]).softmax(-1) @ kv

    gm = captured(biased, inputs(4, 4))
    before = str(gm.graph)
    assert not convert(gm, NSAConfig()).converts
    assert str(gm.graph) == before
