"""flex_attention: each form converts or says why; a BlockMask has to agree with its mask_mod."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import nsa_compile

Tensor = torch.Tensor
OPTIONS = {
    "dense_len": 0, "select_block": 16, "query_tile": 16, "window": 16, "num_selected": 32,
    "inner": "eager",
}  # fmt: skip
T = 400


def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j


def past(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return torch.where(i >= j, score, -float("inf"))


def block_mask(mask_mod: Any = causal, batch: int | None = None) -> BlockMask:
    return create_block_mask(mask_mod, batch, None, T, T, device="cpu")


def some_blocks(first: int = 1) -> BlockMask:
    """Causal, but of the past only the first block and one's own are read: not what it shows."""
    made = block_mask()
    indices = made.full_kv_indices.clone()
    full = torch.clamp(made.full_kv_num_blocks, max=first)
    return BlockMask.from_kv_blocks(
        made.kv_num_blocks, made.kv_indices, full, indices, mask_mod=causal, seq_lengths=(T, T)
    )


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def check(function: Callable[..., Any], *args: Any, kv_heads: int = 4) -> Any:
    """The report, after comparing the result with the one that is not compiled."""
    q, k = torch.randn(2, 4, T, 16), torch.randn(2, kv_heads, T, 16)
    fast = torch.compile(function, backend="nsa", options=OPTIONS)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(
                fast(q, k, *args), function(q, k, *args), rtol=1e-4, atol=1e-4
            )
    return nsa_compile.report(fast)


def attend(q: Tensor, k: Tensor, mask: BlockMask) -> Tensor:
    return flex_attention(q, k, k, block_mask=mask)


FORMS: dict[str, tuple[Callable[[Tensor, Tensor], Any], int, str]] = {
    "score_mod": (lambda q, k: flex_attention(q, k, k, score_mod=past), 4, "causal"),
    "gqa": (
        lambda q, k: flex_attention(q, k, k, score_mod=past, enable_gqa=True), 2, "causal",
    ),
    "scale": (lambda q, k: flex_attention(q, k, k, score_mod=past, scale=0.3), 4, "causal"),
    "kernel_options": (
        lambda q, k: flex_attention(q, k, k, score_mod=past, kernel_options={"BLOCK_M": 64}),
        4, "causal",
    ),
    "both": (
        lambda q, k: flex_attention(
            q, k, k, score_mod=lambda s, b, h, i, j: 5.0 * torch.tanh(s / 5.0),
            block_mask=block_mask(),
        ),
        4, "causal",
    ),
    "full": (lambda q, k: flex_attention(q, k, k), 4, "full"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_forms_that_convert(name: str) -> None:
    function, kv_heads, mask = FORMS[name]
    (row,) = check(function, kv_heads=kv_heads).sites
    assert (row.decision, row.mask) == ("converted", mask), row.reason_text


def test_a_log_sum_exp_that_is_asked_for_has_a_reason() -> None:
    (row,) = check(lambda q, k: flex_attention(q, k, k, score_mod=past, return_lse=True)).sites
    assert (row.decision, row.reason) == ("kept", "weights_escape")


def test_a_score_that_the_operators_do_not_compute_has_a_reason() -> None:
    odd = lambda s, b, h, i, j: torch.sin(s)  # noqa: E731
    (row,) = check(lambda q, k: flex_attention(q, k, k, score_mod=odd)).sites
    assert row.decision == "kept"


def test_a_block_mask_from_outside_that_agrees() -> None:
    report = check(attend, block_mask())
    assert [(r.decision, r.mask) for r in report.sites] == [("converted", "causal")]
    assert not report.failures


def test_a_block_mask_from_outside_with_documents() -> None:
    ids = (torch.arange(T) // 70).expand(2, T).contiguous()
    mod = lambda b, h, i, j: (i >= j) & (ids[b, i] == ids[b, j])  # noqa: E731
    report = check(attend, block_mask(mod, 2))
    assert not report.failures
    assert [r.decision for r in report.sites] == ["converted"]


def test_a_block_mask_from_outside_that_hides_more_runs_dense() -> None:
    with pytest.warns(nsa_compile.ConversionWarning, match="lists other blocks") as warned:
        report = check(attend, some_blocks())
    assert len(warned) == 1
    assert len(report.failures) == 1


def test_each_new_block_mask_is_checked() -> None:
    q = torch.randn(2, 4, T, 16)
    fast = torch.compile(attend, backend="nsa", options=OPTIONS)
    with torch.no_grad():
        fast(q, q, block_mask())
        assert not nsa_compile.report(fast).failures
        other = some_blocks()
        with pytest.warns(nsa_compile.ConversionWarning):
            out = fast(q, q, other)
        torch.testing.assert_close(out, attend(q, q, other), rtol=1e-4, atol=1e-4)


def test_a_block_mask_that_is_written_to_is_checked_again() -> None:
    q, mask = torch.randn(2, 4, T, 16), block_mask()
    fast = torch.compile(attend, backend="nsa", options=OPTIONS)
    with torch.no_grad():
        fast(q, q, mask)
        mask.full_kv_num_blocks.zero_()
        with pytest.warns(nsa_compile.ConversionWarning):
            out = fast(q, q, mask)
        torch.testing.assert_close(out, attend(q, q, mask), rtol=1e-4, atol=1e-4)


def test_a_block_listed_as_full_that_is_not() -> None:
    """mask_mod is not applied there: more is read than it shows."""
    made = block_mask()
    every = BlockMask.from_kv_blocks(
        torch.zeros_like(made.kv_num_blocks), made.kv_indices,
        made.kv_num_blocks + made.full_kv_num_blocks,
        torch.arange(4, dtype=torch.int32).expand(1, 1, 4, 4).contiguous(),
        mask_mod=causal, seq_lengths=(T, T),
    )  # fmt: skip
    with pytest.warns(nsa_compile.ConversionWarning, match="lists other blocks"):
        check(attend, every)


def test_a_block_mask_built_in_the_graph_from_constants() -> None:
    (row,) = check(lambda q, k: attend(q, k, block_mask())).sites
    assert (row.decision, row.mask) == ("converted", "causal")


def test_a_block_mask_built_in_the_graph_that_hides_more() -> None:
    (row,) = check(lambda q, k: attend(q, k, some_blocks())).sites
    assert (row.decision, row.reason) == ("kept", "mask_from_outside")


def test_blocks_that_activations_choose() -> None:
    def chosen(q: Tensor, k: Tensor) -> Tensor:
        """Reads of the full blocks as many as the sign of a number says."""
        made = block_mask()
        full = made.full_kv_num_blocks * (q.flatten()[0] > 0).int()
        mask = BlockMask.from_kv_blocks(
            made.kv_num_blocks, made.kv_indices, full, made.full_kv_indices,
            mask_mod=causal, seq_lengths=(T, T),
        )  # fmt: skip
        return flex_attention(q, k, k, block_mask=mask)

    (row,) = check(chosen).sites
    assert (row.decision, row.reason) == ("kept", "mask_from_outside")
    assert "graph input" in row.reason_text
