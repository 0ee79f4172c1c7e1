"""What one forward gave: the report rows, each layer's measures, the model's output."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from nsa_compile.passes.comparing import Comparer
from nsa_compile.passes.config import NSAConfig
from nsa_compile.passes.pipeline import Conversion, rewrite
from nsa_compile.passes.record import record
from nsa_compile.passes.site import SiteRecord
from nsa_compile.verification.measures import Observation

# Compile id, module path as the graph has it, ordinal.
Key = tuple[str, str, int]


@dataclass
class Comparison:
    """A dense forward in which every layer that converts was also computed sparse.

    Attributes:
        rows: one record for each attention, in the order of the graphs.
        paths: of each row, the module path from the model on; a graph after a graph break has its
            own.
        seen: measures by key; sites that share their code share them.
        failures: what could not be compared, as text.
        output: of the dense model.
    """

    rows: list[SiteRecord] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    seen: dict[Key, Observation] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    output: Any = None

    def add(
        self, gm: fx.GraphModule, conversion: Conversion, compile_id: str, prefix: str = ""
    ) -> None:
        """Take in the verdicts on ``gm`` and make it measure when it runs."""
        for decision in conversion.decisions:
            self.rows.append(record(decision, compile_id))
            self.paths.append(".".join(p for p in (prefix, decision.site.module) if p))
        if not conversion.changes:
            return
        for group in _sharing(conversion):
            shared = Observation()
            self.seen |= {(compile_id, *key): shared for key in group}

        def observe(module: str, ordinal: int, *shown: Any) -> None:
            self.seen[compile_id, module, ordinal].add(*shown)

        rewrite(gm, conversion, partial(Comparer, observe=observe))


class Runs(Protocol):
    """A model with inputs, to be run under one configuration or another."""

    name: str

    def compare(self, config: NSAConfig) -> Comparison:
        """Run dense, measuring each layer."""

    def convert(self, config: NSAConfig) -> tuple[Any, list[str]]:
        """Run converted -> output, what fell back to dense."""


def _sharing(conversion: Conversion) -> Iterable[list[tuple[str, int]]]:
    """Module path and ordinal of the converted sites, those of one piece of code together."""
    groups: dict[fx.Node, list[tuple[str, int]]] = {}
    for decision in conversion.decisions:
        if decision.converted:
            node = decision.site.output
            if conversion.reading is not None:
                node = conversion.reading.inlined.site(node)[1]
            groups.setdefault(node, []).append((decision.site.module, decision.site.ordinal))
    return groups.values()


def copied(inputs: Any) -> Any:
    """``inputs`` with tensors and objects (caches) of their own: a forward may write to them."""
    return tree_map(_copy, inputs)


def _copy(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else copy.deepcopy(leaf)


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Evaluate without gradients and with fixed random numbers; buffers and modes come back."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    training = [module.training for module in modules]
    held = [
        (module._buffers, name, tensor, tensor.clone(), _version(tensor))
        for module in modules
        for name, tensor in module._buffers.items()
        if tensor is not None
    ]
    for module in modules:
        module.training = False
    try:
        with torch.no_grad(), torch.random.fork_rng(_devices(modules)):
            torch.manual_seed(0)
            yield
    finally:
        for module, mode in zip(modules, training, strict=True):
            module.training = mode
        _restore(held)


def _restore(held: Iterable[tuple[dict[str, Any], str, Tensor, Tensor, int | None]]) -> None:
    """Put every buffer back; one that nobody wrote to keeps its version, which guards look at."""
    for buffers, name, tensor, before, version in held:
        buffers[name] = tensor
        if _version(tensor) != version:
            with torch.no_grad():
                tensor.copy_(before)


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _devices(modules: Iterable[nn.Module]) -> list[int]:
    """The GPUs that hold parameters."""
    found = {p.device for module in modules for p in module._parameters.values() if p is not None}
    return sorted({device.index or 0 for device in found if device.type == "cuda"})


Options = Mapping[str, Any]
Backend = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]
