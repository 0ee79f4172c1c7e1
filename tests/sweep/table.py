"""The sweep's rows as a table of architectures, totals and problems."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tests.sweep.trial import Row

_NOT_RUN = ("unbuildable", "upstream")


def show(rows: list[Row], console: Console) -> None:
    """Print one line an architecture, what went wrong, and the totals."""
    by_name: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_name[row.architecture].append(row)
    table = Table(box=box.SIMPLE, padding=(0, 1))
    for header in ("architecture", "cases", "attention", "converted", "kept", "missed", "problem"):
        numeric = header in ("cases", "attention", "converted", "missed")
        table.add_column(header, justify="right" if numeric else "left", no_wrap=header != "kept")
    for name in sorted(by_name):
        table.add_row(*_cells(name, by_name[name]))
    console.print(table)
    _problems(rows, console)
    console.print(totals(rows))


def _cells(name: str, rows: list[Row]) -> list[Text]:
    kept = sum((Counter(row.kept) for row in rows), Counter())
    problems = Counter(row.problem for row in rows if row.problem)
    missed = sum(row.missed for row in rows)
    failed = any(row.failed for row in rows)
    return [
        Text(name),
        Text(str(len(rows))),
        Text(str(sum(row.attention for row in rows))),
        Text(str(sum(row.converted for row in rows))),
        Text(_counts(kept)),
        Text(str(missed or ""), style="yellow"),
        Text(_counts(problems), style="red" if failed else "dim"),
    ]


def _problems(rows: Iterable[Row], console: Console) -> None:
    """One line for each distinct problem of an architecture."""
    seen: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for row in rows:
        if row.problem:
            seen[row.architecture, row.problem, row.detail].append(row.case)
    for (name, problem, detail), cases in sorted(seen.items()):
        console.print(Text(f"{name}: {problem} ({len(cases)}: {cases[0]}): {detail}"))


def totals(rows: list[Row]) -> str:
    """``"1240 cases of 160 architectures: 3000 attention, 2500 converted, ..."``."""
    ran = [row for row in rows if row.problem not in _NOT_RUN]
    kept = sum((Counter(row.kept) for row in ran), Counter())
    problems = Counter(row.problem for row in rows if row.problem)
    names = {row.architecture for row in ran}
    return (
        f"{len(ran)} cases of {len(names)} architectures: "
        f"{sum(row.attention for row in ran)} attention layers, "
        f"{sum(row.converted for row in ran)} converted, {sum(kept.values())} kept "
        f"({_counts(kept)}), {sum(row.missed for row in ran)} missed, "
        f"{problems['mismatch']} mismatches, {problems['crash']} crashes; "
        f"not run: {_counts(Counter({p: problems[p] for p in _NOT_RUN if problems[p]})) or 'none'}"
    )


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counter.most_common())
