"""Tells torch's logs what the backend did: structured artifacts for tlparse, lines for TORCH_LOGS.

``TORCH_TRACE=folder`` makes torch write a trace, in which ``tlparse`` shows the report of every
graph. ``TORCH_LOGS=nsa_compile`` logs a summary of each graph, ``TORCH_LOGS=+nsa_compile`` the
whole story of each layer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from torch._logging import trace_structured

from nsa_compile.compilations import CompiledGraph
from nsa_compile.report import RewriteReport
from nsa_compile.report.story import story
from nsa_compile.report.summary import summary

log = logging.getLogger("nsa_compile")


def trace(entry: CompiledGraph) -> None:
    """Emit the report of one graph; costs nothing while nobody listens."""

    def report() -> RewriteReport:
        return RewriteReport.merge(entry.model, entry.records, entry.failures)

    _artifact("nsa_report", "json", lambda: report().to_json())
    _artifact("nsa_report_table", "string", lambda: str(report()))
    if log.isEnabledFor(logging.INFO):
        log.info("graph %s of %s: %s", entry.compile_id, entry.model, summary(report()))
        for failure in entry.failures:
            log.warning("%s", failure)
    if log.isEnabledFor(logging.DEBUG):
        for site in entry.records:
            log.debug("%s", story(site))


def _artifact(name: str, encoding: str, payload: Callable[[], str]) -> None:
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": encoding},
        payload_fn=payload,
    )
