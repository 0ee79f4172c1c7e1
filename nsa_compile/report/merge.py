"""Merge the records of many compiled graphs into one row a site."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from nsa_compile.passes.site import SiteRecord

_SEPARATOR = ", "


def merged(records: Iterable[SiteRecord]) -> list[SiteRecord]:
    """One row for each site, verdict and frame, ordered by frame, then by place in the graph.

    ``records`` come in the order they were compiled. Compile ids are ``"frame/recompile"``: the
    frame says which code was compiled, so only rows of one frame can be the same site again.
    """
    rows: dict[tuple[object, ...], SiteRecord] = {}
    places: dict[tuple[object, ...], int] = {}
    for record in records:
        site = (_frame(record), record.module, record.ordinal)
        places.setdefault(site, len(places))
        verdict = (*site, record.decision, record.reason)
        earlier = rows.get(verdict)
        rows[verdict] = record if earlier is None else _again(earlier, record)
    keys = sorted(rows, key=lambda verdict: (_order(str(verdict[0])), places[verdict[:3]]))
    return [rows[key] for key in keys]


def compile_ids(text: str) -> list[str]:
    """The compile ids that a (merged) record's ``compile_id`` names."""
    return text.split(_SEPARATOR) if text else []


def _again(earlier: SiteRecord, latest: SiteRecord) -> SiteRecord:
    """The latest record, with the compile ids of both."""
    ids = compile_ids(earlier.compile_id) + compile_ids(latest.compile_id)
    return dataclasses.replace(latest, compile_id=_SEPARATOR.join(dict.fromkeys(ids)))


def _frame(record: SiteRecord) -> str:
    return record.compile_id.rpartition("/")[0]


def _order(frame: str) -> tuple[int, str]:
    """Frames by number; others (no id at all) first, by name."""
    return (int(frame), "") if frame.isdigit() else (-1, frame)
