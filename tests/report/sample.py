"""Reports with one of everything: converted, dense here, kept, symbolic, a failure, measured."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch
from torch import fx

from nsa_compile.passes.config import NSAConfig
from nsa_compile.passes.decide import decide
from nsa_compile.passes.reasons import Reason, Refusal
from nsa_compile.passes.record import record
from nsa_compile.passes.site import AttentionSite, Mask, SiteRecord
from nsa_compile.report import RewriteReport
from nsa_compile.report.measured import totals
from nsa_compile.verification.report import EndToEnd, LayerCheck, Suggestion, VerifyReport


def make_record(module: str = "layers.0.attn", **changes: object) -> SiteRecord:
    values = {
        "module": module, "module_class": "Attention", "source": "/code/model.py:41",
        "spelling": "sdpa", "decision": "converted", "reason": None, "reason_text": None,
        "hint": None, "q_heads": 32, "kv_heads": 8, "head_dim": 128, "value_dim": 128,
        "q_len": 65536, "kv_len": 65536, "mask": "causal", "scale": 0.125, "dtype": "bfloat16",
        "config": {"num_selected": 64, "dense_len": 8192}, "flops_dense": 35_185_000_000_000,
        "flops_sparse": 8_650_000_000_000, "compile_id": "0/0",
    }  # fmt: skip
    return SiteRecord(**{**values, **changes})


def kept(module: str, reason: Reason, detail: str, **changes: object) -> SiteRecord:
    refusal = Refusal(reason, detail)
    return make_record(
        module,
        decision="kept",
        reason=refusal.code,
        reason_text=refusal.text,
        hint=refusal.hint,
        config=None,
        flops_sparse=None,
        **changes,
    )


def sample_report() -> RewriteReport:
    records = [make_record(f"model.layers.{i}.self_attn") for i in range(10)]
    records += [
        kept(f"model.layers.{i}.self_attn", Reason.MASK_NOT_UNDERSTOOD, "node %where_3 (where)",
             mask="unknown")
        for i in (10, 12)
    ]  # fmt: skip
    records += [
        make_record("model.layers.11.self_attn", mask="causal & window(4096) & padding",
                    q_len=4096, kv_len=4096,
                    flops_dense=137_500_000_000, flops_sparse=137_500_000_000,
                    modifiers="softcap(50.0) & sinks"),
        kept("pool.attn", Reason.DROPOUT, "dropout_p=0.1", q_len=1, kv_len=512, batch=4,
             value_dim=64, flops_dense=524_288, module_class="AttentionPool"),
        make_record("", q_len="s0", kv_len="s0", flops_dense="4096*s0*(s0 + 1)",
                    flops_sparse="1024*s0*(s0 + 1) if s0 > 8192 else 4096*s0*(s0 + 1)",
                    ordinal=1, compile_id="1/0", module_class="", source=""),
    ]  # fmt: skip
    return RewriteReport.merge(
        "LlamaForCausalLM", records, ["graph 2/0 stays dense: KeyError: 'q'"]
    )


def sample_with_evidence() -> RewriteReport:
    """Layers with what a compiler's record has besides: evidence and projected costs."""
    graph = fx.Graph()
    q, mask = graph.placeholder("q"), graph.placeholder("mask")
    out = graph.call_function(torch.nn.functional.scaled_dot_product_attention, (q, q, q, mask))
    unproven = Refusal(Reason.MASK_NOT_UNDERSTOOD, "node %mask (<b>\"bold\"</b> & 'odd')")

    def row(module: str, **changes: Any) -> SiteRecord:
        site = AttentionSite(
            output=out, query=q, key=q, value=q, scale=0.125, dropout=0.0, mask_node=mask,
            mask=Mask(causal=True, valid=mask), spelling="sdpa", module=module,
            module_class="Attention<T>", source="model.py:41", ordinal=0, q_heads=32, kv_heads=8,
            head_dim=128, value_dim=128, batch=1, q_len=32768, kv_len=32768, dtype=torch.bfloat16,
        )  # fmt: skip
        return record(decide(replace(site, **changes), NSAConfig()), "0/0")

    records = [
        row("encoder.layers.0.attn"),
        row("encoder.layers.1.attn", mask=unproven),
        row("decoder.layers.0.self_attn", query_steps=(("transpose", (1, 2)),)),
        row("decoder.layers.0.self_attn", ordinal=1, dropout=0.1),
        row("decoder.layers.0.cross_attn", kv_len=77),
        row("", spelling="eager"),
    ]
    return RewriteReport.merge("Model<script>alert(1)</script>", records, ["a <failure>"])


def sample_measured() -> RewriteReport:
    """As if --bench and --verify had been given; sparse attention pays from 15k tokens on."""
    report = sample_with_evidence()
    for site in report.sites:
        if site.q_len == site.kv_len:
            site.extra["measured"] = [
                _measured(length, site.decision == "converted") for length in (8192, 16384, 32768)
            ]
    rows = [asdict(row) for row in totals(report.sites)]
    report.bench = {
        "hardware": "a device", "versions": {"torch": "2.13.0", "python": "3.12.1"}, "rows": rows,
        "break_even": 15000, "break_even_measured": True,
        "left_out": ["decoder.layers.0.cross_attn: its queries and keys are not equally many"],
    }  # fmt: skip
    report.verification = _verified(report.sites).to_dict()
    return report


def _verified(sites: list[SiteRecord]) -> VerifyReport:
    names = ("module", "ordinal", "decision", "reason", "reason_text", "mask", "q_len", "kv_len")
    layers = []
    for at, site in enumerate(sites):
        found = {name: getattr(site, name) for name in names}
        if site.decision == "converted":
            found |= {"relative_error": 0.01 * at, "cosine": 1 - 0.001 * at, "max_error": 0.5}
            found |= {"coverage": 1 - 0.01 * at, "coverage_worst": 0.5, "equal": at == 0}
        layers.append(LayerCheck(**found))
    output = EndToEnd((1, 32768, 100), 0.04, 0.75, 0.9991, 0.002, 0.98, 32768, 9.1, 9.2, False)
    suggestion = Suggestion(
        0.03, True, ("decoder.*",), {"exclude": ["decoder.*"]}, 0.02, converted=2, runs=3
    )
    return VerifyReport("Model", "cpu", layers, output, 0.03, suggestion, ["a <failure>"])


def _measured(length: int, converted: bool) -> dict[str, Any]:
    def times(value: float) -> list[float]:
        return [value, value * 0.9, value * 1.2]

    is_dense = converted and length <= 8192
    dense, sparse = 3.75 * (length / 16384) ** 2, 3.5 * (length / 16384) ** 1.5
    row: dict[str, Any] = {
        "length": length, "dense_backend": "cudnn", "is_dense": is_dense if converted else None,
    }  # fmt: skip
    for part, factor in (("forward", 1.0), ("backward", 2.5)):
        row[f"dense_{part}_ms"] = times(dense * factor)
        row[f"sparse_{part}_ms"] = times(sparse * factor) if converted else None
        row[f"converted_{part}_ms"] = row[f"{'dense' if is_dense else 'sparse'}_{part}_ms"]
    return row
