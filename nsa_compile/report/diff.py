"""What changed between two reports that were written as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nsa_compile.report.rewrite_report import SCHEMA_VERSION

_NEEDED = ("module", "ordinal", "decision", "reason", "mask", "flops_dense", "flops_sparse")
_COMPARED = (
    "decision", "reason", "reason_text", "mask", "modifiers", "spelling", "dtype", "batch",
    "q_heads", "kv_heads", "head_dim", "value_dim", "q_len", "kv_len", "scale", "config",
    "flops_dense", "flops_sparse", "source",
)  # fmt: skip


class ReportFileError(ValueError):
    """A file that is no report: says what was expected and what was found."""


def read_report(path: Path) -> dict[str, Any]:
    """The JSON object that ``nsa-convert --json`` or ``RewriteReport.to_json`` wrote.

    Raises:
        ReportFileError: the file cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportFileError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ReportFileError(f"{str(path)!r}: expected a report as JSON: {error}") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise ReportFileError(
            f"{path}: expected a report with schema_version {SCHEMA_VERSION}, got {version!r}"
        )
    sites = content.get("sites")
    if not isinstance(sites, list) or not all(map(_is_site, sites)):
        raise ReportFileError(f"{path}: expected 'sites' with {', '.join(_NEEDED)}")
    failures = content.get("failures", [])
    if not isinstance(failures, list) or not all(isinstance(each, str) for each in failures):
        raise ReportFileError(f"{path}: expected 'failures' to be texts")
    report: dict[str, Any] = content
    return report


def difference(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Layers that are new, gone or changed, in the order of the reports; then the failures."""
    return "\n".join(_lines(before, after))


def _lines(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    old, new = _by_layer(before["sites"]), _by_layer(after["sites"])
    counts = [_count(report) for report in (before, after)]
    yield f"{before.get('model')}: {counts[0]} -> {after.get('model')}: {counts[1]}"
    changed = 0
    for layer in dict.fromkeys([*old, *new]):
        lines = list(_layer(layer, old.get(layer), new.get(layer)))
        changed += bool(lines)
        yield from lines
    yield f"{changed} of {len({*old, *new})} layers differ"
    failures = [report.get("failures", []) for report in (before, after)]
    yield from (f"failure is gone: {text}" for text in failures[0] if text not in failures[1])
    yield from (f"new failure: {text}" for text in failures[1] if text not in failures[0])


def _layer(layer: str, old: dict[str, Any] | None, new: dict[str, Any] | None) -> Iterator[str]:
    if old is None and new is not None:
        yield f"+ {layer}: {_verdict(new)}"
    elif new is None and old is not None:
        yield f"- {layer}: {_verdict(old)}"
    elif old is not None and new is not None:
        fields = [name for name in _COMPARED if old.get(name) != new.get(name)]
        if fields:
            same = _verdict(old) == _verdict(new)
            yield f"~ {layer}: {_verdict(old)}" + ("" if same else f" -> {_verdict(new)}")
        for name in fields:
            yield f"    {name}: {_change(old.get(name), new.get(name))}"


def _change(old: object, new: object) -> str:
    """``"1 -> 2"``; of two objects only the entries that differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        return ", ".join(f"{key} {_text(old.get(key))} -> {_text(new.get(key))}" for key in keys)
    return f"{_text(old)} -> {_text(new)}"


def _by_layer(sites: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Sites by module path, their ordinal and, where a layer has several verdicts, their number."""
    layers: dict[str, dict[str, Any]] = {}
    for site in sites:
        name = site["module"] or "(no module path)"
        name = f"{name} #{site['ordinal'] + 1}" if site["ordinal"] else name
        key, count = name, 1
        while key in layers:
            count += 1
            key = f"{name} (verdict {count})"
        layers[key] = site
    return layers


def _is_site(site: object) -> bool:
    return (
        isinstance(site, dict)
        and all(name in site for name in _NEEDED)
        and isinstance(site["module"], str)
        and isinstance(site["ordinal"], int)
    )


def _count(report: dict[str, Any]) -> str:
    converted = sum(site["decision"] == "converted" for site in report["sites"])
    return f"{converted} of {len(report['sites'])} converted"


def _verdict(site: dict[str, Any]) -> str:
    return f"{site['decision']} ({site['reason']})" if site["reason"] else str(site["decision"])


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
