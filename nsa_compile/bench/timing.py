"""How long a call takes and how much memory it needs."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


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


def measure(call: Callable[[], object], device: str, budget_ms: float) -> Timing:
    """Median time of ``call`` after warming up, within about ``budget_ms``."""
    call()
    if device == "cuda":
        return _measure_queued(call, budget_ms)
    times: list[float] = []
    while not times or (sum(times) < budget_ms and len(times) < 100):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    fifths = statistics.quantiles(times * 2, n=5)
    return Timing(statistics.median(times), fifths[0], fifths[-1])


def _measure_queued(call: Callable[[], object], budget_ms: float) -> Timing:
    """Device time of calls that wait in the queue, as those of a model do.

    A call of a millisecond takes the host a good part of that to launch; timed alone, the launches
    would be measured. Short calls are therefore timed several at a time.
    """

    def timed(calls: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / calls

    timed(1)
    estimate = timed(3)
    calls = max(1, min(20, math.ceil(10 / estimate)))
    repeats = max(5, min(50, int(budget_ms / (estimate * calls))))
    times = [timed(calls) for _ in range(repeats)]
    fifths = statistics.quantiles(times, n=5)
    return Timing(statistics.median(times), fifths[0], fifths[-1])


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
