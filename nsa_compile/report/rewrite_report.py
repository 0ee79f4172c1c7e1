"""RewriteReport: the verdicts on one model, and the faces that show them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from nsa_compile.passes.site import SiteRecord
from nsa_compile.report.costs import break_even, costs
from nsa_compile.report.html import html
from nsa_compile.report.markdown import markdown
from nsa_compile.report.merge import compile_ids, merged
from nsa_compile.report.table import table, table_text

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

SCHEMA_VERSION = 1


@dataclass
class RewriteReport:
    """What nsa_compile did to each attention layer of a model.

    Print it for a table, or use ``to_json``, ``to_markdown`` and ``to_html``. The order of
    ``sites`` is that of the graphs and does not depend on the run.

    Attributes:
        model: class name of the model, or what the caller called it.
        sites: one record for each attention site.
        failures: what could not be captured or converted at all, as text.
        bench: what ``nsa-convert --bench`` measured (docs/report.md), else None.
        verification: what ``nsa-convert --verify`` measured (docs/verify.md), else None.
    """

    model: str
    sites: list[SiteRecord] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    bench: dict[str, Any] | None = None
    verification: dict[str, Any] | None = None

    @classmethod
    def merge(
        cls, model: str, records: Iterable[SiteRecord], failures: Iterable[str] = ()
    ) -> RewriteReport:
        """One report over the records of many graphs, in the order they were compiled.

        A site compiled again with the same verdict is one row that lists its compile ids and has
        the latest shapes. Different verdicts and different frames stay separate rows.
        """
        return cls(model, merged(records), list(dict.fromkeys(failures)))

    @property
    def converted(self) -> list[SiteRecord]:
        """The sites that run Native Sparse Attention."""
        return [site for site in self.sites if site.decision == "converted"]

    @property
    def skipped(self) -> list[SiteRecord]:
        """The sites that were kept dense; each has a ``reason``."""
        return [site for site in self.sites if site.decision != "converted"]

    def to_dict(self) -> dict[str, Any]:
        """The JSON contract, schema version 1 (docs/report.md), as plain values."""
        return {
            "schema_version": SCHEMA_VERSION,
            "model": self.model,
            "torch": torch.__version__,
            "sites": [_site(record) for record in self.sites],
            "failures": list(self.failures),
            "costs": [dataclasses.asdict(row) for row in costs(self.sites)],
            "predicted_break_even": break_even(self.sites),
            "bench": self.bench,
            "verification": self.verification,
        }

    def to_json(self) -> str:
        """:meth:`to_dict` as indented JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def to_markdown(self) -> str:
        """A section for a pull request: summary, table, reasons."""
        return markdown(self)

    def to_html(self) -> str:
        """One self-contained HTML file: picture of the layers, their stories, cost charts."""
        return html(self)

    def __str__(self) -> str:
        return table_text(self)

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        yield table(self)


def _site(record: SiteRecord) -> dict[str, Any]:
    values = dataclasses.asdict(record)
    extra, compile_id = values.pop("extra"), values.pop("compile_id")
    return {**values, "compile_ids": compile_ids(compile_id), **extra}
