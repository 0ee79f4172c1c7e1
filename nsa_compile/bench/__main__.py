"""``python -m nsa_compile.bench``: measure, print the table, say where sparse pays."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

from rich.console import Console

from nsa_compile.bench.advice import break_evens
from nsa_compile.bench.arguments import parse
from nsa_compile.bench.document import DocumentError, document, hardware, load
from nsa_compile.bench.plot import PlotError, plot
from nsa_compile.bench.rows import Row, run
from nsa_compile.bench.settings import Settings
from nsa_compile.bench.table import markdown, table


def _save(path: Path | None, settings: Settings, rows: list[Row]) -> None:
    """Write the document to ``path``, if there is one."""
    if path is not None:
        path.write_text(json.dumps(document(settings, rows), indent=1) + "\n")


def main(arguments: list[str] | None = None) -> int:
    given = parse(sys.argv[1:] if arguments is None else arguments)
    console = Console()
    if not console.is_terminal:
        console = Console(width=240)
    try:
        if given.load is not None:
            settings, device, rows = load(given.load)
        else:
            settings, device = given.settings, hardware(given.settings.device)
            rows = run(settings, console, functools.partial(_save, given.json, settings))
        console.print(table(settings, device, rows))
        for found in break_evens(rows):
            console.print(str(found), highlight=False)
        if given.markdown is not None:
            given.markdown.write_text(markdown(rows))
        if given.plot is not None:
            plot(settings, device, rows, given.plot)
    except (DocumentError, PlotError, OSError) as error:
        print(f"nsa_compile.bench: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
