"""What nsa_compile.verify is made of: runs, measures, suggestion, report."""

from __future__ import annotations

from nsa_compile.verification.report import EndToEnd, LayerCheck, Suggestion, VerifyReport

__all__ = ["EndToEnd", "LayerCheck", "Suggestion", "VerifyReport"]
