"""What stands behind an option, as values: numbers, name=value pairs, reason codes, paths."""

from __future__ import annotations

import argparse
import json
import math
from ast import literal_eval
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from nsa_compile.passes.reasons import Reason


class UsageError(Exception):
    """A command line that cannot be understood."""


def positive(text: str) -> int:
    """A whole number from 1 up, small enough for a tensor's size."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if not 1 <= value < 1 << 40:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return value


def lengths(text: str) -> tuple[int, ...]:
    """``"8192,32768"`` -> the numbers, each once and ascending."""
    return tuple(sorted({positive(part) for part in text.split(",")}))


def tolerance(text: str) -> float:
    """A relative error: a number from 0 up."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number from 0 up, got {text!r}")
    return value


def pairs(flag: str, texts: Sequence[str]) -> dict[str, Any]:
    """``["window=64", "scorer=mean"]`` -> values by name."""
    values: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise UsageError(f"{flag} expects name=value, got {text!r}")
        values[name.strip()] = _value(value.strip())
    return values


def _value(text: str) -> Any:
    """JSON or a Python literal (``64``, ``true``, ``None``, ``{"*": {...}}``), else the text."""
    for parse in (json.loads, literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    return text


def reasons(flag: str, text: str | None) -> frozenset[str]:
    """``"dropout,excluded"`` -> the codes, all of which exist."""
    codes = {reason.code for reason in Reason}
    given = [] if text is None else [part.strip() for part in text.split(",")]
    for code in given:
        if code not in codes:
            near = get_close_matches(code, codes, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(codes))}"
            raise UsageError(f"{flag} expects reason codes, got {code!r}; {hint}")
    return frozenset(given)


def check_writable(flag: str, path: Path | None) -> None:
    """Refuse before the long work what could not be written after it."""
    if path is None:
        return
    _check_path(flag, path)
    if path.is_dir():
        raise UsageError(f"{flag} {path}: is a directory; expected a file to write")


def check_folder(flag: str, path: Path | None) -> None:
    """Refuse what is no folder and cannot become one."""
    if path is None:
        return
    _check_path(flag, path)
    if path.exists() and not path.is_dir():
        raise UsageError(f"{flag} {path}: is a file; expected a folder")


def _check_path(flag: str, path: Path) -> None:
    """``path`` exists, or the folder that would hold it."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        if not path.parent.is_dir():
            raise UsageError(f"{flag} {path}: the directory {path.parent} does not exist") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{flag} {str(path)!r} cannot be a path: {error}") from error


def write(flag: str, path: Path | None, text: str) -> None:
    """Write ``text`` to ``path``, if there is one."""
    if path is None:
        return
    try:
        path.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UsageError(f"{flag} {path}: cannot be written: {error.strerror or error}") from error
