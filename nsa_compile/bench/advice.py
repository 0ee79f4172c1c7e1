"""Where the sparse path starts to pay on this machine, and the ``dense_len`` that follows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nsa_compile.bench.rows import Row


@dataclass(frozen=True)
class BreakEven:
    """The length from which a path is faster than dense attention.

    Args:
        length: tokens, None when the path is slower at the longest length measured.
        measured: whether it lies between two measured lengths; else the path was faster at the
            shortest one already.
    """

    q_heads: int
    kv_heads: int
    path: str
    length: int | None
    measured: bool
    with_backward: bool

    def __str__(self) -> str:
        what = "forward and backward" if self.with_backward else "forward"
        name = f"{self.q_heads}/{self.kv_heads} heads, {self.path}, {what}"
        if self.length is None:
            return f"{name}: dense is faster at every length measured; measure longer sequences"
        if not self.measured:
            return f"{name}: sparse is faster from {self.length:,} tokens on, the shortest measured"
        faster = f"{name}: sparse is faster from {self.length:,} tokens on"
        return faster if self.path == "gate" else f"{faster}; dense_len={self.length}"


def break_evens(rows: Iterable[Row]) -> list[BreakEven]:
    """One for each head count and path, in the order of ``rows``."""
    found = []
    series: dict[tuple[int, int, str], list[Row]] = {}
    for row in rows:
        series.setdefault((row.q_heads, row.kv_heads, row.path), []).append(row)
    for key, points in series.items():
        points.sort(key=lambda row: row.length)
        ratios = [(row.length, row.sparse.step / row.dense.step) for row in points]
        with_backward = points[0].dense.backward is not None
        found.append(BreakEven(*key, *crossing(ratios), with_backward))
    return found


def crossing(ratios: Sequence[tuple[int, float]]) -> tuple[int | None, bool]:
    """(length, between two measured lengths) from which all ratios are below 1.

    Between two lengths the ratio is taken as a power of the length, as times of attention are.
    """
    if ratios[-1][1] >= 1:
        return None, False
    for (short, slower), (long, faster) in reversed(list(itertools.pairwise(ratios))):
        if slower >= 1:
            share = math.log(slower) / (math.log(slower) - math.log(faster))
            return round(short * (long / short) ** share), True
    return ratios[0][0], False
