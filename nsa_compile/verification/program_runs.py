"""Runs of an exported program: its own graph, fed with its own state."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.utils._pytree import tree_flatten, tree_unflatten

from nsa_compile.export.call import call_text
from nsa_compile.export.conversion import convert, known_values, root_class
from nsa_compile.export.file import children
from nsa_compile.passes.config import NSAConfig
from nsa_compile.passes.pipeline import analyse
from nsa_compile.verification.run import Comparison, copied


def _fits(expected: Any, given: Any) -> bool:
    if not (isinstance(expected, Tensor) and isinstance(given, Tensor)):
        return True
    sizes = zip(expected.shape, given.shape, strict=False)
    return expected.dim() == given.dim() and all(
        not isinstance(size, int) or size == got for size, got in sizes
    )


class ProgramRuns:
    """Runs ``program`` on inputs like those that it was exported with."""

    def __init__(
        self, program: ExportedProgram, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        self.program, self.name = program, root_class(program.graph_module)
        spec = program.call_spec.in_spec
        order = [key for key in children(spec)[1].context if key in kwargs] if spec else []
        rest = [key for key in kwargs if key not in order]
        self.kwargs = {key: kwargs[key] for key in (*order, *rest)}
        self.leaves, given = tree_flatten((args, self.kwargs))
        if (spec is not None and given != spec) or not self._fit():
            taken = program.example_inputs
            expected = "others" if taken is None else f"({call_text(*taken)})"
            raise TypeError(
                f"the program takes {expected}, got ({call_text(args, kwargs)}); pass inputs of "
                "the structure and of the sizes that it was exported with"
            )

    def _fit(self) -> bool:
        """Whether the inputs have the sizes that are fixed in the graph."""
        values = {
            node.name: node.meta.get("val")
            for node in self.program.graph.find_nodes(op="placeholder")
        }
        own = [values.get(name) for name in self.program.graph_signature.user_inputs]
        return all(map(_fits, own, self.leaves))

    def compare(self, config: NSAConfig) -> Comparison:
        gm: fx.GraphModule = copy.deepcopy(self.program.graph_module)
        comparison = Comparison()
        values = known_values(self.program, gm)
        conversion = analyse(gm, config, values=values, checks_blocks=False)
        comparison.add(gm, conversion, "0/0")
        comparison.output = self._run(gm, self.program)
        return comparison

    def convert(self, config: NSAConfig) -> tuple[Any, list[str]]:
        converted, _ = convert(self.program, config)
        return self._run(converted.graph_module, converted), []

    def _run(self, gm: fx.GraphModule, program: ExportedProgram) -> Any:
        """The caller's outputs of ``gm``, a graph with the signature of ``program``."""
        held = {**program.constants, **program.state_dict}
        own = iter(copied(self.leaves))
        given = []
        for spec in program.graph_signature.input_specs:
            if spec.kind is InputKind.USER_INPUT:
                given.append(next(own))
            elif spec.kind is InputKind.BUFFER:
                given.append(held[spec.target].clone())
            else:
                given.append(held[spec.target])
        with torch.no_grad():
            results = gm(*given)
        outputs = []
        for spec, result in zip(program.graph_signature.output_specs, results, strict=True):
            if spec.kind is OutputKind.USER_OUTPUT:
                constant = isinstance(spec.arg, ConstantArgument)
                outputs.append(spec.arg.value if constant else result)
        return tree_unflatten(outputs, program.call_spec.out_spec)
