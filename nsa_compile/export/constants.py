"""Tensor constants that a conversion adds to an exported program, as inputs of the graph alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    TensorArgument,
)


class Constants:
    """Adds constants to a graph and its signature, in front of the caller's own inputs.

    Attributes:
        values: the constants by name, as an exported program keeps them.
    """

    def __init__(self, gm: fx.GraphModule, signature: ExportGraphSignature) -> None:
        self.gm = gm
        self.signature = signature
        self.values: dict[str, torch.Tensor] = {}
        self._nodes: dict[fx.Node, torch.Tensor] = {}
        self._mode = detect_fake_mode(
            [node.meta.get("val") for node in gm.graph.find_nodes(op="placeholder")]
        )

    def add(self, tensor: torch.Tensor) -> fx.Node:
        """The input that holds a copy of ``tensor``; equal tensors share one."""
        for node, held in self._nodes.items():
            if held.dtype == tensor.dtype and torch.equal(held, tensor):
                return node
        specs = self.signature.input_specs
        placeholders = self.gm.graph.find_nodes(op="placeholder")
        own = (InputKind.USER_INPUT, InputKind.TOKEN)
        at = next((n for n, spec in enumerate(specs) if spec.kind in own), len(specs))
        before: Any = [*placeholders, None][at] or _first_call(self.gm.graph)
        taken = {spec.target for spec in specs}
        name = next(f"nsa_constant_{n}" for n in range(len(specs) + 1)
                    if f"nsa_constant_{n}" not in taken)  # fmt: skip
        with self.gm.graph.inserting_before(before):
            node = self.gm.graph.placeholder(f"c_{name}")
        node.target = node.name
        value = tensor.detach().clone()
        node.meta["val"] = (
            self._mode.from_tensor(value, static_shapes=True) if self._mode else value
        )
        spec = InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(node.name), name)
        specs.insert(at, spec)
        self.values[name] = self._nodes[node] = value
        return node


def _first_call(graph: fx.Graph) -> fx.Node:
    return next(node for node in graph.nodes if node.op != "placeholder")
