"""The report row of a verdict: plain values that keep no graph alive."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import fx

from nsa_compile.passes.cost import flops_dense, flops_sparse, size, text
from nsa_compile.passes.evidence import evidence
from nsa_compile.passes.projection import LENGTHS, projection
from nsa_compile.passes.reasons import Reason, Refusal
from nsa_compile.passes.site import Decision, SiteRecord
from nsa_compile.passes.templates import template


def record(decision: Decision, compile_id: str, lengths: Iterable[int] = LENGTHS) -> SiteRecord:
    """The report row of one verdict, with its cost at ``lengths``; it keeps no graph alive."""
    site, refusal = decision.site, decision.refusal
    unused = _unused(decision)
    return SiteRecord(
        module=site.module,
        module_class=site.module_class,
        source=site.source,
        spelling=site.spelling,
        decision="converted" if decision.converted else "kept",
        reason=refusal.code if refusal else None,
        reason_text=refusal.text + _named(unused) if refusal else None,
        hint=refusal.hint if refusal else None,
        q_heads=site.q_heads,
        kv_heads=site.kv_heads,
        head_dim=site.head_dim,
        value_dim=site.value_dim,
        q_len=text(size(site.q_len)),
        kv_len=text(size(site.kv_len)),
        mask="unknown" if isinstance(site.mask, Refusal) else site.mask.describe(),
        scale=_scale(site.scale),
        dtype=str(site.dtype).removeprefix("torch."),
        config=_sizes_used(decision) if decision.converted else None,
        flops_dense=flops_dense(site),
        flops_sparse=flops_sparse(site, decision.config) if decision.converted else None,
        batch=text(size(site.batch)),
        ordinal=site.ordinal,
        compile_id=compile_id,
        modifiers=site.modifiers.describe(),
        extra={
            **projection(decision, lengths),
            "evidence": evidence(decision),
            **({"unused_parameters": unused} if unused else {}),
        },
    )


def _unused(decision: Decision) -> list[str]:
    """The parameters that ``nsa_compile.prepare`` gave to a layer that stays dense."""
    mark = decision.site.mark
    if mark is None or decision.converted:
        return []
    prefix = f"{mark.module}.nsa" if mark.module else "nsa"
    return [f"{prefix}.{name}" for name in template(mark.template).names]


def _named(unused: list[str]) -> str:
    return f"; its parameters are not used: {', '.join(unused)}" if unused else ""


def failed_record(row: SiteRecord, detail: str) -> SiteRecord:
    """``row`` as kept dense by an internal failure."""
    refusal = Refusal(Reason.INTERNAL_ERROR, detail)
    return replace(
        row,
        decision="kept",
        reason=refusal.code,
        reason_text=refusal.text,
        hint=refusal.hint,
        config=None,
        flops_sparse=None,
    )


def _scale(scale: float | fx.Node) -> float | str:
    """A finite number, or the text of what holds it in a dynamic graph."""
    if isinstance(scale, fx.Node):
        return str(scale.name)
    return float(scale) if math.isfinite(scale) else str(scale)


def _sizes_used(decision: Decision) -> dict[str, Any]:
    sizes = decision.config.sizes()
    if decision.config.scorer == "channels":
        sizes["score_channels"] = decision.config.channels(decision.site.head_dim)
        sizes["candidates"] = decision.config.proposed_blocks(decision.site.head_dim)
    return sizes
