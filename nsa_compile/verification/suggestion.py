"""Which layers to keep dense so that the output stays within a tolerance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from nsa_compile.passes.config import NSAConfig
from nsa_compile.verification.report import LayerCheck, Suggestion


def suggest(
    layers: Sequence[LayerCheck],
    config: NSAConfig,
    tolerance: float,
    error_of: Callable[[NSAConfig], float],
    error: float,
) -> Suggestion:
    """Keep the worst layers dense, as few as it takes.

    Layers are taken from the largest error of their own down; how many it takes is found by
    halving, with a run for every count that is looked at. The answer is always one that was run.

    Args:
        error_of: runs the model under a configuration; the relative error of its output.
        error: that of ``config`` itself.
    """
    worst = _worst_first(layers)
    errors = {0: error}

    def measured(count: int) -> float:
        if count not in errors:
            errors[count] = error_of(_keeping(config, worst[:count]))
        return errors[count]

    count = 0
    if not error <= tolerance and worst:
        low, count = 0, len(worst)
        measured(count)
        while count - low > 1:
            middle = (low + count) // 2
            low, count = (low, middle) if measured(middle) <= tolerance else (middle, count)
    kept = worst[:count]
    converted = [each for each in layers if each.decision == "converted"]
    return Suggestion(
        tolerance=tolerance,
        met=measured(count) <= tolerance,
        keep_dense=tuple(kept),
        options={"exclude": [*config.exclude, *kept]} if kept else {},
        relative_error=measured(count),
        converted=sum(each.pattern not in kept for each in converted),
        runs=len(errors) - 1,
    )


def _worst_first(layers: Sequence[LayerCheck]) -> list[str]:
    """What names the converted layers, by their largest error; those of one name go together."""
    errors: dict[str, float] = {}
    for layer in layers:
        if layer.decision == "converted":
            error = float("inf") if layer.relative_error is None else layer.relative_error
            errors[layer.pattern] = max(error, errors.get(layer.pattern, 0.0))
    return sorted(errors, key=lambda name: -errors[name])


def _keeping(config: NSAConfig, kept: Sequence[str]) -> NSAConfig:
    changes: dict[str, Any] = {"exclude": (*config.exclude, *kept)}
    return replace(config, **changes)
