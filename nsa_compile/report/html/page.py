"""The page: summary, picture, filter, layers, costs; styles and script stand inside it."""

from __future__ import annotations

from collections import Counter
from importlib.resources import files
from typing import TYPE_CHECKING

import torch

from nsa_compile.report.costs import METRICS, CostAt, break_even, costs, prediction
from nsa_compile.report.html.chart import Curves, chart, legend
from nsa_compile.report.html.detail import detail
from nsa_compile.report.html.markup import Markup, joined, table, tag
from nsa_compile.report.html.measured import bench, verified
from nsa_compile.report.html.picture import picture
from nsa_compile.report.rows import Row, rows
from nsa_compile.report.summary import dense_at_this_length, kept_groups, summary
from nsa_compile.report.units import amount

if TYPE_CHECKING:
    from nsa_compile.report.rewrite_report import RewriteReport

# Nothing may be loaded from anywhere: what the page needs stands in it.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
# The verdict comes early: on a narrow screen the rest is scrolled to.
_HEADINGS = ("layer", "verdict", "attention", "mask", "length", "FLOPs")


def html(report: RewriteReport) -> str:
    """The whole file; it makes no request and follows the reader's light or dark setting."""
    title = f"nsa_compile: {report.model}"
    head = joined(
        Markup('<meta charset="utf-8">'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup('<link rel="icon" href="data:,">'),
        tag("title", title),
        tag("style", Markup(_file("style.css"))),
    )
    body = joined(*_body(report), tag("script", Markup(_file("script.js"))))
    page = tag("html", tag("head", head), "\n", tag("body", body), lang="en")
    return f"<!DOCTYPE html>\n{page}\n"


def _body(report: RewriteReport) -> list[Markup]:
    parts = [
        tag("h1", report.model),
        tag("p", f"{summary(report)}.", class_="summary"),
        *_bar(report),
        *(tag("p", failure, class_="failure") for failure in report.failures),
    ]
    note = dense_at_this_length(report)
    if note:
        parts.append(tag("p", f"Note: {note}."))
    if report.sites:
        parts += [*_reasons(report), *_layers(report), *_costs(report)]
    parts += [*bench(report), *verified(report)]
    if report.sites:
        details = (detail(index, site) for index, site in enumerate(report.sites))
        parts += [tag("h2", "Layer by layer"), tag("div", joined(*details), id="layers")]
    made = f"nsa_compile report, torch {torch.__version__}"
    return [tag("main", joined(*parts)), tag("footer", made)]


def _reasons(report: RewriteReport) -> list[Markup]:
    items = [
        tag("li", tag("b", f"{group.reason} ({group.count})"), f": {group.text}. ",
            tag("span", group.hint, class_="hint"))
        for group in kept_groups(report)
    ]  # fmt: skip
    return [tag("h2", "Why layers were kept"), tag("ul", *items, class_="reasons")] if items else []


def _bar(report: RewriteReport) -> list[Markup]:
    """How much of the model is converted, as a bar of as many parts as there are verdicts."""
    counts = Counter((site.decision, site.reason or "") for site in report.sites)
    parts = [
        tag("span", class_=decision, style=f"flex: {count}", title=f"{count} {reason or decision}")
        for (decision, reason), count in sorted(counts.items(), key=lambda item: item[0])
    ]
    return [tag("div", *parts, class_="bar", aria_hidden="true")] if parts else []


def _cells(row: Row) -> list[object]:
    """A layer's line, its class and place below its name."""
    count = f" ({row.count})" if row.count > 1 else ""
    layer = joined(tag("div", f"{row.layer}{count}"), tag("div", row.origin, class_="attention"))
    lines = (row.flops, row.saving, row.time and f"{row.time} measured")
    flops = joined(*(tag("div", line) for line in lines if line))
    badge = tag("span", row.reason or row.verdict, class_=f"badge {row.verdict}")
    return [layer, badge, row.attention, row.mask, row.length, flops]


def _layers(report: RewriteReport) -> list[Markup]:
    counts = Counter(site.reason or site.decision for site in report.sites)
    options = [tag("option", f"all layers ({len(report.sites)})", value="")]
    options += [
        tag("option", f"{verdict} ({counts[verdict]})", value=verdict) for verdict in sorted(counts)
    ]
    control = tag("label", "Show ", tag("select", *options, id="filter"), " ")
    keys = (tag("span", name, class_=f"key {name}") for name in ("converted", "kept"))
    return [
        tag("h2", "Layers"),
        tag("div", table(_HEADINGS, [_cells(row) for row in rows(report.sites)]), class_="wide"),
        tag("p", control, *keys, class_="control"),
        tag("div", picture(report.model, report.sites), class_="scroll"),
    ]


def _costs(report: RewriteReport) -> list[Markup]:
    found = costs(report.sites)
    if not found:
        return []
    return [
        tag("h2", "Predicted cost"),
        tag("p", prediction(report.sites)),
        *(_charts(report, found) if len(found) > 1 else ()),
        tag(
            "div",
            table(["tokens", *METRICS.values()], [row.texts() for row in found]),
            class_="wide numbers",
        ),
    ]


def _charts(report: RewriteReport, found: list[CostAt]) -> list[Markup]:
    length = break_even(report.sites)
    drawn = []
    for metric, name in METRICS.items():
        title = f"{name}, predicted"
        points = [
            (row.length, getattr(row, f"{metric}_dense"), getattr(row, f"{metric}_sparse"))
            for row in found
        ]
        drawn.append(chart(Curves(title, points, amount, length, "predicted break-even")))
    return [legend("converted"), tag("div", *drawn, class_="charts")]


def _file(name: str) -> str:
    return files("nsa_compile.report.html").joinpath(name).read_text(encoding="utf-8")
