"""A benchmark as data: written as JSON, read back to be shown again."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from nsa_compile.bench.advice import break_evens
from nsa_compile.bench.rows import Cost, Row
from nsa_compile.bench.settings import Settings
from nsa_compile.bench.timing import Timing

SCHEMA_VERSION = 2


class DocumentError(ValueError):
    """A file that is no benchmark of this schema version."""


def hardware(device: str) -> str:
    """The name of the device."""
    if device == "cuda":
        return str(torch.cuda.get_device_name())
    threads = torch.get_num_threads()
    return f"{platform.processor() or platform.machine()}, {threads} thread{'s' * (threads > 1)}"


def document(settings: Settings, rows: list[Row]) -> dict[str, Any]:
    """Settings, hardware, versions and rows; times in milliseconds, memory in bytes."""
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    if settings.device == "cuda":
        import triton

        versions["triton"] = triton.__version__
    return {
        "schema_version": SCHEMA_VERSION,
        "hardware": hardware(settings.device),
        "versions": versions,
        "settings": asdict(settings),
        "rows": [
            asdict(row)
            | {
                "forward_ratio": row.forward_ratio,
                "backward_ratio": row.backward_ratio,
                "memory_ratio": row.memory_ratio,
            }
            for row in rows
        ],
        "break_even": [asdict(found) for found in break_evens(rows)],
    }


def load(path: Path) -> tuple[Settings, str, list[Row]]:
    """(settings, hardware, rows) of a file that ``--json`` wrote.

    Raises:
        DocumentError: not JSON, or of another schema version.
        OSError: the file cannot be read.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        version = data["schema_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise DocumentError(f"{path}: expected a file that --json wrote, got {error}") from error
    if version != SCHEMA_VERSION:
        raise DocumentError(f"{path}: expected schema version {SCHEMA_VERSION}, got {version}")
    given = data["settings"]
    given["heads"] = tuple((q, kv) for q, kv in given["heads"])
    for name in ("lengths", "paths"):
        given[name] = tuple(given[name])
    return Settings(**given), data["hardware"], [_row(row) for row in data["rows"]]


def _row(data: dict[str, Any]) -> Row:
    costs: dict[str, Any] = {name: _cost(data[name]) for name in ("dense", "converted", "sparse")}
    stages = {name: Timing(**timing) for name, timing in data["stages"].items()}
    plain = ("q_heads", "kv_heads", "length", "path", "dense_backend", "is_dense")
    return Row(**{name: data[name] for name in plain}, **costs, stages=stages)


def _cost(data: dict[str, Any]) -> Cost:
    backward = data["backward"] and Timing(**data["backward"])
    return Cost(Timing(**data["forward"]), backward, data["peak_bytes"])
