"""Times that ``nsa-convert --bench`` measured, beside the FLOPs that were predicted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from nsa_compile.passes.site import SiteRecord
from nsa_compile.report.units import amount, interval, milliseconds

_PATHS = ("dense", "converted", "sparse")
Row = dict[str, Any]  # of a site's "measured": times in milliseconds as [median, low, high]


@dataclass(frozen=True)
class MeasuredAt:
    """The layers that were measured at one length: predicted FLOPs and median times, summed.

    ``sparse`` is sparse attention where ``converted`` is still dense (``dense_len``); a layer that
    is kept counts as dense in all of them. Backward is None where it was not measured.
    """

    length: int
    layers: int
    is_dense: bool
    flops_dense: int
    flops_sparse: int
    dense_forward_ms: float
    converted_forward_ms: float
    sparse_forward_ms: float
    dense_backward_ms: float | None
    converted_backward_ms: float | None
    sparse_backward_ms: float | None

    @property
    def ratio(self) -> float:
        """Time of sparse over that of dense, backward included where it was measured."""
        sparse = self.sparse_forward_ms + (self.sparse_backward_ms or 0)
        return sparse / (self.dense_forward_ms + (self.dense_backward_ms or 0))

    def texts(self) -> list[str]:
        """``["65536", "35.2T -> 8.65T", "412 -> 121 ms, 3.4x faster"]``, then backward."""
        flops = " -> ".join(dict.fromkeys((amount(self.flops_dense), amount(self.flops_sparse))))
        times = (self.dense_forward_ms, self.converted_forward_ms, self.sparse_forward_ms)
        cells = [f"{self.length}", flops, change(*times, is_dense=self.is_dense)]
        if self.dense_backward_ms is not None:
            assert self.converted_backward_ms is not None
            assert self.sparse_backward_ms is not None
            backward = (
                self.dense_backward_ms, self.converted_backward_ms, self.sparse_backward_ms,
            )  # fmt: skip
            cells.append(change(*backward, is_dense=self.is_dense))
        return cells


def headings(rows: list[MeasuredAt]) -> list[str]:
    """Those of :meth:`MeasuredAt.texts`."""
    names = ["tokens", "FLOPs, predicted", "forward, measured"]
    return names + ["backward, measured"] * any(row.dense_backward_ms is not None for row in rows)


def totals(sites: Iterable[SiteRecord]) -> list[MeasuredAt]:
    """One row a length, ascending, over the layers that were measured there."""
    by_length: dict[int, list[tuple[SiteRecord, Row]]] = {}
    for site in sites:
        for row in site.extra.get("measured", []):
            by_length.setdefault(row["length"], []).append((site, row))
    return [_together(length, by_length[length]) for length in sorted(by_length)]


def sentence(bench: dict[str, Any], layers: int) -> str:
    """What stands under a table of measured times."""
    rows = bench["rows"]
    if not rows:
        return f"Nothing was measured on {bench['hardware']}."
    counts = sorted({row["layers"] for row in rows})
    which = "all layers" if counts == [layers] else f"{counts[-1]} of {layers} layers"
    text = f"Measured on {bench['hardware']}: {which} together, medians; FLOPs are predicted"
    if len(rows) > 1 and any(row["flops_sparse"] != row["flops_dense"] for row in rows):
        text += f"; {_break_even(bench)}"
    return f"{text}."


def site_times(site: SiteRecord) -> dict[str, object]:
    """``{"at 65536 tokens": "412 -> 121 ms, 3.4x faster"}`` of one layer."""
    found: dict[str, object] = {}
    for row in site.extra.get("measured", []):
        parts = [_site_change(row, "forward")]
        if row["dense_backward_ms"] is not None:
            parts.append(f"backward {_site_change(row, 'backward')}")
        found[f"at {row['length']} tokens"] = "; ".join(parts)
    return found


def own_time(site: SiteRecord) -> str:
    """``"412 -> 121 ms"``: forward at the layer's own length, empty where not measured."""
    for row in site.extra.get("measured", []):
        if row["length"] == site.kv_len:
            dense, converted = row["dense_forward_ms"], row["converted_forward_ms"]
            if converted is None or row["is_dense"]:
                return milliseconds(dense[0])
            return interval(dense[0], converted[0])
    return ""


def change(dense: float, converted: float, sparse: float, *, is_dense: bool) -> str:
    """``"412 -> 121 ms, 3.4x faster"``; at a length that is still dense what sparse takes."""
    if is_dense:
        return f"{milliseconds(dense)}, dense; sparse {milliseconds(sparse)}"
    if dense >= converted:
        factor = f"{dense / converted:.1f}x faster"
    else:
        factor = f"{converted / dense:.1f}x slower"
    return f"{interval(dense, converted)}, {factor}"


def _site_change(row: Row, part: str) -> str:
    dense, converted, sparse = (row[f"{path}_{part}_ms"] for path in _PATHS)
    if converted is None:
        return milliseconds(dense[0])
    return change(dense[0], converted[0], sparse[0], is_dense=row["is_dense"])


def _break_even(bench: dict[str, Any]) -> str:
    if bench["break_even"] is None:
        return "sparse attention is not faster at the longest of these lengths"
    if bench["break_even_measured"]:
        return f"measured break-even: {bench['break_even']} tokens"
    return f"sparse attention is faster from {bench['break_even']} tokens on, the shortest here"


def _together(length: int, found: list[tuple[SiteRecord, Row]]) -> MeasuredAt:
    flops = [_flops(site, length) for site, _ in found]
    converted = [row["is_dense"] for _, row in found if row["is_dense"] is not None]
    times: dict[str, Any] = {}
    for part in ("forward", "backward"):
        for path in _PATHS:
            values = [_median(row, path, part) for _, row in found]
            times[f"{path}_{part}_ms"] = _sum(values)
    return MeasuredAt(
        length=length,
        layers=len(found),
        is_dense=bool(converted) and all(converted),
        flops_dense=sum(dense for dense, _ in flops),
        flops_sparse=sum(sparse for _, sparse in flops),
        **times,
    )


def _median(row: Row, path: str, part: str) -> float | None:
    found: list[float] | None = row[f"{path}_{part}_ms"] or row[f"dense_{part}_ms"]
    return None if found is None else found[0]


def _sum(values: list[float | None]) -> float | None:
    return None if None in values else sum(value for value in values if value is not None)


def _flops(site: SiteRecord, length: int) -> tuple[int, int]:
    """Predicted FLOPs at ``length``, dense and as converted."""
    dense: Any = site.flops_dense
    sparse: Any = site.flops_sparse
    if length != site.kv_len or isinstance(dense, str):
        (row,) = [row for row in site.extra["costs"] if row["length"] == length]
        dense, sparse = row["flops_dense"], row["flops_sparse"]
    return dense, dense if sparse is None else sparse
