"""The evidence for a verdict as plain values: nodes matched, normal form of the mask, checks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import fx

from nsa_compile.passes import dialect
from nsa_compile.passes.decide import CHECKS
from nsa_compile.passes.reasons import Refusal
from nsa_compile.passes.site import AttentionSite, Decision, Mask


def evidence(decision: Decision) -> dict[str, Any]:
    """``nodes`` by role, ``mask`` as its fields that say something, ``checks`` with outcomes."""
    return {
        "nodes": _nodes(decision.site),
        "mask": _normal_form(decision.site.mask),
        "checks": _checks(decision),
    }


def _nodes(site: AttentionSite) -> dict[str, str]:
    roles = {
        "query": site.query,
        "key": site.key,
        "value": site.value,
        "mask": site.mask_node,
        "log-sum-exp": site.lse,
        "output": site.output,
    }
    steps = {
        "query": site.query_steps,
        "key": site.key_steps,
        "value": site.value_steps,
        "output": site.output_steps,
    }
    return {
        role: dialect.describe(node) + _steps(steps.get(role, ()))
        for role, node in roles.items()
        if node is not None
    }


def _steps(steps: Sequence[tuple[Any, tuple[Any, ...]]]) -> str:
    """``" -> transpose(1, 2) -> reshape(2, 8)"``: how an operand becomes ``[B, H, T, D]``."""
    return "".join(
        f" -> {function if isinstance(function, str) else _name(function)}"
        f"({', '.join(map(_shown, arguments))})"
        for function, arguments in steps
    )


def _name(function: Any) -> str:
    return str(getattr(function, "__name__", function))


def _normal_form(mask: Mask | Refusal) -> dict[str, Any]:
    """The fields of a proven mask that differ from their defaults; empty when nothing is proven."""
    if isinstance(mask, Refusal):
        return {}
    form: dict[str, Any] = {"causal": mask.causal}
    for field in dataclasses.fields(mask):
        value = getattr(mask, field.name)
        if field.name != "causal" and value != field.default:
            form[field.name] = _plain(value)
    return form


def _checks(decision: Decision) -> list[dict[str, str]]:
    """Every check in order: passed, refused with its reason, or not reached."""
    rows = [
        {"check": name, "outcome": "passed" if refusal is None else "refused"} | _why(refusal)
        for name, refusal in decision.checks
    ]
    asked = len(rows)
    rows += [{"check": name, "outcome": "not reached"} for name in CHECKS[asked:]]
    if decision.refusal is not None and all(row["outcome"] != "refused" for row in rows):
        rows.append({"check": "other calls of its code", "outcome": "refused"})
        rows[-1] |= _why(decision.refusal)
    return rows


def _why(refusal: Refusal | None) -> dict[str, str]:
    return {} if refusal is None else {"reason": refusal.code, "text": refusal.text}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return value if isinstance(value, (bool, int, float)) else _shown(value)


def _shown(value: Any) -> str:
    return dialect.describe(value) if isinstance(value, fx.Node) else str(value)
