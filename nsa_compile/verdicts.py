"""Captured graphs -> report: every graph analysed and rewritten as the backend would do it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

from nsa_compile.capture import Capture
from nsa_compile.dynamo_text import describe
from nsa_compile.graphs import GraphFolder, GraphFolderError
from nsa_compile.nn.parameters import prepared_sites
from nsa_compile.passes.config import NSAConfig
from nsa_compile.passes.pipeline import analyse, rewrite
from nsa_compile.passes.projection import LENGTHS
from nsa_compile.passes.record import failed_record, record
from nsa_compile.passes.site import SiteRecord
from nsa_compile.report import RewriteReport


def verdicts(
    name: str,
    captured: Capture,
    config: NSAConfig,
    lengths: Sequence[int] = LENGTHS,
    folder: GraphFolder | None = None,
) -> RewriteReport:
    """The report on the model ``name``; rewrites the graphs of ``captured`` in place.

    Costs are predicted for sequences of ``lengths`` tokens. ``folder`` gets the graphs as files.

    Raises:
        GraphFolderError: a file in ``folder`` cannot be written.
    """
    records: list[SiteRecord] = []
    failures = list(captured.failures)
    for graph in captured.graphs:
        rows: list[SiteRecord] = []
        try:
            prepared = prepared_sites(graph.root)
            conversion = analyse(graph.gm, config, values=graph.values, prepared=prepared)
            rows = [
                record(decision, graph.compile_id, lengths) for decision in conversion.decisions
            ]
            around = folder.rewriting(graph, conversion) if folder else nullcontext()
            with around:
                if conversion.changes:
                    rewrite(graph.gm, conversion)
        except GraphFolderError:
            raise
        except Exception as error:  # ours, not the user's: reported as the backend reports it
            text = f"graph {graph.compile_id} stays dense: {describe(error)}"
            failures.append(text)
            rows = [failed_record(row, text) for row in rows]
        records += rows
    return RewriteReport.merge(name, records, failures)
