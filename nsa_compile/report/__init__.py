"""The report: which attention layers were converted, which were kept dense, and why."""

from __future__ import annotations

from nsa_compile.report.rewrite_report import SCHEMA_VERSION, RewriteReport

__all__ = ["SCHEMA_VERSION", "RewriteReport"]
