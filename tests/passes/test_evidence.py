"""The evidence of a verdict and the projected costs in a report row."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from nsa_compile.passes.config import NSAConfig
from nsa_compile.passes.cost import flops_dense, flops_sparse
from nsa_compile.passes.decide import CHECKS, decide
from nsa_compile.passes.projection import LENGTHS, projection
from nsa_compile.passes.reasons import Reason, Refusal
from nsa_compile.passes.record import record
from nsa_compile.passes.site import Mask
from tests.passes.test_cost import make_site, symbolic


def outcomes(**changes: object) -> dict[str, str]:
    row = record(decide(make_site(**changes), NSAConfig()), "0/0")
    json.dumps(row.extra)
    return {check["check"]: check["outcome"] for check in row.extra["evidence"]["checks"]}


def test_a_converted_site_passed_every_check() -> None:
    assert outcomes() == dict.fromkeys(CHECKS, "passed")


def test_what_comes_after_a_refusal_was_not_reached() -> None:
    found = outcomes(dropout=0.1)
    assert list(found) == list(CHECKS)
    at = CHECKS.index("dropout")
    assert [found[name] for name in CHECKS[:at]] == ["passed"] * at
    assert found["dropout"] == "refused"
    assert {found[name] for name in CHECKS[at + 1 :]} == {"not reached"}


def test_the_refusal_is_told_with_its_check() -> None:
    mask = Refusal(Reason.MASK_NOT_UNDERSTOOD, "node %m (rand)")
    evidence = record(decide(make_site(mask=mask), NSAConfig()), "").extra["evidence"]
    (refused,) = [row for row in evidence["checks"] if row["outcome"] == "refused"]
    assert (refused["check"], refused["reason"]) == ("mask", "mask_not_understood")
    assert "node %m (rand)" in refused["text"]
    assert evidence["mask"] == {}


def test_a_verdict_that_was_withdrawn_later_is_told_too() -> None:
    decision = decide(make_site(), NSAConfig())
    decision = replace(decision, refusal=Refusal(Reason.MASK_NOT_UNDERSTOOD, "another call"))
    checks = record(decision, "").extra["evidence"]["checks"]
    assert checks[-1]["check"] == "other calls of its code"
    assert "another call" in checks[-1]["text"]


def test_the_normal_form_has_the_fields_that_say_something() -> None:
    site = make_site()
    site.mask = Mask(causal=True, offset=3, window=9000, valid=site.query)
    evidence = record(decide(site, NSAConfig()), "").extra["evidence"]
    assert evidence["mask"] == {
        "causal": True, "offset": 3, "window": 9000, "valid": "%q (graph input)",
    }  # fmt: skip
    assert evidence["nodes"]["query"] == "%q (graph input)"


def test_costs_are_those_of_the_lengths() -> None:
    site, config = make_site(), NSAConfig()
    found = projection(decide(site, config))
    assert [row["length"] for row in found["costs"]] == list(LENGTHS)
    for row in found["costs"]:
        there = make_site(q_len=row["length"], kv_len=row["length"])
        assert row["flops_dense"] == flops_dense(there)
        assert row["flops_sparse"] == flops_sparse(there, config)
        if row["length"] <= 8192:
            assert row["flops_sparse"] == row["flops_dense"]
            assert row["bytes_sparse"] == row["bytes_dense"]
            assert row["memory_sparse"] == row["memory_dense"]
    last = found["costs"][-1]
    assert last["bytes_sparse"] < last["bytes_dense"]


def test_bytes_and_memory_by_hand() -> None:
    row = projection(decide(make_site(), NSAConfig()))["costs"][0]
    length, item = LENGTHS[0], 2
    pairs = length * (length + 1) // 2
    own = 2 * 8 * length * (64 + 32) * item
    assert row["bytes_dense"] == own + 2 * 2 * -(-pairs // 128) * (64 + 32) * item
    assert row["memory_dense"] == 2 * 8 * length * (32 * item + 4)
    written_out = projection(decide(make_site(spelling="eager"), NSAConfig()))["costs"][0]
    scores = 2 * 2 * 8 * length * length * item
    assert written_out["memory_dense"] == row["memory_dense"] + scores
    assert written_out["memory_sparse"] == row["memory_sparse"]


def test_a_kept_site_has_dense_costs_only() -> None:
    found = projection(decide(make_site(dropout=0.1), NSAConfig()))
    assert {row["flops_sparse"] for row in found["costs"]} == {None}
    assert found["predicted_break_even"] is None


@pytest.mark.parametrize("scorer", ["channels", "mean"])
def test_break_even_is_the_first_length_with_fewer_flops(scorer: str) -> None:
    config = NSAConfig.from_options({"scorer": scorer, "dense_len": 100})
    length = projection(decide(make_site(), config))["predicted_break_even"]
    assert length > 4096  # up to its budget sparse attention reads all keys and scores besides
    for there, fewer in ((length - 1, False), (length, True)):
        site = make_site(q_len=there, kv_len=there)
        assert (flops_sparse(site, config) < flops_dense(site)) is fewer


def test_break_even_is_never_within_dense_len() -> None:
    assert (
        projection(decide(make_site(), NSAConfig(dense_len=100_000)))["predicted_break_even"]
        == 100_001
    )


def test_attention_to_another_length_is_not_projected() -> None:
    assert projection(decide(make_site(kv_len=50), NSAConfig())) == {}


def test_symbolic_lengths_are_projected_without_a_guard() -> None:
    length, env = symbolic(5000)
    found = projection(decide(make_site(q_len=length, kv_len=length, batch=length), NSAConfig()))
    assert found["costs"][0]["flops_dense"] == flops_dense(
        make_site(q_len=LENGTHS[0], kv_len=LENGTHS[0], batch=1)
    )
    assert env.guards == []
    assert isinstance(length, torch.SymInt)


def test_a_choice_for_each_query_head_costs_memory_for_each() -> None:
    site = make_site(q_heads=8, kv_heads=2)

    def row(**options: bool) -> dict[str, int]:
        config = NSAConfig(merge="gate", dense_len=0, **options)
        decision = replace(decide(site, NSAConfig()), config=config)
        assert decision.converted
        return projection(decision, [16384])["costs"][0]

    shared, own = row(), row(share_selection=False)
    blocks = site.batch * 2 * 16384 * 16 * 4  # int32 [B, Hkv, Tq, n]
    assert own["memory_sparse"] - shared["memory_sparse"] == 3 * blocks
    assert own["bytes_sparse"] > shared["bytes_sparse"]
