"""The report as Markdown, for a pull request or a file."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

from nsa_compile.report import verified
from nsa_compile.report.costs import METRICS, costs, prediction
from nsa_compile.report.measured import MeasuredAt, headings, sentence
from nsa_compile.report.rows import Row, rows
from nsa_compile.report.summary import dense_at_this_length, kept_groups, summary

if TYPE_CHECKING:
    from nsa_compile.report.rewrite_report import RewriteReport
_HEADINGS = ("layer", "attention", "mask", "length", "FLOPs", "verdict")


def markdown(report: RewriteReport) -> str:
    """Heading, summary, table, then the reasons and failures as lists."""
    lines = [f"### nsa_compile: {_escape(report.model)}", "", f"{_sentence(summary(report))}", ""]
    if report.sites:
        lines += [_line(_HEADINGS), _line(["---"] * len(_HEADINGS))]
        lines += [_line(_cells(row)) for row in rows(report.sites)]
        lines.append("")
    note = dense_at_this_length(report)
    if note:
        lines += [_sentence(note), ""]
    groups = kept_groups(report)
    for group in groups:
        hint = f" *{_escape(group.hint)}*" if group.hint else ""
        lines.append(f"- `{group.reason}` ({group.count}): {_escape(group.text)}.{hint}")
    if groups:
        lines.append("")
    rows_of_costs = costs(report.sites)
    if rows_of_costs:
        headings = ("tokens", *METRICS.values())
        lines += [_line(headings), _line(["---"] * len(headings))]
        lines += [_line(row.texts()) for row in rows_of_costs]
        lines += ["", prediction(report.sites), ""]
    if report.bench is not None:
        lines += _bench(report, report.bench)
    if report.verification is not None:
        lines += _verified(report.verification)
    if report.failures:
        lines += [f"- **failure**: {_escape(failure)}" for failure in report.failures] + [""]
    return "\n".join(lines)


def _bench(report: RewriteReport, bench: dict[str, Any]) -> list[str]:
    """The times measured on this device, and what was not measured."""
    found = [MeasuredAt(**row) for row in bench["rows"]]
    lines = []
    if found:
        names = headings(found)
        lines += [_line(names), _line(["---"] * len(names))]
        lines += [_line(row.texts()) for row in found] + [""]
    lines += [sentence(bench, len(report.sites)), ""]
    lines += [f"- not measured: {_escape(text)}" for text in bench["left_out"]]
    return lines + [""] * bool(bench["left_out"])


def _verified(found: dict[str, Any]) -> list[str]:
    """How far the converted model is from the dense one."""
    lines = [_line(verified.HEADINGS), _line(["---"] * len(verified.HEADINGS))]
    for layer in found["layers"]:
        name, *numbers = verified.cells(layer)
        lines.append(_line([f"`{name}`", *numbers]))
    lines = lines if found["layers"] else []
    return [*lines, "", *(f"- {_escape(text)}" for text in verified.sentences(found)), ""]


def _cells(row: Row) -> list[str]:
    count = f" ({row.count})" if row.count > 1 else ""
    origin = f"<br>{_escape(row.origin)}" if row.origin else ""
    layer = f"`{row.layer}`{count}{origin}"
    flops = f"{row.flops} ({row.saving})" if row.saving else row.flops
    flops += f"<br>{row.time} measured" if row.time else ""
    verdict = f"{row.verdict}: `{row.reason}`" if row.reason else row.verdict
    return [layer, row.attention, f"`{row.mask}`", row.length, flops, verdict]


def _line(cells: tuple[str, ...] | list[str]) -> str:
    return "| " + " | ".join(_one_line(cell).replace("|", "\\|") for cell in cells) + " |"


def _escape(text: str) -> str:
    """One line that shows as it is: ``<T>`` is no HTML."""
    return html.escape(_one_line(text), quote=False)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."
