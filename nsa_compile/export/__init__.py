"""Exported programs: convert one, and save it with a note of what loads it."""

from __future__ import annotations

from nsa_compile.export.conversion import ConvertError, convert
from nsa_compile.export.file import imports, save

__all__ = ["ConvertError", "convert", "imports", "save"]
