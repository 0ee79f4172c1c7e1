"""Measures every path at every length and head count."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from nsa_compile.bench.paths import (
    backward_of,
    dense,
    fastest_dense,
    forward_and_backward,
    path_of,
)
from nsa_compile.bench.settings import Settings
from nsa_compile.bench.timing import Timing, measure, peak_bytes, replayed

Compared: TypeAlias = tuple[Callable[..., Tensor], tuple[Tensor, ...]]  # a call and its inputs


@dataclass(frozen=True)
class Cost:
    """What attention takes: times forward and backward, and the peak of memory over both."""

    forward: Timing
    backward: Timing | None = None
    peak_bytes: int | None = None

    @property
    def step(self) -> float:
        """Milliseconds of forward and, where it was measured, backward."""
        return self.forward.median + (self.backward.median if self.backward else 0.0)


@dataclass(frozen=True)
class Row:
    """One line of the table: a path at one length and head count.

    Args:
        converted: the path as configured; dense up to ``dense_len`` tokens.
        sparse: the same at ``dense_len=0``; that of ``converted`` above ``dense_len``.
        stages: forward times of the operators of ``sparse``.
    """

    q_heads: int
    kv_heads: int
    length: int
    path: str
    dense_backend: str
    dense: Cost
    converted: Cost
    sparse: Cost
    is_dense: bool
    stages: dict[str, Timing] = field(default_factory=dict)

    @property
    def forward_ratio(self) -> float:
        return self.converted.forward.median / self.dense.forward.median

    @property
    def backward_ratio(self) -> float | None:
        if self.converted.backward is None or self.dense.backward is None:
            return None
        return self.converted.backward.median / self.dense.backward.median

    @property
    def memory_ratio(self) -> float | None:
        if self.converted.peak_bytes is None or self.dense.peak_bytes is None:
            return None
        return self.converted.peak_bytes / self.dense.peak_bytes


def run(
    settings: Settings, console: Console, save: Callable[[list[Row]], object] = lambda rows: None
) -> list[Row]:
    """Every length and head count; a shape that does not fit into memory is named and left out.

    ``save`` is called with all rows after each shape.
    """
    import nsa_compile.kernels.library  # noqa: F401

    rows: list[Row] = []
    shapes = [(heads, length) for heads in settings.heads for length in settings.lengths]
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(shapes))
        for heads, length in shapes:
            name = f"{heads[0]}/{heads[1]} heads, {length:,} tokens"

            def step(what: str, name: str = name) -> None:
                progress.update(task, description=f"{name}: {what}")

            try:
                rows += _measure_shape(settings, heads, length, step)
            except torch.OutOfMemoryError:
                console.print(f"{name}: out of memory, left out")
            save(rows)
            if settings.device == "cuda":
                torch.cuda.empty_cache()
            progress.advance(task)
    return rows


def _measure_shape(
    settings: Settings, heads: tuple[int, int], length: int, step: Callable[[str], None]
) -> list[Row]:
    """The rows of one length and head count: one for each path."""
    torch.manual_seed(0)
    dtype = getattr(torch, settings.dtype)
    qkv = tuple(
        torch.randn(1, length, h, settings.dim, dtype=dtype, device=settings.device).transpose(1, 2)
        for h in (heads[0], heads[1], heads[1])
    )
    backend, call = fastest_dense(settings.device, qkv, dense)
    paths = [path_of(settings, name) for name in settings.paths]
    given = [path.inputs(qkv) for path in paths]
    compared: list[Compared] = [(call, qkv)]
    for path, inputs in zip(paths, given, strict=True):
        compared.append((path, inputs))
        if path.is_dense(length):
            compared.append((path.sparse(), inputs))
    step("dense and converted")
    found = iter(costs(compared, settings.device, settings.budget_ms, settings.backward))
    reference, rows = next(found), []
    for name, path, inputs in zip(settings.paths, paths, given, strict=True):
        step(f"stages of {name}")
        is_dense, converted = path.is_dense(length), next(found)
        sparse = next(found) if is_dense else converted
        stages = path.sparse().stages(*inputs)
        times = measure(list(stages.values()), settings.device, settings.budget_ms)
        by_stage = dict(zip(stages, times, strict=True))
        rows.append(
            Row(*heads, length, name, backend, reference, converted, sparse, is_dense, by_stage)
        )
    return rows


def costs(
    compared: Sequence[Compared], device: str, budget_ms: float, backward: bool
) -> list[Cost]:
    """What each call takes; each measurement takes about ``budget_ms``.

    A GPU does not hold what two of them need at one time; on a CPU they are measured in turns.
    """
    if device != "cuda":
        return _together(compared, device, budget_ms, backward)
    return [_together([each], device, budget_ms, backward)[0] for each in compared]


def _together(
    compared: Sequence[Compared], device: str, budget_ms: float, backward: bool
) -> list[Cost]:
    forwards = [functools.partial(call, *inputs) for call, inputs in compared]
    times = measure([replayed(call, device) for call in forwards], device, budget_ms)
    if not backward:
        return list(map(Cost, times))
    peaks = [
        peak_bytes(functools.partial(forward_and_backward, call, inputs), device)
        for call, inputs in compared
    ]
    gradients = measure([backward_of(*each) for each in compared], device, budget_ms)
    return list(map(Cost, times, gradients, peaks))
