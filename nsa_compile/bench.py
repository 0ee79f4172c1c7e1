"""``python -m nsa_compile.bench``: dense SDPA against the converted path, on this machine.

The converted path is what the rewriter puts in the graph: channels or compress, select_blocks,
refine_blocks where the budget asks for it, selected_attention, through ``torch.ops.nsa``. Its time
is measured as a whole (on a GPU as a CUDA graph), and stage by stage beside it. Dense is
``scaled_dot_product_attention`` with its fastest backend (cuDNN first). Backward is the gradient of
q, k and v; choosing blocks has none.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nsa_compile.passes.config import NSAConfig, NSAConfigError

SCORERS = ("channels", "mean")
_ABSENT = (None,) * 6  # valid, ranges, two of segments, slopes, positions
STAGES = ("summary", "select", "refine", "attend")
# Fastest first, as measured on one H100: 56 ms cuDNN, 103 ms flash at 65,536 tokens, 32 heads.
BACKENDS = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)


@dataclass(frozen=True)
class Settings:
    """What is measured; sizes as in ``NSAConfig``."""

    device: str
    dtype: str
    dim: int
    heads: tuple[tuple[int, int], ...]
    lengths: tuple[int, ...]
    scorers: tuple[str, ...]
    query_tile: int = 64
    block: int = 64
    num_selected: int = 16
    init_blocks: int = 1
    window: int = 512
    compress_block: int = 32
    compress_stride: int = 16
    score_channels: int | None = None
    candidates: int | None = None
    dense_len: int = 8192
    backward: bool = True
    budget_ms: float = 400.0

    def config(self, scorer: str) -> NSAConfig:
        """The configuration of a converted layer."""
        return NSAConfig(
            scorer=scorer, query_tile=self.query_tile, select_block=self.block,
            num_selected=self.num_selected, init_blocks=self.init_blocks, window=self.window,
            compress_block=self.compress_block, compress_stride=self.compress_stride,
            score_channels=self.score_channels, candidates=self.candidates,
            dense_len=self.dense_len,
        )  # fmt: skip


@dataclass(frozen=True)
class Timing:
    """Milliseconds: median, and the 20th and 80th percentile."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f}"


@dataclass
class Row:
    """One line of the table: a path at one length and head count."""

    q_heads: int
    kv_heads: int
    length: int
    scorer: str
    is_dense: bool
    dense_backend: str
    dense_forward: Timing
    forward: Timing
    stages: dict[str, Timing] = field(default_factory=dict)
    dense_backward: Timing | None = None
    backward: Timing | None = None

    @property
    def forward_ratio(self) -> float:
        return self.forward.median / self.dense_forward.median

    @property
    def backward_ratio(self) -> float | None:
        if self.backward is None or self.dense_backward is None:
            return None
        return self.backward.median / self.dense_backward.median


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


def replayed(call: Callable[[], object], settings: Settings) -> Callable[[], object]:
    """``call`` as a CUDA graph: the device's time without the host's, which eager launches add."""
    if settings.device != "cuda":
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


