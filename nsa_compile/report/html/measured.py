"""What was measured, of the page: times of --bench, errors of --verify."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nsa_compile.report.html.chart import Curves, chart, legend
from nsa_compile.report.html.markup import Markup, table, tag
from nsa_compile.report.measured import MeasuredAt, headings, sentence
from nsa_compile.report.units import milliseconds
from nsa_compile.report.verified import HEADINGS, cells, sentences

if TYPE_CHECKING:
    from nsa_compile.report.rewrite_report import RewriteReport


def bench(report: RewriteReport) -> list[Markup]:
    """Times on this device beside predicted FLOPs, and what was not measured."""
    if report.bench is None:
        return []
    found = [MeasuredAt(**row) for row in report.bench["rows"]]
    parts = [tag("h2", "Measured"), tag("p", sentence(report.bench, len(report.sites)))]
    if len(found) > 1:
        points = [(row.length, row.dense_forward_ms, row.sparse_forward_ms) for row in found]
        marked = report.bench["break_even"] if report.bench["break_even_measured"] else None
        curves = Curves("forward, measured", points, milliseconds, marked, "measured break-even")
        parts += [legend("sparse"), tag("div", chart(curves), class_="charts")]
    if found:
        rows = [row.texts() for row in found]
        parts.append(tag("div", table(headings(found), rows), class_="wide numbers"))
    if report.bench["left_out"]:
        items = (tag("li", f"not measured: {text}") for text in report.bench["left_out"])
        parts.append(tag("ul", *items))
    return parts


def verified(report: RewriteReport) -> list[Markup]:
    """How far the converted model is from the dense one, layer by layer and end to end."""
    if report.verification is None:
        return []
    rows = [cells(layer) for layer in report.verification["layers"]]
    return [
        tag("h2", "Verified"),
        tag("ul", *(tag("li", text) for text in sentences(report.verification))),
        tag("div", table(HEADINGS, rows), class_="wide"),
    ]
