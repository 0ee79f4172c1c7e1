"""How long a call takes and how much memory it needs."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

_WARMING_MS = 300.0  # A GPU's clocks follow its power within a few tenths of a second.


@dataclass(frozen=True)
class Timing:
    """Milliseconds: median, and the 20th and 80th percentile."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        """The median, and the half width between the percentiles in percent."""
        spread = (self.high - self.low) / 2 / self.median
        return f"{self.median:.2f} ±{spread:.0%}"


def measure(calls: Sequence[Callable[[], object]], device: str, budget_ms: float) -> list[Timing]:
    """Median times of ``calls`` after warming up, each within about ``budget_ms``."""
    for call in calls:
        call()
    if device == "cuda":
        times = [_queued(call, budget_ms) for call in calls]
    else:
        times = _waited_for(calls, budget_ms)
    fifths = [statistics.quantiles(mine * 2, n=5) for mine in times]
    return [
        Timing(statistics.median(mine), each[0], each[-1])
        for mine, each in zip(times, fifths, strict=True)
    ]


def _waited_for(calls: Sequence[Callable[[], object]], budget_ms: float) -> list[list[float]]:
    """Milliseconds of every turn of every call.

    They take turns: others use a host too, and what is compared has to meet the same.
    """
    times: list[list[float]] = [[] for _ in calls]
    while not times[0] or (max(map(sum, times)) < budget_ms and len(times[0]) < 100):
        for call, mine in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            mine.append((time.perf_counter() - start) * 1e3)
    return times


def _queued(call: Callable[[], object], budget_ms: float) -> list[float]:
    """Milliseconds of device time of a call among its own kind that waits in the queue.

    So do the layers of a model. A chip lowers its clocks by the power that its work takes: after
    another call, one would be timed at the clocks of the other. The first turns therefore only
    warm up. The host stays ahead, since nothing is waited for in between; short calls, which it
    may launch more slowly than the device answers, are timed several at a time.
    """

    def timed(calls: int, turns: int) -> list[float]:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(turns + 1)]
        call()
        marks[0].record()
        for mark in marks[1:]:
            for _ in range(calls):
                call()
            mark.record()
        marks[-1].synchronize()
        spans = (float(start.elapsed_time(end)) for start, end in itertools.pairwise(marks))
        return [span / calls for span in spans]

    estimate = statistics.median(timed(1, 3))
    calls = max(1, min(20, math.ceil(10 / estimate)))
    turns, warming = (int(each / (estimate * calls)) for each in (budget_ms, _WARMING_MS))
    return timed(calls, warming + max(5, min(50, turns)))[warming:]


def replayed(call: Callable[[], object], device: str) -> Callable[[], object]:
    """``call`` as a CUDA graph: the device's time without the host's, which eager launches add."""
    if device != "cuda":
        return call
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    replay: Callable[[], object] = graph.replay
    return replay


def peak_bytes(call: Callable[[], object], device: str) -> int | None:
    """The most memory that tensors take while ``call`` runs, its inputs included.

    None on the CPU, whose allocator does not count.
    """
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated())
