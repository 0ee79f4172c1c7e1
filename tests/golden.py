"""Files that hold what a test expects word for word; one command writes them all anew:

NSA_GOLDEN=write pytest tests/report tests/graphs tests/examples tests/passes/test_golden_graphs.py
"""

from __future__ import annotations

import os
from pathlib import Path


def check(path: Path, text: str) -> None:
    """``text`` is what ``path`` holds."""
    if os.environ.get("NSA_GOLDEN") == "write":
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def check_part(path: Path, part: str, text: str) -> None:
    """``text`` is what ``path`` holds in the place of ``part``, which stands there once."""
    if text == part:
        return
    held = path.read_text(encoding="utf-8")
    assert held.count(part) == 1, part
    if os.environ.get("NSA_GOLDEN") == "write":
        path.write_text(held.replace(part, text), encoding="utf-8")
        return
    assert text == part
