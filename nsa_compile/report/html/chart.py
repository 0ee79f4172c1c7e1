"""A chart of a cost over sequence length, dense against converted, both axes logarithmic."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from nsa_compile.report.html.markup import Markup, joined, tag

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 360, 250, 52, 42, 12
_INNER = _HEIGHT - _BOTTOM - _TOP
_SERIES = ("dense", "sparse")


@dataclass(frozen=True)
class Curves:
    """What a chart shows.

    Attributes:
        title: of the chart; says whether it was predicted or measured.
        points: length, dense and sparse value; at least two, ascending.
        unit: a value as text.
        marked: a length to mark, or None.
        mark: what is said beside the mark.
    """

    title: str
    points: list[tuple[int, float, float]]
    unit: Callable[[float], str]
    marked: int | None = None
    mark: str = ""

    @property
    def lengths(self) -> list[int]:
        return [length for length, *_ in self.points]

    def series(self, name: str) -> list[tuple[int, float]]:
        at = 1 + _SERIES.index(name)
        return [(point[0], point[at]) for point in self.points]


def chart(curves: Curves) -> Markup:
    """The two curves; a dashed line at the marked length."""
    axes = _Axes(curves)
    parts = [*_grid(axes, curves)]
    if curves.marked is not None and curves.lengths[0] <= curves.marked <= curves.lengths[-1]:
        x = axes.x(curves.marked)
        line = tag("line", x1=x, x2=x, y1=_TOP, y2=_HEIGHT - _BOTTOM, class_="break-even")
        before = x > _WIDTH / 2  # where there is room for the words
        place = {"x": x - 4 if before else x + 4, "y": _TOP + 10}
        parts += [
            line,
            tag("text", curves.mark, class_="note before" if before else "note", **place),
        ]
    for series in _SERIES:
        values = curves.series(series)
        points = " ".join(f"{axes.x(length)},{axes.y(value)}" for length, value in values)
        parts.append(tag("polyline", points=points, class_=series))
        for length, value in values:
            hint = tag("title", f"{series}, {length} tokens: {curves.unit(value)}")
            place = {"cx": axes.x(length), "cy": axes.y(value)}
            parts.append(tag("circle", hint, r=3, class_=series, **place))
    drawn = tag(
        "svg", joined(*parts), class_="chart", role="img", viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        aria_label=curves.title,
    )  # fmt: skip
    return tag("figure", tag("figcaption", curves.title), drawn)


def legend(sparse: str) -> Markup:
    """What the colours of the curves mean."""
    keys = (("dense", "key dense"), (sparse, "key sparse"))
    return tag("p", *(tag("span", name, class_=key) for name, key in keys))


class _Axes:
    """Places of lengths and values in the chart."""

    def __init__(self, curves: Curves) -> None:
        values = [value for point in curves.points for value in point[1:] if value > 0] or [1]
        self.low = math.floor(math.log10(min(values)))
        self.high = max(math.ceil(math.log10(max(values))), self.low + 1)
        self.first, self.last = (math.log2(curves.lengths[at]) for at in (0, -1))

    def x(self, length: int) -> float:
        part = (math.log2(length) - self.first) / max(self.last - self.first, 1e-9)
        return round(_LEFT + part * (_WIDTH - _LEFT - 12), 1)

    def y(self, value: float) -> float:
        part = math.log10(value) - self.low if value > 0 else 0.0
        return round(_HEIGHT - _BOTTOM - part / (self.high - self.low) * _INNER, 1)


def _grid(axes: _Axes, curves: Curves) -> list[Markup]:
    parts = []
    for power in range(axes.low, axes.high + 1):
        y = axes.y(10.0**power)
        parts.append(tag("line", x1=_LEFT, x2=_WIDTH - 12, y1=y, y2=y, class_="grid"))
        parts.append(tag("text", curves.unit(10.0**power), x=_LEFT - 6, y=y + 4, class_="tick y"))
    parts.append(tag("text", "tokens", class_="tick x", x=_LEFT + 148, y=_HEIGHT))
    free = 0.0  # where the next label has room
    for length in curves.lengths:
        label = f"{length >> 10}k" if length % 1024 == 0 else f"{length}"
        x, width = axes.x(length), 7.0 * len(label)
        if x - width / 2 >= free:
            place = {"x": x, "y": _HEIGHT - _BOTTOM + 18}
            parts.append(tag("text", label, class_="tick x", **place))
            free = x + width / 2 + 4
    return parts
