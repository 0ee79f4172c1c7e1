"""Measures the attention of a report's layers on this device: each shape once, at several lengths.

Dense is SDPA with its fastest backend, converted is ``nsa_compile.functional.nsa_attention`` with
the sizes that the layer is converted with. Inputs are random. Padding is left away, and a layer
whose mask or logits SDPA has no argument for is not measured.
"""

from __future__ import annotations

import functools
import json
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from nsa_compile import functional
from nsa_compile.bench.advice import crossing
from nsa_compile.bench.document import hardware
from nsa_compile.bench.paths import dense, fastest_dense
from nsa_compile.bench.rows import Compared, Cost, costs
from nsa_compile.dynamo_text import describe
from nsa_compile.passes.config import NSAConfig
from nsa_compile.passes.projection import LENGTHS
from nsa_compile.passes.site import SiteRecord
from nsa_compile.report import RewriteReport
from nsa_compile.report.measured import totals
from nsa_compile.report.story import label

LONGEST_CALL = 10.0  # seconds that one call of dense attention may be expected to take
_PROBE = 1024  # tokens of the call that tells how fast this device is
_MASKS = {"causal": True, "full": False}


@dataclass(frozen=True)
class Shape:
    """What layers share that are measured together; ``config`` as JSON, None where kept dense."""

    batch: int
    q_heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: str
    causal: bool
    config: str | None

    def __str__(self) -> str:
        width = f"{self.head_dim}" + f"/{self.value_dim}" * (self.value_dim != self.head_dim)
        mask = "causal" if self.causal else "full"
        return f"{self.q_heads}/{self.kv_heads} heads x {width}, {self.dtype}, {mask}"


