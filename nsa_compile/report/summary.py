"""The sentences around the table: how many layers were converted, and why others were not."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nsa_compile.passes.site import SiteRecord

if TYPE_CHECKING:
    from nsa_compile.report.rewrite_report import RewriteReport


@dataclass(frozen=True)
class KeptGroup:
    """Sites that were kept for the same reason; ``text`` is that of the first of them."""

    reason: str
    text: str
    hint: str
    count: int


def summary(report: RewriteReport) -> str:
    """``"10 of 12 attention layers converted; kept: 2 mask_not_understood"``."""
    sites = report.sites
    if not sites:
        if report.failures:
            return "no attention layer was seen: see the failures below"
        return "no attention found: there is nothing to convert"
    noun = "attention layer" if len(sites) == 1 else "attention layers"
    text = f"{len(report.converted)} of {len(sites)} {noun} converted"
    kept = Counter(str(site.reason) for site in report.skipped)
    if kept:
        counts = sorted(kept.items(), key=lambda item: (-item[1], item[0]))
        text += "; kept: " + ", ".join(f"{count} {reason}" for reason, count in counts)
    return text


def dense_at_this_length(report: RewriteReport) -> str | None:
    """A note when converted layers run dense because the sequence is short, or None."""
    short = [site for site in report.converted if runs_dense(site)]
    if not short:
        return None
    limits = sorted({site.config["dense_len"] for site in short if site.config})
    limit = " or ".join(map(str, limits))
    which = "the converted layers run" if len(short) == len(report.converted) else "some layers run"
    return f"{which} dense up to {limit} keys (dense_len); these inputs are not longer"


def kept_groups(report: RewriteReport) -> list[KeptGroup]:
    """Every reason text once, in the order of the sites; names of nodes and of the layer itself
    make no difference."""
    groups: dict[tuple[str, str], list[SiteRecord]] = {}
    for site in report.skipped:
        pattern = re.sub(r"%\w+", "%", site.reason_text or "")
        pattern = pattern.replace(site.module, "layer") if site.module else pattern
        groups.setdefault((str(site.reason), pattern), []).append(site)
    return [
        KeptGroup(reason, _example(group), group[0].hint or "", len(group))
        for (reason, _), group in groups.items()
    ]


def _example(group: list[SiteRecord]) -> str:
    """The text of the first; that it is an example is said where the others' names differ."""
    text = group[0].reason_text or ""
    alike = len({site.reason_text for site in group}) == 1
    return text if alike else f"{text}, and alike in the others"


def runs_dense(site: SiteRecord) -> bool:
    """Whether a converted site computes dense attention at the length it was seen with."""
    config = site.config or {}
    limit = 0 if config.get("merge") == "gate" else config.get("dense_len", 0)
    return isinstance(site.kv_len, int) and site.kv_len <= limit
