"""Numbers as people read them."""

from __future__ import annotations

_UNITS = ("", "k", "M", "G", "T", "P", "E", "Z")


def amount(value: float | str) -> str:
    """``12.3G``; a formula (it stands in the JSON) is ``symbolic``."""
    if isinstance(value, str):
        return "symbolic"
    amount, unit = float(value), 0
    while amount >= 1000 and unit < len(_UNITS) - 1:
        amount, unit = amount / 1000, unit + 1
    return f"{amount:.3g}{_UNITS[unit]}"


def milliseconds(value: float) -> str:
    """``"0.0213 ms"``, ``"12.3 ms"``, ``"1.23 s"``."""
    return f"{value:.3g} ms" if value < 999.5 else f"{value / 1000:.3g} s"


def interval(before: float, after: float) -> str:
    """``"412 -> 121 ms"``."""
    first, last = milliseconds(before), milliseconds(after)
    return f"{first.split()[0] if first.split()[1] == last.split()[1] else first} -> {last}"


def number(value: float | None) -> str:
    """``"0.17"``; nothing for None."""
    return "" if value is None else f"{value:.2g}"


def share(value: float | None) -> str:
    """``99.95%``; 100% only where nothing is left out, nothing for None."""
    if value is None:
        return ""
    return "100%" if value >= 1 - 1e-6 else f"{min(value * 100, 99.99):.2f}%"
