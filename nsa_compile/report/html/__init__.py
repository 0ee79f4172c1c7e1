"""The report as one self-contained HTML file."""

from __future__ import annotations

from nsa_compile.report.html.page import html

__all__ = ["html"]
