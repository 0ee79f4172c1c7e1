"""One layer's part of the page: verdict, evidence and costs, folded until it is asked for."""

from __future__ import annotations

from typing import Any

from nsa_compile.passes.site import SiteRecord
from nsa_compile.report.costs import METRICS, costs
from nsa_compile.report.html.markup import Markup, joined, pairs, table, tag
from nsa_compile.report.measured import site_times
from nsa_compile.report.rows import rows
from nsa_compile.report.story import found, label, outcome


def detail(index: int, site: SiteRecord) -> Markup:
    """A ``details`` element with id ``site-N`` and the verdict as ``data-reason``."""
    verdict = site.reason or site.decision
    evidence: dict[str, Any] = site.extra.get("evidence", {})
    parts = [
        tag(
            "summary",
            label(site),
            " ",
            tag("span", verdict, class_=f"badge {site.decision}"),
            " ",
            tag("span", _line(site), class_="attention"),
        ),
        pairs(outcome(site)),
        tag("h4", "Found"),
        pairs(found(site)),
        tag("h4", f"Mask: {site.mask}"),
        pairs(evidence.get("mask", {})),
    ]
    if evidence:
        parts += [tag("h4", "Nodes"), pairs(evidence["nodes"]), tag("h4", "Checks")]
        parts.append(tag("ul", *map(_check, evidence["checks"]), class_="checks"))
    found_costs = costs([site])
    if found_costs:
        cells = [row.texts() for row in found_costs]
        parts.append(tag("h4", "Predicted cost"))
        parts.append(tag("div", table(["tokens", *METRICS.values()], cells), class_="wide numbers"))
    times = site_times(site)
    if times:
        parts += [tag("h4", "Measured on this device"), pairs(times)]
    return tag(
        "details", joined(*parts), id=f"site-{index}", data_reason=verdict, class_=site.decision
    )


def _line(site: SiteRecord) -> str:
    """What the table says of this layer, in a line."""
    (row,) = rows([site])
    parts = (row.attention, row.mask, f"T {row.length}", row.flops, row.saving, row.time)
    return ", ".join(part for part in parts if part)


def _check(row: dict[str, str]) -> Markup:
    why = f": {row['text']}" if "text" in row else ""
    text = f"{row['check']}: {row['outcome']}{why}"
    return tag("li", text, class_=row["outcome"].replace(" ", "-"))
