"""A report with one of everything: converted, dense here, kept, symbolic, a failure."""

from __future__ import annotations

from nsa_compile.passes.reasons import Reason, Refusal
from nsa_compile.passes.site import SiteRecord
from nsa_compile.report import RewriteReport


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
