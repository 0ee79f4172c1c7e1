"""NSAConfig: defaults per merge, refusals that say what to do, per-layer overrides."""

from __future__ import annotations

import re
from typing import Any

import pytest

from nsa_compile.passes.config import NSAConfig, NSAConfigError, window_blocks


def test_softmax_defaults_are_the_measured_budget() -> None:
    config = NSAConfig()
    assert (config.scorer, config.query_tile, config.num_selected) == ("channels", 64, 64)
    assert (config.window, config.dense_len, config.inner) == (1024, 8192, "inductor")


def test_gate_defaults_are_the_papers_sizes() -> None:
    config = NSAConfig(merge="gate")
    assert (config.scorer, config.query_tile, config.num_selected, config.window) == (
        "mean", 1, 16, 512,
    )  # fmt: skip
    assert (config.compress_block, config.compress_stride, config.select_block) == (32, 16, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_select": 1}, "unknown option 'num_select'; did you mean 'num_selected'?"),
        ({"scorer": "max"}, "scorer must be one of channels, mean, got 'max'"),
        ({"inner": "tvm"}, "inner must be one of inductor, aot_eager, eager, got 'tvm'"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"window": 3.5}, "window must be an integer, got 3.5"),
        ({"window": True}, "window must be an integer, got True"),
        ({"strict": 1}, "strict must be True or False, got 1"),
        ({"query_tile": 48}, "query_tile must be a power of two between 1 and 256, got 48"),
        ({"select_block": 1}, "select_block must be a power of two between 2 and 256, got 1"),
        ({"compress_block": 8}, "compress_block must be at least compress_stride"),
        ({"num_selected": 17}, "make 18; raise num_selected to at least 18 or lower window"),
        ({"num_selected": 32, "candidates": 20}, "candidates must be at least num_selected"),
        ({"include": 3}, "include must be a glob or a list of globs, got 3"),
        ({"per_layer": ["a"]}, "per_layer must map globs to options"),
        ({"per_layer": {"a": 3}}, "per_layer must map a glob to a dict of options"),
        ({"per_layer": {"a": {"windw": 3}}}, "did you mean 'window'?"),
        ({"per_layer": {"a": {"strict": True}}}, "unknown option in per_layer['a'] 'strict'"),
        ({"per_layer": {"a": {"num_selected": 2}}}, "per_layer['a']: num_selected=2 cannot hold"),
    ],
)
def test_refusals(options: dict[str, object], message: str) -> None:
    with pytest.raises(NSAConfigError) as caught:
        NSAConfig.from_options(options)
    assert message in str(caught.value)


def test_later_globs_win_and_a_changed_merge_brings_its_defaults() -> None:
    config = NSAConfig(
        per_layer={"*": {"window": 256}, "layers.1.*": {"window": 128}, "last": {"merge": "gate"}}
    )
    assert config.for_layer("layers.0.attn").window == 256
    assert config.for_layer("layers.1.attn").window == 128
    last = config.for_layer("last")
    assert (last.merge, last.scorer, last.query_tile, last.window) == ("gate", "mean", 1, 256)


@pytest.mark.parametrize(
    ("include", "exclude", "module", "expected"),
    [
        ((), (), "a.0", True),
        ("a.*", (), "a.0", True),
        ("b.*", (), "a.0", False),
        ((), "*.0", "a.0", False),
        (("a.*", "b.*"), ("*.1",), "b.0", True),
    ],
)
def test_layer_filters(include: object, exclude: object, module: str, expected: bool) -> None:
    assert NSAConfig(include=include, exclude=exclude).selects(module) is expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 64),
        ({"num_selected": 32}, 32),
        ({"num_selected": 16, "window": 128}, 16),
        ({"num_selected": 16, "window": 128, "score_channels": 64}, 24),
        ({"num_selected": 24, "window": 128, "score_channels": 64}, 32),
        ({"num_selected": 16, "window": 128, "scorer": "mean"}, 16),
        ({"num_selected": 16, "window": 128, "candidates": 16}, 16),
        ({"num_selected": 16, "window": 128, "score_channels": 128}, 16),
        ({"num_selected": 16, "window": 128, "score_channels": 128, "candidates": 20}, 20),
        ({"candidates": 100}, 100),
    ],
)
def test_small_budgets_are_chosen_among_more_candidates(
    options: dict[str, object], expected: int
) -> None:
    assert NSAConfig(**options).proposed_blocks(128) == expected


