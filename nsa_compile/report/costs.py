"""What all layers together would cost at several lengths: predicted by counting, not measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nsa_compile.passes.site import SiteRecord
from nsa_compile.report.units import amount

METRICS = {"flops": "FLOPs", "bytes": "bytes read and written", "memory": "attention memory"}


@dataclass(frozen=True)
class CostAt:
    """The cost at one length, dense and as converted; layers that are kept count as dense twice.

    FLOPs and bytes are those of all layers; memory is that of the layer that needs most.
    """

    length: int
    flops_dense: int
    flops_sparse: int
    bytes_dense: int
    bytes_sparse: int
    memory_dense: int
    memory_sparse: int

    def texts(self) -> list[str]:
        """``["65536", "35.2T -> 8.65T", ...]``: the length, then each of :data:`METRICS`."""
        return [f"{self.length}", *(self._change(metric) for metric in METRICS)]

    def _change(self, metric: str) -> str:
        dense, sparse = (getattr(self, f"{metric}_{kind}") for kind in ("dense", "sparse"))
        texts = dict.fromkeys((amount(dense), amount(sparse)))  # once where they look equal
        return " -> ".join(texts)


def projected(sites: list[SiteRecord]) -> list[SiteRecord]:
    """The sites whose cost at other lengths is known."""
    return [site for site in sites if site.extra.get("costs")]


def costs(sites: list[SiteRecord]) -> list[CostAt]:
    """One row a length, ascending; empty when no site's cost is known."""
    by_length: dict[int, list[dict[str, Any]]] = {}
    for site in projected(sites):
        for row in site.extra["costs"]:
            by_length.setdefault(row["length"], []).append(row)
    return [_together(length, by_length[length]) for length in sorted(by_length)]


def break_even(sites: list[SiteRecord]) -> int | None:
    """From this length on every converted layer is predicted to need fewer FLOPs; None if not."""
    lengths = [
        site.extra["predicted_break_even"]
        for site in projected(sites)
        if site.decision == "converted"
    ]
    return None if not lengths or None in lengths else max(lengths)


def prediction(sites: list[SiteRecord]) -> str:
    """The sentence under a table or chart of costs."""
    known, length = projected(sites), break_even(sites)
    which = "all layers" if len(known) == len(sites) else f"{len(known)} of {len(sites)} layers"
    text = f"Costs of {which} together, predicted from counts, not measured"
    if any(site.decision == "converted" for site in known):
        text += "; predicted break-even: "
        text += "none" if length is None else f"{length} tokens"
    return text + "."


def _together(length: int, rows: list[dict[str, Any]]) -> CostAt:
    values: dict[str, int] = {}
    for metric in METRICS:
        dense = [row[f"{metric}_dense"] for row in rows]
        sparse = [row[f"{metric}_sparse"] for row in rows]
        sparse = [d if s is None else s for d, s in zip(dense, sparse, strict=True)]
        combine = max if metric == "memory" else sum
        values |= {f"{metric}_dense": combine(dense), f"{metric}_sparse": combine(sparse)}
    return CostAt(length, **values)
