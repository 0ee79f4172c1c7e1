"""The page: summary, picture, filter, layers, costs; styles and script stand inside it."""

from __future__ import annotations

from collections import Counter
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import torch

from nsa_compile.report.costs import METRICS, CostAt, break_even, costs, prediction
from nsa_compile.report.html.chart import Curves, chart
from nsa_compile.report.html.detail import detail
from nsa_compile.report.html.markup import Markup, joined, table, tag
from nsa_compile.report.html.picture import picture
from nsa_compile.report.measured import MeasuredAt, headings, sentence
from nsa_compile.report.summary import dense_at_this_length, kept_groups, summary
from nsa_compile.report.units import amount, milliseconds

if TYPE_CHECKING:
    from nsa_compile.report.rewrite_report import RewriteReport

# Nothing may be loaded from anywhere: what the page needs stands in it.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


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
        *(tag("p", failure, class_="failure") for failure in report.failures),
    ]
    note = dense_at_this_length(report)
    if note:
        parts.append(tag("p", f"Note: {note}."))
    if report.sites:
        parts += [*_reasons(report), *_layers(report), *_costs(report)]
    if report.bench is not None:
        parts += _bench(report, report.bench)
    made = f"nsa_compile report, torch {torch.__version__}"
    return [tag("main", joined(*parts)), tag("footer", made)]


def _reasons(report: RewriteReport) -> list[Markup]:
    items = [
        tag("li", tag("b", f"{group.reason} ({group.count})"), f": {group.text}. ",
            tag("i", group.hint))
        for group in kept_groups(report)
    ]  # fmt: skip
    return [tag("h2", "Why layers were kept"), tag("ul", *items)] if items else []


def _layers(report: RewriteReport) -> list[Markup]:
    counts = Counter(site.reason or site.decision for site in report.sites)
    options = [tag("option", f"all layers ({len(report.sites)})", value="")]
    options += [
        tag("option", f"{verdict} ({counts[verdict]})", value=verdict) for verdict in sorted(counts)
    ]
    control = tag("label", "Show ", tag("select", *options, id="filter"))
    details = [detail(index, site) for index, site in enumerate(report.sites)]
    return [
        tag("h2", "Layers"),
        tag("p", control, class_="control"),
        tag("div", picture(report.model, report.sites), class_="scroll"),
        tag("div", joined(*details), id="layers"),
    ]


def _costs(report: RewriteReport) -> list[Markup]:
    rows = costs(report.sites)
    if not rows:
        return []
    return [
        tag("h2", "Predicted cost"),
        tag("p", prediction(report.sites)),
        *(_charts(report, rows) if len(rows) > 1 else ()),
        table(["tokens", *METRICS.values()], [row.texts() for row in rows]),
    ]


def _charts(report: RewriteReport, rows: list[CostAt]) -> list[Markup]:
    length = break_even(report.sites)
    drawn = []
    for metric, name in METRICS.items():
        title = f"{name} over tokens, predicted"
        points = [
            (row.length, getattr(row, f"{metric}_dense"), getattr(row, f"{metric}_sparse"))
            for row in rows
        ]
        drawn.append(chart(Curves(title, points, amount, length, "predicted break-even")))
    return [_legend("converted"), tag("div", *drawn, class_="charts")]


def _bench(report: RewriteReport, bench: dict[str, Any]) -> list[Markup]:
    """The times measured on this device, and what was not measured."""
    rows = [MeasuredAt(**row) for row in bench["rows"]]
    parts = [tag("h2", "Measured"), tag("p", sentence(bench, len(report.sites)))]
    if len(rows) > 1:
        points = [(row.length, row.dense_forward_ms, row.sparse_forward_ms) for row in rows]
        marked = bench["break_even"] if bench["break_even_measured"] else None
        title = "forward over tokens, measured"
        drawn = chart(Curves(title, points, milliseconds, marked, "measured break-even"))
        parts += [_legend("sparse"), tag("div", drawn, class_="charts")]
    if rows:
        parts.append(table(headings(rows), [row.texts() for row in rows]))
    if bench["left_out"]:
        items = (tag("li", f"not measured: {text}") for text in bench["left_out"])
        parts.append(tag("ul", *items))
    return parts


def _legend(sparse: str) -> Markup:
    """What the colours of the curves mean."""
    keys = (("dense", "key dense"), (sparse, "key sparse"))
    return tag("p", *(tag("span", name, class_=key) for name, key in keys))


def _file(name: str) -> str:
    return files("nsa_compile.report.html").joinpath(name).read_text(encoding="utf-8")
