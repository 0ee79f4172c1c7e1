"""Time against length, log-log: dense and sparse, with the break-even marked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nsa_compile.bench.advice import break_evens
from nsa_compile.bench.rows import Row
from nsa_compile.bench.settings import Settings


class PlotError(RuntimeError):
    """The plot cannot be drawn or written here."""


def plot(settings: Settings, hardware: str, rows: list[Row], path: Path) -> None:
    """Write one panel for each head count; the format follows the suffix of ``path``.

    Raises:
        PlotError: matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotError(
            "--plot needs matplotlib, which is not installed: pip install 'nsa-compile[plot]'"
        ) from error
    figure = Figure(figsize=(5.2 * len(settings.heads), 4.6), layout="constrained")
    panels = figure.subplots(1, len(settings.heads), squeeze=False)[0]
    for panel, heads in zip(panels, settings.heads, strict=True):
        _draw(panel, heads, [row for row in rows if (row.q_heads, row.kv_heads) == heads])
    what = "forward and backward" if settings.backward else "forward"
    figure.suptitle(f"Attention, {what}: {hardware}, {settings.dtype}, D={settings.dim}")
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise PlotError(f"--plot {path}: cannot be written: {error}") from error


def _draw(panel: Any, heads: tuple[int, int], rows: list[Row]) -> None:
    panel.set(title=f"{heads[0]} query / {heads[1]} kv heads", xscale="log", yscale="log")
    panel.set(xlabel="tokens", ylabel="milliseconds")
    lengths = sorted({row.length for row in rows})
    dense = {row.length: row.dense.step for row in rows}
    panel.plot(lengths, [dense[n] for n in lengths], "k-o", label="dense SDPA")
    for name in dict.fromkeys(row.path for row in rows):
        sparse = {row.length: row.sparse.step for row in rows if row.path == name}
        panel.plot(list(sparse), list(sparse.values()), "-o", label=name)
    for found in break_evens(rows):
        if found.length is not None and found.measured:
            label = f"{found.path}: pays from {found.length:,}"
            panel.axvline(found.length, linestyle=":", color="grey", label=label)
    panel.set_xticks(lengths, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in lengths])
    panel.minorticks_off()
    panel.legend()
