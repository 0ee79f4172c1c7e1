"""The report as a rich table, on a console or as text."""

from __future__ import annotations

import io
import shutil
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from nsa_compile.report.costs import METRICS, costs, prediction
from nsa_compile.report.rows import Row, rows
from nsa_compile.report.summary import dense_at_this_length, kept_groups, summary

if TYPE_CHECKING:
    from nsa_compile.report.rewrite_report import RewriteReport

_COLUMNS = ("layer", "attention", "FLOPs", "verdict")
_WIDTHS = (100, 160)  # least and most columns of the text form


def table(report: RewriteReport) -> RenderableType:
    """Summary line, table, then each reason with its hint and each failure."""
    parts: list[RenderableType] = [
        Text.assemble((report.model, "bold"), ": ", (summary(report), _tone(report)))
    ]
    if report.sites:
        parts.append(_grid(report))
    note = dense_at_this_length(report)
    if note:
        parts.append(Text(f"note: {note}", "dim"))
    predicted = _costs(report) if report.converted else []
    if predicted:
        parts += [*([Text("")] if note else []), *predicted]
        parts += [Text("")] if report.skipped or report.failures else []
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
    return Group(*parts)


def table_text(report: RewriteReport) -> str:
    """:func:`table` without colours, as wide as the terminal within reason."""
    least, most = _WIDTHS
    width = min(max(shutil.get_terminal_size((least, 24)).columns, least), most)
    out = io.StringIO()
    Console(file=out, width=width, no_color=True, highlight=False, legacy_windows=False).print(
        table(report)
    )
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())


def _grid(report: RewriteReport) -> Table:
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in _COLUMNS:
        narrow = heading in ("FLOPs", "verdict")
        grid.add_column(heading, overflow="fold", no_wrap=narrow)
    for row in rows(report.sites):
        grid.add_row(*_cells(row))
    return grid


def _costs(report: RewriteReport) -> list[RenderableType]:
    """All layers together at other lengths, and what is predicted about it."""
    rows_of_costs = costs(report.sites)
    if not rows_of_costs:
        return []
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for heading in ("tokens", *METRICS.values()):
        grid.add_column(heading, justify="right" if heading == "tokens" else "left")
    for row in rows_of_costs:
        grid.add_row(*row.texts())
    return [grid, Text(""), Text(prediction(report.sites), "dim")]


def _cells(row: Row) -> list[Text]:
    """Two lines a cell: four narrow columns stay readable at 80 characters."""
    layer = Text(row.layer)
    if row.count > 1:
        layer.append(f" ({row.count})", "bold")
    if row.origin:
        layer.append(f"\n{row.origin}", "dim")
    attention = Text.assemble(row.attention, (f"\n{row.mask}, T {row.length}", "dim"))
    flops = Text.assemble(row.flops, (f"\n{row.saving}" if row.saving else "", "dim"))
    verdict = Text(row.verdict, "green" if row.converted else "yellow")
    if row.reason:
        verdict.append(f"\n{row.reason}", "dim")
    return [layer, attention, flops, verdict]


def _tone(report: RewriteReport) -> str:
    if report.failures:
        return "red"
    return "green" if report.sites and not report.skipped else "yellow"
