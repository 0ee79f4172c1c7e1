"""Selectors: which blocks they name, in functions, in graphs and under gates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import nsa_compile
from nsa_compile import functional
from nsa_compile.passes.config import NSAConfig, NSAConfigError
from nsa_compile.passes.selectors import choose

SIZES: dict[str, Any] = {
    "dense_len": 0, "query_tile": 16, "select_block": 8, "num_selected": 4, "window": 8,
    "compress_block": 16, "compress_stride": 8,
}  # fmt: skip


def blocks(selector: Any, causal: bool = True, **sizes: Any) -> list[set[int]]:
    """What each of the tiles of 100 queries reads."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 100, 8), torch.randn(1, 1, 100, 8)
    config = NSAConfig(**{**SIZES, **sizes}, selector=selector)
    chosen = choose(q, k, None, config, 8**-0.5, causal, 0)
    assert chosen.dtype == torch.int32
    return [set(row) - {-1} for row in chosen[0, 0].view(7, -1).tolist()]


def test_selectors_by_position() -> None:
    assert blocks("local")[:3] == [{0, 1}, {0, 1, 2, 3}, {2, 3, 4, 5}]
    assert blocks("local")[-1] == {9, 10, 11, 12}
    assert blocks("local", causal=False)[2] == {4, 5, 6, 7}
    assert blocks("strided")[3] == {1, 3, 5, 7}
    assert blocks("strided")[0] == {0, 1}
    assert blocks("strided", causal=False)[0] == {3, 6, 9, 12}
    assert blocks("block_diagonal") == [
        {0, 1}, {0, 1, 2, 3}, {4, 5}, {4, 5, 6, 7}, {8, 9}, {8, 9, 10, 11}, {12},
    ]  # fmt: skip


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_topk_is_the_exact_share(causal: bool, padded: bool) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 100, 8), torch.randn(2, 2, 75, 8)
    valid = torch.arange(75).expand(2, -1) >= torch.tensor([[0], [30]]) if padded else None
    found = torch.ops.nsa.topk_blocks(q, k, valid, 0.5, causal, 3, 16, 8, 3).view(2, 2, 7, 3)
    seen = torch.ones(100, 75, dtype=torch.bool)
    seen = (seen.tril(3) if causal else seen).expand(2, 1, -1, -1)
    seen = seen if valid is None else seen & valid[:, None, None]
    logits = 0.5 * q @ k.repeat_interleave(2, 1).transpose(-1, -2)
    weights = logits.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    shares = F.pad(weights, (0, 5, 0, 12)).view(2, 2, 2, 7, 16, 10, 8).sum((2, 4, 6))
    visible = F.pad(seen, (0, 5, 0, 12)).view(2, 1, 7, 16, 10, 8).any(5).any(3)
    best = shares.masked_fill(~visible, -1.0).topk(3)
    expected = best.indices.masked_fill(best.values < 0, -1)
    assert torch.equal(found.sort(-1).values, expected.sort(-1).values.int())
    torch.library.opcheck(
        torch.ops.nsa.topk_blocks.default, (q, k, valid, 0.5, causal, 3, 16, 8, 3)
    )


def first(q: Tensor, k: Tensor, *, config: NSAConfig, offset: int, valid: Any) -> Tensor:
    """The first two blocks."""
    tiles = -(-q.shape[2] // (config.query_tile or 1))
    return torch.arange(2, device=q.device).expand(k.shape[0], k.shape[1], tiles, 2)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("selector", ["local", "strided", "block_diagonal", "topk", first])
def test_compiled_equals_the_function_and_the_mask(selector: Any, dynamic: bool) -> None:
    torch._dynamo.reset()

    def attend(x: Tensor) -> Tensor:
        q, k, v = x.unbind(0)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    options = {**SIZES, "selector": selector, "inner": "aot_eager"}
    fast = torch.compile(attend, backend="nsa", options=options)
    for length in (100, 37):
        x = torch.randn(3, 1, 2, length, 8)
        if dynamic:
            torch._dynamo.mark_dynamic(x, 3)
        out = fast(x)
        q, k, v = x.unbind(0)
        config = {name: value for name, value in options.items() if name != "inner"}
        torch.testing.assert_close(out, functional.nsa_attention(q, k, v, config=config))
        chosen = choose(q, k, None, NSAConfig(**config), 8**-0.5, True, 0)
        chosen = chosen.unflatten(2, (-(-length // 16), -1)).long() % 50
        table = torch.zeros(*chosen.shape[:3], 50, dtype=torch.bool).scatter_(3, chosen, True)
        mask = table[..., :49].repeat_interleave(16, 2).repeat_interleave(8, 3)
        mask = mask[:, :, :length, :length] & torch.ones(length, length).tril().bool()
        expected = F.scaled_dot_product_attention(q, k, v, mask)
        expected = expected.where(mask.any(-1, keepdim=True), 0.0)
        torch.testing.assert_close(out, expected)
    (row,) = nsa_compile.report(fast).sites
    assert row.decision == "converted"
    assert not dynamic or "," not in row.compile_id


def test_gates_take_a_selector() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 60, 8).unbind(0)
    gates = torch.zeros(1, 2, 60, 3)
    gates[..., 1] = 1
    config = {**SIZES, "merge": "gate", "num_selected": 8}
    out = functional.nsa_attention(q, k, v, gates=gates, config={**config, "selector": "local"})
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, is_causal=True))


def test_wrong_selectors_are_refused() -> None:
    with pytest.raises(NSAConfigError, match="selector must be one of nsa, local, strided"):
        NSAConfig(selector="best")
    q = torch.randn(1, 2, 60, 8)
    config = NSAConfig(**SIZES, selector=lambda q, k, **given: torch.zeros(1, 2, 3, 4))
    with pytest.raises(ValueError, match=r"= \[1, 2, 4, n\], got \[1, 2, 3, 4\]"):
        choose(q, q, None, config, 1.0, True, 0)
