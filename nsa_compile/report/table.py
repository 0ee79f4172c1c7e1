"""The report as a rich table, on a console or as text."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from nsa_compile.report.costs import METRICS, costs, prediction
from nsa_compile.report.measured import MeasuredAt, headings, sentence
from nsa_compile.report.rows import Row, rows
from nsa_compile.report.summary import dense_at_this_length, kept_groups, summary

if TYPE_CHECKING:
    from nsa_compile.report.rewrite_report import RewriteReport

_COLUMNS = ("layer", "attention", "FLOPs", "verdict")
_WIDTHS = (100, 160)  # least and most columns of the text form


def table(report: RewriteReport) -> RenderableType:
    """Summary line, layers, why some were kept, what failed; then costs and measured times."""
    title = Text.assemble((report.model, "bold"), ": ", (summary(report), _tone(report)))
    paragraphs: list[list[RenderableType]] = [[title], _layers(report), _notes(report)]
    if report.converted:
        paragraphs += _costs(report)
    if report.bench is not None:
        paragraphs += _bench(report, report.bench)
    parts: list[RenderableType] = []
    for paragraph in filter(None, paragraphs):
        parts += [Text(""), *paragraph] if parts else paragraph
    return Group(*parts)


def table_text(report: RewriteReport) -> str:
    """:func:`table` without colours, as wide as the terminal within reason."""
    return as_text(table(report))


def as_text(shown: RenderableType) -> str:
    """``shown`` without colours, as wide as the terminal within reason."""
    least, most = _WIDTHS
    width = min(max(shutil.get_terminal_size((least, 24)).columns, least), most)
    out = io.StringIO()
    Console(file=out, width=width, no_color=True, highlight=False, legacy_windows=False).print(
        shown
    )
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())


def _layers(report: RewriteReport) -> list[RenderableType]:
    if not report.sites:
        return []
    grid = _grid(_COLUMNS)
    for column in grid.columns:
        column.overflow, column.no_wrap = "fold", column.header in ("FLOPs", "verdict")
    for row in rows(report.sites):
        grid.add_row(*_cells(row))
    return [grid]


def _notes(report: RewriteReport) -> list[RenderableType]:
    """What has to be said of the layers above."""
    note = dense_at_this_length(report)
    parts: list[RenderableType] = [Text(f"note: {note}", "dim")] if note else []
    for group in kept_groups(report):
        layers = "layer" if group.count == 1 else "layers"
        parts.append(
            Text.assemble(
                (f"{group.reason} ({group.count} {layers}): ", "bold yellow"),
                group.text,
                (f"\n    {group.hint}" if group.hint else "", "dim"),
            )
        )
    parts += [Text.assemble(("failure: ", "bold red"), failure) for failure in report.failures]
    return parts


def _costs(report: RewriteReport) -> list[list[RenderableType]]:
    """All layers together at other lengths, and what is predicted about it."""
    found = costs(report.sites)
    if not found:
        return []
    grid = _grid(("tokens", *METRICS.values()))
    for row in found:
        grid.add_row(*row.texts())
    return [[grid], [Text(prediction(report.sites), "dim")]]


def _bench(report: RewriteReport, bench: dict[str, Any]) -> list[list[RenderableType]]:
    """The times measured on this device, and what was not measured."""
    found = [MeasuredAt(**row) for row in bench["rows"]]
    grid = _grid(headings(found))
    for row in found:
        grid.add_row(*row.texts())
    notes = [Text(sentence(bench, len(report.sites)), "dim")]
    notes += [Text(f"not measured: {text}", "dim") for text in bench["left_out"]]
    return [[grid] if found else [], list(notes)]


def _grid(headings: Iterable[str]) -> Table:
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for heading in headings:
        grid.add_column(heading, justify="right" if heading == "tokens" else "left")
    return grid


def _cells(row: Row) -> list[Text]:
    """Two lines a cell: four narrow columns stay readable at 80 characters."""
    layer = Text(row.layer)
    if row.count > 1:
        layer.append(f" ({row.count})", "bold")
    if row.origin:
        layer.append(f"\n{row.origin}", "dim")
    attention = Text.assemble(row.attention, (f"\n{row.mask}, T {row.length}", "dim"))
    lines = [line for line in (row.saving, row.time and f"{row.time} measured") if line]
    flops = Text.assemble(row.flops, ("".join(f"\n{line}" for line in lines), "dim"))
    verdict = Text(row.verdict, "green" if row.converted else "yellow")
    if row.reason:
        verdict.append(f"\n{row.reason}", "dim")
    return [layer, attention, flops, verdict]


def _tone(report: RewriteReport) -> str:
    if report.failures:
        return "red"
    return "green" if report.sites and not report.skipped else "yellow"