@contextmanager
def fastest_dense(settings: Settings, qkv: tuple[Tensor, ...]) -> Iterator[str]:
    """Inside, SDPA uses the first backend that takes these inputs; yields its name."""
    if settings.device != "cuda":
        yield "cpu"
        return
    for backend in BACKENDS:
        try:
            with sdpa_kernel(backend):
                dense(*qkv)
        except RuntimeError:
            continue
        with sdpa_kernel(backend):
            yield backend.name.removesuffix("_ATTENTION").lower()
        return
    raise RuntimeError(f"no SDPA backend takes inputs of shape {tuple(qkv[0].shape)}")


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention as a model calls it."""
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
    )


class ConvertedPath:
    """What the rewriter puts in the place of SDPA, whole and in stages."""

    def __init__(self, settings: Settings, scorer: str) -> None:
        self.settings, self.config = settings, settings.config(scorer)
        tiling = (settings.query_tile, settings.block)
        self.logits = (settings.dim**-0.5, 0.0, True, 0, None, *tiling)
        self.refined = self.config.proposed_blocks() > settings.num_selected

    def summary(self, q: Tensor, k: Tensor) -> Tensor:
        s = self.settings
        if self.config.scorer == "channels":
            kept = self.config.channels(s.dim)
            return as_tensor(torch.ops.nsa.channels(q, k, None, kept, s.dense_len))
        return as_tensor(torch.ops.nsa.compress(k, None, s.compress_block, s.compress_stride))

    def select(self, q: Tensor, k: Tensor, summary: Tensor) -> Tensor:
        s = self.settings
        picked = torch.ops.nsa.select_blocks(
            q, k, summary, *_ABSENT, self.config.scorer, *self.logits,
            self.config.proposed_blocks(), s.init_blocks, s.window, s.compress_block,
            s.compress_stride, s.dense_len,
        )  # fmt: skip
        return as_tensor(picked)

    def refine(self, q: Tensor, k: Tensor, candidates: Tensor) -> Tensor:
        s = self.settings
        if not self.refined:
            return candidates
        picked = torch.ops.nsa.refine_blocks(
            q, k, candidates, *_ABSENT, *self.logits, s.num_selected, s.init_blocks, s.window,
            s.dense_len,
        )  # fmt: skip
        return as_tensor(picked)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor) -> Tensor:
        dense_len = self.settings.dense_len
        out, _ = torch.ops.nsa.selected_attention(
            q, k, v, blocks, *_ABSENT, *self.logits, dense_len
        )
        return as_tensor(out)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        blocks = self.refine(q, k, self.select(q, k, self.summary(q, k)))
        return self.attend(q, k, v, blocks)


def as_tensor(x: Any) -> Tensor:
    assert isinstance(x, Tensor)
    return x


def backward_of(forward: Callable[..., Tensor], qkv: tuple[Tensor, ...]) -> Callable[[], object]:
    """The gradient of ``forward`` with respect to q, k and v, to be called again and again."""
    leaves = [x.detach().requires_grad_() for x in qkv]
    out = forward(*leaves)
    upstream = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True)


def measure_shape(
    settings: Settings, heads: tuple[int, int], length: int, step: Callable[[str], None]
) -> list[Row]:
    """The rows of one length and head count: one for each scorer."""
    torch.manual_seed(0)
    dtype = getattr(torch, settings.dtype)
    qkv = tuple(
        torch.randn(1, length, h, settings.dim, dtype=dtype, device=settings.device).transpose(1, 2)
        for h in (heads[0], heads[1], heads[1])
    )
    timed = (settings.device, settings.budget_ms)
    dense_backward = None
    with fastest_dense(settings, qkv) as backend:
        step("dense")
        dense_forward = measure(replayed(lambda: dense(*qkv), settings), *timed)
        if settings.backward:
            dense_backward = measure(backward_of(dense, qkv), *timed)
    rows = []
    for scorer in settings.scorers:
        step(scorer)
        path = ConvertedPath(settings, scorer)
        is_dense = length <= settings.dense_len
        row = Row(
            *heads, length, scorer, is_dense, backend, dense_forward,
            measure(replayed(functools.partial(path, *qkv), settings), *timed),
            dense_backward=dense_backward,
        )  # fmt: skip
        row.stages = {} if is_dense else stages(path, qkv, timed)
        if settings.backward:
            row.backward = measure(backward_of(path, qkv), *timed)
        rows.append(row)
    return rows


def stages(
    path: ConvertedPath, qkv: tuple[Tensor, ...], timed: tuple[str, float]
) -> dict[str, Timing]:
    """Each operator on its own; their sum exceeds the whole by the launches that overlap."""
    q, k, v = qkv
    summary = path.summary(q, k)
    candidates = path.select(q, k, summary)
    blocks = path.refine(q, k, candidates)
    calls: dict[str, Callable[[], object]] = {
        "summary": lambda: path.summary(q, k),
        "select": lambda: path.select(q, k, summary),
        "refine": lambda: path.refine(q, k, candidates),
        "attend": lambda: path.attend(q, k, v, blocks),
    }
    if not path.refined:
        del calls["refine"]
    return {name: measure(call, *timed) for name, call in calls.items()}


def run(settings: Settings, console: Console) -> list[Row]:
    """Every length and head count; a shape that does not fit into memory is named and left out."""
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
                rows += measure_shape(settings, heads, length, step)
            except torch.OutOfMemoryError:
                console.print(f"{name}: out of memory, left out")
            if settings.device == "cuda":
                torch.cuda.empty_cache()
            progress.advance(task)
    return rows


def table(settings: Settings, rows: list[Row]) -> Table:
    """Milliseconds and the ratio to dense; below 1 is faster than dense."""
    title = (
        f"{hardware(settings.device)}, {settings.dtype}, D={settings.dim}, "
        f"n={settings.num_selected} blocks of {settings.block}, window {settings.window}, "
        f"tile {settings.query_tile}"
    )
    grid = Table(title=title)
    for name in ("heads", "T", "scorer"):
        grid.add_column(name)
    for name in (
        "dense fwd", "fwd", "ratio", *STAGES, "dense bwd", "bwd", "ratio",
    ):  # fmt: skip
        grid.add_column(name, justify="right")
    for row in rows:
        parts = [_cell(row.stages.get(name)) for name in STAGES]
        if row.is_dense:
            parts[0] = "dense"
        grid.add_row(
            f"{row.q_heads}/{row.kv_heads}", f"{row.length:,}", row.scorer,
            f"{row.dense_forward} {row.dense_backend}", str(row.forward),
            f"{row.forward_ratio:.3f}", *parts, _cell(row.dense_backward), _cell(row.backward),
            _cell(row.backward_ratio),
        )  # fmt: skip
    return grid


def _cell(value: Timing | float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def hardware(device: str) -> str:
    if device == "cuda":
        return str(torch.cuda.get_device_name())
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def document(settings: Settings, rows: list[Row]) -> dict[str, Any]:
    """The same as data; times in milliseconds."""
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    if settings.device == "cuda":
        import triton

        versions["triton"] = triton.__version__
    ratios = ({"forward_ratio": r.forward_ratio, "backward_ratio": r.backward_ratio} for r in rows)
    return {
        "schema_version": 1,
        "hardware": hardware(settings.device),
        "versions": versions,
        "settings": asdict(settings),
        "rows": [asdict(row) | ratio for row, ratio in zip(rows, ratios, strict=True)],
    }


def parse(arguments: list[str]) -> tuple[Settings, Path | None]:
    """Settings from the command line; what is not given depends on the device."""
    parser = argparse.ArgumentParser(prog="python -m nsa_compile.bench", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: a GPU if there is one")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--heads", help="query/kv heads, e.g. 32/8,64/4")
    parser.add_argument("--lengths", help="tokens, e.g. 8192,65536")
    parser.add_argument("--dim", type=int, help="D, the head dim")
    parser.add_argument("--scorer", choices=SCORERS, help="default: both")
    for name in (
        "query_tile", "num_selected", "window", "dense_len", "score_channels", "candidates",
    ):  # fmt: skip
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, default=getattr(Settings, name), help=name
        )
    parser.add_argument("--forward-only", action="store_true")
    parser.add_argument("--budget-ms", type=float, default=400.0, help="time for each measurement")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the numbers to a file")
    given = parser.parse_args(arguments)
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device == "cuda"
    heads = (given.heads or ("32/8,32/32,64/4" if on_gpu else "8/8")).split(",")
    lengths = (given.lengths or ("8192,16384,32768,65536" if on_gpu else "16384")).split(",")
    try:
        pairs = tuple((int(q), int(kv)) for q, kv in (pair.split("/") for pair in heads))
        tokens = tuple(int(length) for length in lengths)
    except ValueError:
        parser.error(
            "--heads takes pairs such as 32/8,64/4 and --lengths numbers such as 8192,65536"
        )
    if any(q % kv for q, kv in pairs):
        parser.error(f"query heads must be a multiple of kv heads, got {given.heads}")
    settings = Settings(
        device=device, dtype=given.dtype or ("bfloat16" if on_gpu else "float32"),
        dim=given.dim or (128 if on_gpu else 64), heads=pairs, lengths=tokens,
        scorers=(given.scorer,) if given.scorer else SCORERS, query_tile=given.query_tile,
        num_selected=given.num_selected, window=given.window, dense_len=given.dense_len,
        score_channels=given.score_channels, candidates=given.candidates,
        backward=not given.forward_only,
        budget_ms=given.budget_ms,
    )  # fmt: skip
    try:
        settings.config(SCORERS[0])
    except NSAConfigError as error:
        parser.error(str(error))
    return settings, given.json


def main(arguments: list[str] | None = None) -> int:
    settings, path = parse(sys.argv[1:] if arguments is None else arguments)
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    rows = run(settings, console)
    console.print(table(settings, rows))
    if path is not None:
        path.write_text(json.dumps(document(settings, rows), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
