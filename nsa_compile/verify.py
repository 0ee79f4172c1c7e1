"""nsa_compile.verify: the dense and the converted model side by side, on your own inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

import nsa_compile.kernels.library  # noqa: F401  registers torch.ops.nsa
from nsa_compile.passes.config import NSAConfig
from nsa_compile.passes.site import SiteRecord
from nsa_compile.report.summary import runs_dense
from nsa_compile.verification.measures import Observation, rounding
from nsa_compile.verification.outputs import end_to_end
from nsa_compile.verification.report import LayerCheck, VerifyReport
from nsa_compile.verification.run import Comparison, Runs
from nsa_compile.verification.suggestion import suggest

THRESHOLD = 0.1
_EVERYTHING = 0.999  # coverage of every key, but for rounding


def verify(
    model: Callable[..., Any] | ExportedProgram,
    *inputs: Any,
    config: NSAConfig | Mapping[str, Any] | None = None,
    labels: Tensor | None = None,
    tolerance: float | None = None,
    threshold: float | None = None,
    **kwargs: Any,
) -> VerifyReport:
    """Run ``model(*inputs, **kwargs)`` dense and converted, and measure how far they are apart.

    Each layer is measured on the inputs that it has in the *dense* model: its error is its own, and
    errors of earlier layers do not add to it. The end-to-end figures are those of the converted
    model, in which they do add up (or cancel). Coverage is the share of a query's softmax that lies
    in the blocks that were chosen for it, computed in memory linear in the length.

    The model is run in eval mode, without gradients, on copies of the inputs; its buffers and
    training mode are put back. Nothing is compiled beyond the graph: this measures accuracy.

    Args:
        model: a module or function with real weights, or an exported program.
        inputs, kwargs: real inputs, on the model's device; ``attention_mask`` [B, T] among
            ``kwargs`` says which positions of the output count.
        config: options of the backend, as in ``torch.compile(model, backend="nsa", options=...)``.
        labels: token ids [B, T] to compute perplexity with, not passed to the model: position t
            predicts label t + 1, and -100 does not count.
        tolerance: relative error of the output that is wanted: finds the layers to keep dense, by
            running the model again, a few times.
        threshold: relative error of a layer beyond which it is pointed at; None is ``tolerance``,
            or 0.1.

    Raises:
        NSAConfigError: unknown or impossible options.
        TypeError: inputs of another structure than an exported program takes.
        ValueError: weights or inputs on the meta device, an output without a floating tensor,
            labels that do not fit it, or a tolerance that is no positive number.
        Exception: what the model itself raised.
    """
    config = NSAConfig.from_options(config)
    for name, value in (("tolerance", tolerance), ("threshold", threshold)):
        if value is not None and not (0 <= value < math.inf):
            raise ValueError(f"{name} must be a number from 0 up, got {value!r}")
    _check_real(model, (inputs, kwargs))
    runs = _runs(model, inputs, kwargs)
    dense = runs.compare(config)
    output, failures = runs.convert(config)
    given: dict[Any, Any] = {**dict(enumerate(inputs)), **kwargs}
    dtypes = [getattr(torch, row.dtype) for row in dense.rows if row.decision == "converted"]
    measured = end_to_end(dense.output, output, labels, given, dtypes)
    layers = _layers(dense)

    def error_of(other: NSAConfig) -> float:
        output, _ = runs.convert(other)
        return end_to_end(dense.output, output, None, given).relative_error

    suggestion = None
    if tolerance is not None:
        suggestion = suggest(layers, config, tolerance, error_of, measured.relative_error)
    return VerifyReport(
        model=runs.name,
        device=_device(dense.output),
        layers=layers,
        end_to_end=measured,
        threshold=next(x for x in (threshold, tolerance, THRESHOLD) if x is not None),
        suggestion=suggestion,
        failures=list(dict.fromkeys((*dense.failures, *failures))),
    )


def _runs(model: Any, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Runs:
    if isinstance(model, ExportedProgram):
        from nsa_compile.verification.program_runs import ProgramRuns

        return ProgramRuns(model, inputs, kwargs)
    from nsa_compile.verification.model_runs import ModelRuns

    return ModelRuns(model, inputs, kwargs)


def _layers(dense: Comparison) -> list[LayerCheck]:
    return [
        _layer(row, path, dense.seen.get((row.compile_id, row.module, row.ordinal)))
        for row, path in zip(dense.rows, dense.paths, strict=True)
    ]


def _layer(row: SiteRecord, path: str, seen: Observation | None) -> LayerCheck:
    known = (row.decision, row.reason, row.reason_text, row.mask, row.q_len, row.kv_len)
    layer = LayerCheck(path, row.ordinal, *known, pattern=row.module)
    if seen is None or not seen.runs:
        return layer
    distance = seen.distance
    return LayerCheck(
        path,
        row.ordinal,
        *known,
        relative_error=distance.relative,
        cosine=distance.cosine,
        max_error=distance.largest,
        coverage=seen.coverage,
        coverage_worst=None if seen.coverage is None else seen.worst,
        runs_dense=runs_dense(row),
        equal=_is_equal(seen, getattr(torch, row.dtype)),
        pattern=row.module,
    )


def _is_equal(seen: Observation, dtype: torch.dtype) -> bool:
    """Whether nothing was left out, and rounding explains the error."""
    everything = seen.coverage is None or seen.coverage > _EVERYTHING
    return everything and seen.distance.relative <= rounding(seen.dtype, dtype)


def _check_real(model: Any, inputs: Any) -> None:
    """Refuse what has no values."""
    state = getattr(model, "state_dict", dict)
    held = state() if callable(state) else state
    for what, tensors in (("weights", list(held.values())), ("inputs", tree_leaves(inputs))):
        if any(isinstance(tensor, Tensor) and tensor.is_meta for tensor in tensors):
            raise ValueError(
                f"verify runs the model and needs real {what}, got some on the meta device; load "
                "the weights first, or use nsa_compile.explain, which needs none"
            )


def _device(output: Any) -> str:
    found = next((x for x in tree_leaves(output) if isinstance(x, Tensor)), torch.empty(0))
    return str(found.device)
