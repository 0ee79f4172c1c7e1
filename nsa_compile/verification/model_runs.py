"""Runs of a model that torch.compile captures, as the backend would get it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from nsa_compile import compilations
from nsa_compile.backend import conditions_of, constant_inputs, nsa
from nsa_compile.capture import NO_LIMIT, compile_id, sizes_forgotten, traced_module
from nsa_compile.dynamo_text import describe
from nsa_compile.nn.parameters import prepared_sites
from nsa_compile.passes.config import NSAConfig
from nsa_compile.passes.pipeline import analyse
from nsa_compile.passes.snapshot import Snapshot
from nsa_compile.verification.run import Backend, Comparison, copied, undisturbed


class ModelRuns:
    """Runs ``model(*args, **kwargs)`` in eval mode; nothing is compiled further than the graph."""

    def __init__(
        self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        self.model: Any = getattr(model, "_orig_mod", model)
        self.args, self.kwargs = args, dict(kwargs)
        is_module = isinstance(self.model, nn.Module)
        name = type(model).__name__ if is_module else getattr(model, "__qualname__", repr(model))
        self.name = type(self.model).__name__ if is_module else str(name)

    def compare(self, config: NSAConfig) -> Comparison:
        comparison = Comparison()
        comparison.output, _ = self._run(self._comparing(config, comparison))
        return comparison

    def convert(self, config: NSAConfig) -> tuple[Any, list[str]]:
        config = replace(config, inner="eager", strict=False)

        def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
            return nsa(gm, example_inputs, options=config)

        return self._run(backend)

    def _run(self, backend: Backend) -> tuple[Any, list[str]]:
        compiled = torch.compile(self.model, backend=backend, dynamic=False)
        limits = torch._dynamo.config.patch(**NO_LIMIT)
        with undisturbed(self.model), limits, sizes_forgotten():
            args, kwargs = copied((self.args, self.kwargs))
            output = compiled(*args, **kwargs)
        try:
            return output, list(compilations.report(compiled).failures)
        except TypeError:  # nothing was compiled
            return output, []

    def _comparing(self, config: NSAConfig, comparison: Comparison) -> Backend:
        """A backend that measures every layer, and goes on with what is dense."""
        frames: dict[str, list[str]] = {}
        named = self.model.named_modules() if isinstance(self.model, nn.Module) else ()
        paths = {id(module): path for path, module in named}

        def compare(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
            root = traced_module()
            name, prefix = compile_id(frames), paths.get(id(root), "")
            dense = Snapshot(gm)
            values = constant_inputs(gm, example_inputs)
            try:
                conversion = analyse(gm, config, values=values, prepared=prepared_sites(root))
                conditions = conditions_of(gm, conversion, values)
                comparison.add(gm, conversion, name, prefix)
            except Exception as error:  # ours, not the model's
                comparison.failures.append(f"graph {name} is not compared: {describe(error)}")
                return dense.module().forward  # type: ignore[no-any-return]

            def run(*args: Any) -> Any:
                # Where a condition fails the converted model runs dense, and its report says so.
                holds = all(condition(args) is None for condition in conditions)
                return (gm if holds else dense.module())(*args)

            return run

        return compare
