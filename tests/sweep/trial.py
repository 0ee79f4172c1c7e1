"""One architecture in every case: compile it, compare with dense, count its attention."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

import nsa_compile
from tests.models.equality import FULL_BUDGET
from tests.sweep import tiny
from tests.sweep.counting import Executed, count

LENGTH = 70  # several blocks, and no size of a tiny model
TOLERANCE = 1e-4
_OPTIONS = {**FULL_BUDGET, "inner": "eager"}


@dataclass(frozen=True)
class Case:
    """How one architecture is run."""

    implementation: str
    padding: str
    cache: bool
    dynamic: bool = False

    def __str__(self) -> str:
        cache = "cache" if self.cache else "no cache"
        return f"{self.implementation}, {self.padding}, {cache}" + ", dynamic" * self.dynamic


@dataclass
class Row:
    """What happened in one case.

    Attributes:
        attention: attention layers that the dense run executed.
        converted: attention layers that the compiled run executed sparse.
        kept: sites by reason code.
        missed: attention that the compiled run executed dense and no site accounts for.
        unexpected: kept sites beyond the attention that was executed.
        problem: ``""``, ``"mismatch"``, ``"crash"`` or ``"upstream"``: the last is a failure that
            torch.compile shows without us.
    """

    architecture: str
    case: str
    attention: int = 0
    converted: int = 0
    kept: dict[str, int] = field(default_factory=dict)
    missed: int = 0
    unexpected: int = 0
    problem: str = ""
    detail: str = ""
    masks: dict[str, int] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    other: list[tuple[int, ...]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        return self.problem in ("mismatch", "crash")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def rows(architecture: str, cases: list[Case], task: str) -> Iterator[Row]:
    """Run ``cases``, one row each; a model is built once an implementation."""
    warnings.filterwarnings("ignore")
    models: dict[str, nn.Module | str] = {}
    for case in cases:
        if case.implementation not in models:
            models[case.implementation] = _build(architecture, case.implementation, task)
        model = models[case.implementation]
        if isinstance(model, str):
            yield Row(architecture, str(case), problem="unbuildable", detail=model)
        else:
            yield run(architecture, model, case)


def _build(architecture: str, implementation: str, task: str) -> nn.Module | str:
    try:
        return tiny.model(architecture, implementation, task)
    except tiny.CannotBuild as error:
        return str(error)


def run(architecture: str, model: nn.Module, case: Case) -> Row:
    """One case of one model."""
    torch._dynamo.reset()
    start = time.perf_counter()
    row = Row(architecture, str(case))
    arguments, valid = _inputs(case)
    try:
        dense, executed = count(lambda: _logits(model, arguments), LENGTH)
    except Exception as error:
        row.problem, row.detail = "upstream", f"dense: {_text(error)}"
        return row
    row.attention, row.other = executed.dense, list(executed.other)
    fast = torch.compile(model, backend="nsa", dynamic=case.dynamic, options=_OPTIONS)
    try:
        _logits(fast, arguments)  # compiles; only the second run is counted
        sparse, executed = count(lambda: _logits(fast, arguments), LENGTH)
    except Exception as error:
        row.problem, row.detail = "crash", _text(error)
    else:
        _account(row, nsa_compile.report(fast), executed)
        gap = _gap(dense, sparse, valid)
        if not gap <= TOLERANCE:
            row.problem, row.detail = "mismatch", f"relative difference {gap:.1e}"
    if row.failed and _fails_without_us(model, case, arguments, dense, valid):
        row.problem = "upstream"
    row.seconds = time.perf_counter() - start
    return row


def _inputs(case: Case) -> tuple[dict[str, Any], torch.Tensor]:
    """-> the arguments of forward, and which positions hold real tokens, bool [B, T]."""
    torch.manual_seed(1)
    ids = torch.randint(tiny.FIRST_PLAIN_TOKEN, tiny.VOCABULARY, (2, LENGTH))
    mask = torch.ones_like(ids)
    if case.padding == "left":
        mask[0, : LENGTH // 3] = 0
    elif case.padding == "right":
        mask[0, -(LENGTH // 3) :] = 0
    arguments: dict[str, Any] = {"input_ids": ids}
    if case.padding != "none":
        arguments["attention_mask"] = mask
    if case.cache:
        arguments["use_cache"] = True
    return arguments, mask.bool()


def _logits(model: Any, arguments: dict[str, Any]) -> torch.Tensor:
    torch.manual_seed(2)  # some models draw random numbers in eval mode
    if "use_cache" not in arguments and _caches(model):
        arguments = {**arguments, "use_cache": False}
    with torch.no_grad():
        return model(**arguments).logits.float()


def _caches(model: Any) -> bool:
    return hasattr(model.config, "use_cache") or hasattr(
        model.config.get_text_config(), "use_cache"
    )


def _account(row: Row, report: nsa_compile.RewriteReport, executed: Executed) -> None:
    """Fill in the counts of ``row``."""
    kept = Counter(site.reason or "" for site in report.skipped)
    row.converted, row.kept = executed.converted, dict(kept)
    row.missed = max(0, executed.dense - sum(kept.values()))
    row.unexpected = max(0, sum(kept.values()) - executed.dense)
    row.masks = dict(Counter(site.mask for site in report.converted))
    row.reasons = sorted({f"{site.reason}: {site.reason_text}" for site in report.skipped})
    if report.failures:
        row.problem, row.detail = "crash", "; ".join(report.failures)[:600]


def _gap(dense: torch.Tensor, other: torch.Tensor, valid: torch.Tensor) -> float:
    """Largest difference at valid positions, relative to the largest dense logit."""
    if dense.shape != other.shape:
        return float("inf")
    if dense.shape[:2] == valid.shape:
        dense, other = dense[valid], other[valid]
    both_nan = dense.isnan() & other.isnan()
    gap = (dense - other).abs().masked_fill(both_nan, 0).max()
    return float(gap / dense[~both_nan].abs().max().clamp(min=1e-6))


def _fails_without_us(
    model: nn.Module,
    case: Case,
    arguments: dict[str, Any],
    dense: torch.Tensor,
    valid: torch.Tensor,
) -> bool:
    """Whether torch.compile with backend "eager" fails or differs on this case as well."""
    torch._dynamo.reset()
    plain = torch.compile(model, backend="eager", dynamic=case.dynamic)
    try:
        return not _gap(dense, _logits(plain, arguments), valid) <= TOLERANCE
    except Exception:
        return True


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
