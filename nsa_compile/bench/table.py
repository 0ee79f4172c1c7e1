"""The measurements as a table for a terminal."""

from __future__ import annotations

from rich.table import Table

from nsa_compile.bench.paths import STAGES
from nsa_compile.bench.rows import Row
from nsa_compile.bench.settings import Settings
from nsa_compile.bench.timing import Timing


def table(settings: Settings, hardware: str, rows: list[Row]) -> Table:
    """Milliseconds, spread and the ratio to dense; below 1 is faster, or smaller, than dense."""
    title = (
        f"{hardware}, {settings.dtype}, D={settings.dim}, n={settings.num_selected} blocks of "
        f"{settings.block}, window {settings.window}, tile {settings.query_tile}"
    )
    grid = Table(title=title)
    for name in ("heads", "T", "path"):
        grid.add_column(name)
    ran = [name for name in STAGES if any(name in row.stages for row in rows)]
    measured = ["dense fwd", "fwd", "ratio", *ran, "dense bwd", "bwd", "ratio", "memory"]
    for name in measured:
        grid.add_column(name, justify="right")
    for row in rows:
        stages = row.stages
        grid.add_row(
            f"{row.q_heads}/{row.kv_heads}", f"{row.length:,}",
            f"{row.path} (dense)" if row.is_dense else row.path,
            f"{row.dense.forward} {row.dense_backend}", str(row.converted.forward),
            _ratio(row.forward_ratio),
            *(f"{stages[name].median:.2f}" if name in stages else "" for name in ran),
            str(row.dense.backward or ""), str(row.converted.backward or ""),
            _ratio(row.backward_ratio), _ratio(row.memory_ratio),
        )  # fmt: skip
    return grid


def markdown(rows: list[Row]) -> str:
    """Medians in milliseconds and ratios, without the stages, as a table in Markdown."""
    names = (
        "heads",
        "T",
        "path",
        "dense fwd",
        "fwd",
        "ratio",
        "dense bwd",
        "bwd",
        "ratio",
        "memory",
    )
    lines = [_line(*names), _line(*["---"] * 3, *["---:"] * (len(names) - 3))]
    for row in rows:
        dense, found = row.dense, row.converted
        lines.append(
            _line(
                f"{row.q_heads}/{row.kv_heads}", f"{row.length:,}", row.path,
                _median(dense.forward), _median(found.forward), _ratio(row.forward_ratio),
                _median(dense.backward), _median(found.backward), _ratio(row.backward_ratio),
                _ratio(row.memory_ratio),
            )
        )  # fmt: skip
    return "\n".join(lines) + "\n"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _median(timing: Timing | None) -> str:
    return "" if timing is None else f"{timing.median:.2f}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
