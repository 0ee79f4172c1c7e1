"""A chart of cost over sequence length, dense against converted, both axes logarithmic."""

from __future__ import annotations

import math

from nsa_compile.report.costs import METRICS, CostAt
from nsa_compile.report.html.markup import Markup, joined, tag
from nsa_compile.report.rows import amount

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 360, 240, 52, 32, 12
_SERIES = ("dense", "sparse")


def chart(rows: list[CostAt], metric: str, break_even: int | None) -> Markup:
    """One metric of ``rows`` (at least two); a dashed line marks the predicted break-even."""
    axes = _Axes(rows, metric)
    parts = [*_grid(axes, rows)]
    if break_even is not None and rows[0].length <= break_even <= rows[-1].length:
        x = axes.x(break_even)
        line = tag("line", x1=x, x2=x, y1=_TOP, y2=_HEIGHT - _BOTTOM, class_="break-even")
        parts += [line, tag("text", "predicted break-even", x=x + 4, y=_TOP + 8, class_="note")]
    for series in _SERIES:
        values = [(row.length, getattr(row, f"{metric}_{series}")) for row in rows]
        points = " ".join(f"{axes.x(length)},{axes.y(value)}" for length, value in values)
        parts.append(tag("polyline", points=points, class_=series))
        parts += [_point(axes, length, value, series) for length, value in values]
    drawn = tag(
        "svg", joined(*parts), class_="chart", role="img", viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        aria_label=f"{METRICS[metric]} over sequence length",
    )  # fmt: skip
    return tag("figure", tag("figcaption", f"{METRICS[metric]} over tokens, predicted"), drawn)


class _Axes:
    """Places of lengths and values in the chart."""

    def __init__(self, rows: list[CostAt], metric: str) -> None:
        values = [getattr(row, f"{metric}_{series}") for row in rows for series in _SERIES]
        self.low = math.floor(math.log10(max(min(values), 1)))
        self.high = max(math.ceil(math.log10(max(*values, 1))), self.low + 1)
        self.first, self.last = math.log2(rows[0].length), math.log2(rows[-1].length)

    def x(self, length: int) -> float:
        part = (math.log2(length) - self.first) / max(self.last - self.first, 1e-9)
        return round(_LEFT + part * (_WIDTH - _LEFT - 12), 1)

    def y(self, value: int) -> float:
        part = (math.log10(max(value, 1)) - self.low) / (self.high - self.low)
        return round(_HEIGHT - _BOTTOM - part * (_HEIGHT - _BOTTOM - _TOP), 1)


def _grid(axes: _Axes, rows: list[CostAt]) -> list[Markup]:
    parts = []
    for power in range(axes.low, axes.high + 1):
        y = axes.y(10**power)
        parts.append(tag("line", x1=_LEFT, x2=_WIDTH - 12, y1=y, y2=y, class_="grid"))
        parts.append(tag("text", amount(10**power), x=_LEFT - 6, y=y + 4, class_="tick y"))
    for row in rows:
        label = f"{row.length >> 10}k" if row.length % 1024 == 0 else f"{row.length}"
        place = {"x": axes.x(row.length), "y": _HEIGHT - _BOTTOM + 18}
        parts.append(tag("text", label, class_="tick x", **place))
    return parts


def _point(axes: _Axes, length: int, value: int, series: str) -> Markup:
    hint = tag("title", f"{series}, {length} tokens: {amount(value)}")
    return tag("circle", hint, cx=axes.x(length), cy=axes.y(value), r=3, class_=series)
