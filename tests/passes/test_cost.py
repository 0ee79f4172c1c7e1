"""Cost of a site: pairs against brute force, symbolic sizes without guards, the report row."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from nsa_compile.passes.config import NSAConfig
from nsa_compile.passes.cost import flops_dense, flops_sparse, visible_pairs
from nsa_compile.passes.reasons import Reason, Refusal
from nsa_compile.passes.record import record
from nsa_compile.passes.site import AttentionSite, Decision, Mask


def make_site(**changes: object) -> AttentionSite:
    node = fx.Graph().placeholder("q")
    values = {
        "output": node, "query": node, "key": node, "value": node, "scale": 0.125, "dropout": 0.0,
        "mask_node": None, "mask": Mask(causal=True), "spelling": "sdpa",
        "module": "layers.0.attn", "module_class": "Attention", "source": "model.py:7",
        "ordinal": 0, "q_heads": 8, "kv_heads": 2, "head_dim": 64, "value_dim": 32, "batch": 2,
        "q_len": 100, "kv_len": 100, "dtype": torch.bfloat16,
    }  # fmt: skip
    return AttentionSite(**{**values, **changes})


def symbolic(hint: int) -> tuple[torch.SymInt, ShapeEnv]:
    from torch._dynamo.source import LocalSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    env = ShapeEnv()
    symbol = env.create_symbol(hint, LocalSource("t"), dynamic_dim=DimDynamic.DYNAMIC)
    return env.create_symintnode(symbol, hint=hint), env


SMALL = NSAConfig(dense_len=0, window=16, select_block=16, query_tile=16, num_selected=3)
ONE_LOOK = NSAConfig.from_options({**SMALL.sizes(), "candidates": 3})


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 3, 7, 100])
def test_visible_pairs_count_the_mask(causal: bool, window: int | None) -> None:
    for q_len, kv_len, offset in itertools.product((1, 5, 12), (1, 7, 12), (-3, 0, 4, 9)):
        p = torch.arange(q_len)[:, None] + offset
        j = torch.arange(kv_len)[None]
        seen = (j <= p) if causal else torch.ones(q_len, kv_len, dtype=torch.bool)
        if window is not None:
            seen &= (j > p - window) if causal else (p - j).abs() < window
        count = visible_pairs(q_len, kv_len, causal, offset, window)
        assert count == int(seen.sum()), (q_len, kv_len, offset)


def test_dense_flops_of_a_causal_site() -> None:
    assert flops_dense(make_site()) == 2 * 8 * 2 * (64 + 32) * (100 * 101 // 2)


def test_a_window_of_the_model_counts_its_keys() -> None:
    site = make_site(mask=Mask(causal=True, window=10))
    assert flops_dense(site) == 2 * 8 * 2 * (64 + 32) * (100 * 10 - 45)


def test_a_mask_that_was_not_understood_counts_every_pair() -> None:
    site = make_site(mask=Refusal(Reason.MASK_NOT_UNDERSTOOD, "node x"))
    assert flops_dense(site) == 2 * 8 * 2 * (64 + 32) * 100 * 100


def test_sparse_is_scoring_plus_attending() -> None:
    pairs, attended = 5050, 48 * 100 - 48 * 47 // 2
    for scorer, scoring in (("channels", 64 * pairs), ("mean", 64 * (pairs // 16))):
        config = NSAConfig.from_options({**ONE_LOOK.sizes(), "scorer": scorer})
        expected = 2 * 8 * (2 * scoring + 2 * (64 + 32) * attended)
        assert flops_sparse(make_site(), config) == expected


def test_a_second_look_reads_the_proposed_blocks_that_are_not_forced() -> None:
    config = NSAConfig.from_options({**ONE_LOOK.sizes(), "candidates": 5})
    read = (5 - config.forced_blocks()) * 16
    pairs = read * 100 - read * (read - 1) // 2
    more = flops_sparse(make_site(), config) - flops_sparse(make_site(), ONE_LOOK)
    assert more == 16 * 2 * 64 * pairs


def test_a_full_mask_attends_to_the_budget_and_never_more_than_there_is() -> None:
    site = make_site(mask=Mask(causal=False))
    scoring = 2 * 64 * 100 * 100
    assert flops_sparse(site, ONE_LOOK) == 16 * (scoring + 2 * 96 * 100 * 48)
    short = make_site(mask=Mask(causal=False), q_len=20, kv_len=20)
    assert flops_sparse(short, ONE_LOOK) == 16 * (2 * 64 * 400 + 2 * 96 * 400)


def test_up_to_dense_len_the_cost_is_that_of_dense() -> None:
    site = make_site()
    assert flops_sparse(site, NSAConfig(dense_len=100)) == flops_dense(site)
    assert flops_sparse(site, NSAConfig(dense_len=99)) != flops_dense(site)


@pytest.mark.parametrize(
    "mask", [Mask(True), Mask(False), Mask(True, window=24), Mask(False, window=5)]
)
@pytest.mark.parametrize("scorer", ["channels", "mean"])
def test_symbolic_text_is_python_that_agrees_with_the_numbers(mask: Mask, scorer: str) -> None:
    length, env = symbolic(100)
    config = NSAConfig.from_options({**SMALL.sizes(), "scorer": scorer, "dense_len": 30})
    site = make_site(mask=mask, q_len=length, kv_len=length)
    dense, sparse = flops_dense(site), flops_sparse(site, config)
    for number in (20, 31, 100, 1000):
        known = make_site(mask=mask, q_len=number, kv_len=number)
        names = {str(length): number, "min": min, "max": max, "int": int}
        assert eval(dense, names) == flops_dense(known)
        assert eval(sparse, names) == flops_sparse(known, config)
    assert env.guards == []


def test_the_record_of_a_converted_site() -> None:
    row = record(Decision(make_site(), SMALL), "0/1")
    assert (row.decision, row.reason, row.reason_text, row.hint) == ("converted", None, None, None)
    assert (row.mask, row.dtype, row.scale, row.compile_id) == ("causal", "bfloat16", 0.125, "0/1")
    assert row.config is not None
    assert row.config["num_selected"] == 3
    assert (row.config["score_channels"], row.config["candidates"]) == (64, 3)
    assert isinstance(row.flops_sparse, int)


def test_the_record_of_a_kept_site() -> None:
    refusal = Refusal(Reason.MASK_NOT_UNDERSTOOD, "node where_2")
    row = record(Decision(make_site(mask=refusal), SMALL, refusal), "0/0")
    assert (row.decision, row.reason, row.mask) == ("kept", "mask_not_understood", "unknown")
    assert row.reason_text is not None
    assert "node where_2" in row.reason_text
    assert row.hint
    assert row.config is None
    assert row.flops_sparse is None


def test_sizes_of_a_dynamic_graph_are_symbol_text() -> None:
    length, env = symbolic(77)
    scale = fx.Graph().placeholder("scale_item")
    row = record(Decision(make_site(q_len=length, kv_len=length, scale=scale), SMALL), "0/0")
    assert row.q_len == row.kv_len == str(length)
    assert row.scale == "scale_item"
    assert env.guards == []


def test_an_offset_node_enters_the_cost_by_its_symbol() -> None:
    length, _ = symbolic(64)
    offset = fx.Graph().placeholder("past")
    offset.meta["example_value"] = length
    dense = flops_dense(make_site(mask=Mask(True, offset=offset), kv_len=200))
    names = {str(length): 64, "min": min, "max": max}
    assert eval(dense, names) == flops_dense(make_site(mask=Mask(True, offset=64), kv_len=200))
