"""VerifyReport: what was measured, as values, JSON and a table."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from nsa_compile.verification.table import table, table_text

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class LayerCheck:
    """One attention layer, dense and sparse on the inputs that it has in the dense model.

    Attributes:
        module, ordinal, decision, reason, reason_text, mask, q_len, kv_len: as in the conversion's
            report (docs/report.md).
        relative_error: norm of the difference over the norm of the dense output; None if the layer
            is kept or did not run.
        cosine: between the two outputs as one vector each.
        max_error: largest difference of one element.
        coverage: share of attention that lies in the chosen blocks, a mean over queries and heads.
        coverage_worst: the least share of any query.
        runs_dense: the sequence is no longer than ``dense_len``.
        equal: the same but for rounding.
        pattern: what ``exclude`` and ``per_layer`` match this layer by.
    """

    module: str
    ordinal: int
    decision: str
    reason: str | None
    reason_text: str | None
    mask: str
    q_len: int | str
    kv_len: int | str
    relative_error: float | None = None
    cosine: float | None = None
    max_error: float | None = None
    coverage: float | None = None
    coverage_worst: float | None = None
    runs_dense: bool = False
    equal: bool | None = None
    pattern: str = ""


@dataclass(frozen=True)
class EndToEnd:
    """The outputs of the dense and of the converted model, in which errors of layers add up.

    Attributes:
        shape: of the output that is compared: logits, or the first floating tensor.
        relative_error, max_error, cosine: as in :class:`LayerCheck`.
        kl: mean KL(dense || converted) in nats a token; None where the output is no logits.
        top1_agreement: share of tokens for which both rank the same one first.
        tokens: that these two count.
        perplexity_dense, perplexity_converted: on the labels; None without.
        equal: the same but for rounding.
    """

    shape: tuple[int, ...]
    relative_error: float
    max_error: float
    cosine: float
    kl: float | None
    top1_agreement: float | None
    tokens: int | None
    perplexity_dense: float | None
    perplexity_converted: float | None
    equal: bool


@dataclass(frozen=True)
class Suggestion:
    """The layers to keep dense for a tolerance, found by running and not by adding up.

    Attributes:
        tolerance: relative error of the output that was asked for.
        met: whether a run with ``options`` stayed within it.
        keep_dense: patterns of the layers to keep dense.
        options: options of the backend that say so.
        relative_error: what that run measured.
        converted: layers that are still converted.
        runs: forwards that the search took.
    """

    tolerance: float
    met: bool
    keep_dense: tuple[str, ...]
    options: dict[str, Any]
    relative_error: float
    converted: int
    runs: int


@dataclass(frozen=True)
class VerifyReport:
    """What :func:`nsa_compile.verify` measured. Print it for a table.

    Attributes:
        device: that the output was on.
        layers: one for each attention, in the order of the graphs; kept ones with their reason.
        threshold: relative error of a layer beyond which it counts as far off.
        suggestion: None unless a tolerance was given.
        failures: what was not compared, or ran dense, as text.
    """

    model: str
    device: str
    layers: list[LayerCheck]
    end_to_end: EndToEnd
    threshold: float
    suggestion: Suggestion | None = None
    failures: list[str] = field(default_factory=list)

    @property
    def converted(self) -> list[LayerCheck]:
        return [layer for layer in self.layers if layer.decision == "converted"]

    @property
    def kept(self) -> list[LayerCheck]:
        return [layer for layer in self.layers if layer.decision != "converted"]

    @property
    def first_beyond(self) -> LayerCheck | None:
        """The first layer, in the order of the graphs, whose error exceeds the threshold."""
        for layer in self.converted:
            if layer.relative_error is not None and not layer.relative_error <= self.threshold:
                return layer
        return None

    @property
    def equal(self) -> bool:
        """Whether every layer and the output are those of the dense model, but for rounding."""
        return self.end_to_end.equal and all(layer.equal is not False for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """The JSON contract, schema version 1 (docs/verify.md); null for what is not finite."""
        beyond = self.first_beyond
        values = {
            "schema_version": SCHEMA_VERSION,
            "model": self.model,
            "torch": torch.__version__,
            "device": self.device,
            "equal": self.equal,
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "end_to_end": dataclasses.asdict(self.end_to_end),
            "threshold": self.threshold,
            "first_beyond": None if beyond is None else beyond.module,
            "suggestion": self.suggestion and dataclasses.asdict(self.suggestion),
            "failures": list(self.failures),
        }
        return {key: _finite(value) for key, value in values.items()}

    def to_json(self) -> str:
        """:meth:`to_dict` as indented JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        return table_text(self)

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        yield table(self)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, (list, tuple)) else value
