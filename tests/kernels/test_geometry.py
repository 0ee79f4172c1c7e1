"""The integer arithmetic of blocks and tiles, against loops over every query and key."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_compile.kernels import geometry


@settings(max_examples=150, deadline=None)
@given(
    query_tile=st.sampled_from([1, 2, 4, 8]),
    q_len=st.integers(1, 50),
    kv_len=st.integers(1, 50),
    offset=st.integers(-15, 30),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 30),
    init_blocks=st.integers(0, 3),
    local_window=st.integers(1, 20),
    block=st.sampled_from([2, 4, 8]),
)
def test_most_forced_blocks(
    query_tile: int, q_len: int, kv_len: int, offset: int, causal: bool, window: int | None,
    init_blocks: int, local_window: int, block: int,
) -> None:  # fmt: skip
    def sees(p: int, j: int) -> bool:
        if causal:
            return j <= p and (window is None or j > p - window)
        return window is None or abs(p - j) < window

    def is_local(p: int, j: int) -> bool:
        if causal:
            return 0 <= p - j < local_window
        return p - (local_window - 1) // 2 <= j <= p + local_window // 2

    most = 0
    for tile in range(-(-q_len // query_tile)):
        rows = range(tile * query_tile, min(q_len, (tile + 1) * query_tile))
        forced = 0
        for b in range(-(-kv_len // block)):
            pairs = [
                (i + offset, j)
                for i in rows
                for j in range(b * block, min(kv_len, (b + 1) * block))
            ]
            visible = any(sees(p, j) for p, j in pairs)
            wanted = b < init_blocks or any(is_local(p, j) for p, j in pairs)
            forced += visible and wanted
        most = max(most, forced)
    assert most == geometry.most_forced_blocks(
        query_tile, q_len, kv_len, offset, causal, window, init_blocks, local_window, block
    )


def test_paper_sizes_overlap_with_weights_1_2_2_2_1() -> None:
    pairs = geometry.fold_weights(32, 16, 64, "overlap")[0]
    assert pairs == ((-1, 1.0), (0, 2.0), (1, 2.0), (2, 2.0), (3, 1.0))


@pytest.mark.parametrize(("length", "stride", "block"), [(32, 16, 64), (8, 8, 8), (24, 8, 16)])
def test_overlap_weights_count_tokens(length: int, stride: int, block: int) -> None:
    (pairs,) = geometry.fold_weights(length, stride, block, "overlap")
    weights = dict(pairs)
    for s in (0, 3):
        for c in range(40):
            tokens = range(c * stride, c * stride + length)
            inside = sum(s * block <= token < (s + 1) * block for token in tokens)
            assert weights.get(c - s * block // stride, 0) == inside / stride


def test_budget_that_cannot_hold_the_forced_blocks_is_refused() -> None:
    sizes = {"query_tile": 64, "q_len": 4096, "kv_len": 4096, "causal": True, "window": None}
    budget = {"init_blocks": 1, "local_window": 512, "block": 64}
    geometry.check_budget(10, offset=0, **sizes, **budget)
    with pytest.raises(ValueError, match=r"num_selected=10 .* 11 blocks .* local_window=512"):
        geometry.check_budget(10, offset=7, **sizes, **budget)
    geometry.check_budget(10, offset=7, **{**sizes, "kv_len": 640}, **budget)