@pytest.mark.parametrize(
    ("head_dim", "expected"), [(8, 8), (64, 64), (80, 80), (128, 128), (256, 128)]
)
def test_channels_default_to_all_at_most_128(head_dim: int, expected: int) -> None:
    assert NSAConfig().channels(head_dim) == expected


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("tile", "block"), [(1, 64), (16, 64), (64, 64), (128, 32), (64, 16)])
def test_window_blocks_counts_the_worst_tile(tile: int, block: int, causal: bool) -> None:
    for window in (1, 2, 63, 64, 65, 512):
        for offset in (0, 5, 64):
            worst = 0
            for start in range(1024 * block + offset, 1100 * block + offset, tile):
                touched = set()
                for p in range(start, start + tile):
                    low = p - (window - 1 if causal else (window - 1) // 2)
                    high = p if causal else p + window // 2
                    touched |= set(range(low // block, high // block + 1))
                worst = max(worst, len(touched))
                if tile >= block and start > 1030 * block:
                    break
            assert window_blocks(window, tile, block, offset, causal) == worst
            assert window_blocks(window, tile, block, None, causal) >= worst


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"compression": "mlp"}, "compression='mlp' needs merge='gate', got merge='softmax'"),
        ({"num_mem_kv": 2}, "num_mem_kv=2 needs merge='gate', got merge='softmax'"),
        ({"gate": len}, "needs merge='gate', got merge='softmax'"),
        (
            {"merge": "gate", "compress_expand": 2.0},
            "compress_expand=2.0 is the hidden layer of compression='mlp', got compression='mean'",
        ),
        ({"merge": "gate", "compression": "max"}, "weighted, linear, mlp, conv, attention, a mod"),
        ({"merge": "gate", "compression": "mlp", "compress_expand": 0}, "a positive number, got 0"),
        ({"merge": "gate", "num_mem_kv": -1}, "num_mem_kv must be at least 0, got -1"),
        ({"merge": "gate", "gate": "linear"}, "gate must be a module or None, got 'linear'"),
        ({"num_selected": 0}, "num_selected must be at least 1, got 0"),
        ({"share_selection": False}, "share_selection=False needs merge='gate', got merge='soft"),
        ({"sel_scale": 1}, "sel_scale must be True or False, got 1"),
        ({"sel_scale": True}, "sel_scale=True needs merge='gate', got merge='softmax'"),
        ({"importance": "mean"}, "importance must be one of overlap, interpolate, got 'mean'"),
        (
            {"merge": "gate", "importance": "interpolate", "selector": "local"},
            "importance='interpolate' is about scores, which selector='nsa' computes, got "
            "selector='local'",
        ),
        (
            {"merge": "gate", "sel_scale": True, "scorer": "channels"},
            "sel_scale=True is about compressed keys and needs scorer='mean', got scorer='channels",
        ),
        ({"merge": "gate", "num_selected": 1}, "make 2; raise num_selected to at least 2 or lower"),
        (
            {"merge": "gate", "num_selected": 2, "query_tile": 128},
            "init_blocks=1 and the 3 blocks of 64 that a tile of query_tile=128 queries lies in",
        ),
    ],
)
def test_learned_options_are_checked(options: dict[str, Any], text: str) -> None:
    with pytest.raises(NSAConfigError, match=re.escape(text)):
        NSAConfig.from_options(options)


def test_a_small_gated_budget_forces_the_own_block_alone() -> None:
    assert NSAConfig(merge="gate").local_window() == 65
    assert NSAConfig(merge="gate", num_selected=4).local_window() == 65
    assert NSAConfig(merge="gate", num_selected=3).local_window() == 1  # leaves one to choose
    assert NSAConfig(merge="gate", num_selected=2).local_window() == 1
    assert NSAConfig(window=100).local_window() == 100


def test_learned_options_are_reported_with_gates_only() -> None:
    assert "compression" not in NSAConfig().sizes()
    sizes = NSAConfig(merge="gate", compression=dict).sizes()
    assert (sizes["compression"], sizes["num_mem_kv"]) == ("type", 0)


def test_a_layer_without_gates_learns_nothing() -> None:
    config = NSAConfig(merge="gate", compression="conv", per_layer={"0": {"merge": "softmax"}})
    assert config.for_layer("0").compression == "mean"
    assert config.for_layer("1").compression == "conv"