def measure_sites(
    report: RewriteReport,
    lengths: Iterable[int] | None,
    step: Callable[[str], None],
    *,
    device: str | None = None,
    backward: bool = False,
    budget_ms: float = 400.0,
) -> None:
    """Give each layer that can be measured its times, and ``report`` what they were taken on.

    Args:
        lengths: None is each layer's own length, and those of the predictions that are shorter.
        step: is told what is measured.
        device: ``"cpu"`` or ``"cuda"``; None is a GPU if there is one.
        backward: measure the gradients of q, k and v too.
        budget_ms: about how long one measurement may take, in milliseconds.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    left_out: dict[str, None] = {}
    known: dict[tuple[Shape, int], dict[str, Any] | None] = {}
    for site in report.sites:
        shape = shape_of(site)
        if isinstance(shape, str):
            left_out[shape] = None
            continue
        found = []
        for length in lengths or _own_lengths(site):
            if (shape, length) not in known:
                step(f"measuring {shape} at {length} tokens")
                row = _measured(shape, length, device, backward, budget_ms)
                if isinstance(row, str):
                    left_out[f"{shape} at {length} tokens: {row}"] = None
                known[shape, length] = None if isinstance(row, str) else row
            found.append(known[shape, length])
        site.extra["measured"] = [row for row in found if row is not None]
    rows = totals(report.sites)
    ratios = [(row.length, row.ratio) for row in rows]
    break_even, measured = crossing(ratios) if ratios else (None, False)
    report.bench = {
        "hardware": hardware(device),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "rows": [asdict(row) for row in rows],
        "break_even": break_even,
        "break_even_measured": measured,
        "left_out": list(left_out),
    }


def shape_of(site: SiteRecord) -> Shape | str:
    """What to measure of ``site``, or why it cannot be measured."""
    mask = " & ".join(term for term in site.mask.split(" & ") if term != "padding") or "full"
    batch = site.batch if isinstance(site.batch, int) else 1
    if mask not in _MASKS:
        return f"{label(site)}: SDPA has no argument for its mask ({site.mask})"
    if site.modifiers:
        return f"{label(site)}: SDPA has no argument for {site.modifiers}"
    if site.q_len != site.kv_len:
        return f"{label(site)}: its queries and keys are not equally many"
    if not min(batch, site.q_heads, site.kv_heads, site.head_dim, site.value_dim):
        return f"{label(site)}: its sizes are unknown"
    config = None if site.config is None else json.dumps(site.config, sort_keys=True)
    return Shape(
        batch, site.q_heads, site.kv_heads, site.head_dim, site.value_dim, site.dtype,
        _MASKS[mask], config,
    )  # fmt: skip


def _own_lengths(site: SiteRecord) -> list[int]:
    if isinstance(site.kv_len, str) or isinstance(site.flops_dense, str):  # symbolic sizes
        return list(LENGTHS)
    return [*(length for length in LENGTHS if length < site.kv_len), site.kv_len]


def _measured(
    shape: Shape, length: int, device: str, backward: bool, budget_ms: float
) -> dict[str, Any] | str:
    """The row of one shape at one length, or why there is none."""
    try:
        seconds = _expected(shape, length, device)
        if seconds > LONGEST_CALL:
            return f"one call of dense attention would take about {seconds:.0f} s here"
        return _times(shape, length, device, backward, budget_ms)
    except torch.OutOfMemoryError:
        return "it does not fit into memory"
    except Exception as error:  # a layer that cannot be measured is no reason to lose the report
        return describe(error)
    finally:
        if device == "cuda":
            torch.cuda.empty_cache()


def _expected(shape: Shape, length: int, device: str) -> float:
    """Seconds of one dense call, taken to grow as the square of the length."""
    if length <= _PROBE:
        return 0.0
    return _probed(shape, device) * (length / _PROBE) ** 2


@functools.lru_cache(maxsize=64)
def _probed(shape: Shape, device: str) -> float:
    qkv, call = _inputs(shape, _PROBE, device), _dense(shape)
    call(*qkv)
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call(*qkv)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _times(
    shape: Shape, length: int, device: str, backward: bool, budget_ms: float
) -> dict[str, Any]:
    qkv = _inputs(shape, length, device)
    backend, call = fastest_dense(device, qkv, _dense(shape))
    compared: list[Compared] = [(call, qkv)]
    is_dense = None
    if shape.config is not None:
        config = NSAConfig.from_options(json.loads(shape.config))
        gated = config.merge == "gate"
        is_dense = not gated and length <= (config.dense_len or 0)
        inputs = (*qkv, torch.rand(*qkv[0].shape[:3], 3).to(qkv[0])) if gated else qkv
        compared.append((_converted(shape, config), inputs))
        if is_dense:
            always = NSAConfig.from_options({**json.loads(shape.config), "dense_len": 0})
            compared.append((_converted(shape, always), inputs))
    reference, *rest = costs(compared, device, budget_ms, backward)
    row: dict[str, Any] = {"length": length, "dense_backend": backend, "is_dense": is_dense}
    row |= _numbers("dense", reference) | _numbers("converted", rest[0] if rest else None)
    return row | _numbers("sparse", rest[-1] if rest else None)


def _numbers(name: str, found: Cost | None) -> dict[str, Any]:
    """Milliseconds: median, 20th and 80th percentile; None where nothing was measured."""
    times = {"forward": found and found.forward, "backward": found and found.backward}
    return {
        f"{name}_{part}_ms": each and [each.median, each.low, each.high]
        for part, each in times.items()
    }


def _inputs(shape: Shape, length: int, device: str) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    dtype = getattr(torch, shape.dtype)
    sizes = (
        (shape.q_heads, shape.head_dim), (shape.kv_heads, shape.head_dim),
        (shape.kv_heads, shape.value_dim),
    )  # fmt: skip
    return tuple(
        torch.randn(shape.batch, length, heads, width, dtype=dtype, device=device).transpose(1, 2)
        for heads, width in sizes
    )


def _dense(shape: Shape) -> Callable[..., Tensor]:
    return functools.partial(dense, causal=shape.causal)


def _converted(shape: Shape, config: NSAConfig) -> Callable[..., Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor, gates: Tensor | None = None) -> Tensor:
        return functional.nsa_attention(q, k, v, gates=gates, config=config, causal=shape.causal)

    return call
