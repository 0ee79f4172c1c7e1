"""nsa-convert: which attention layers of a model would be converted, without weights or a GPU."""

from __future__ import annotations

from nsa_compile.cli.command import main

__all__ = ["main"]
