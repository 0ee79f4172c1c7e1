"""What mask proofs take for granted, as assertions in the graph: it has no dense form to run."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from nsa_compile.export.constants import Constants
from nsa_compile.passes.emit import Caller
from nsa_compile.passes.pipeline import Conversion


def add_checks(
    gm: fx.GraphModule,
    conversion: Conversion,
    values: Mapping[fx.Node, torch.Tensor],
    constants: Constants,
) -> None:
    """Assert, ahead of all other calls, what ``conversion`` holds for.

    A buffer whose ``values`` were read has to be equal to a copy of what it was, which the program
    then holds as a constant; constants need no such check. On a GPU a failing assertion is one of
    the device.
    """
    aten = torch.ops.aten
    first = next(node for node in gm.graph.nodes if node.op != "placeholder")
    buffers = constants.signature.inputs_to_buffers
    read = [node for node in conversion.guarded if node.name in buffers]
    known = {node: constants.add(values[node]) for node in read}
    with gm.graph.inserting_before(first):
        call = Caller(gm.graph, first)
        for node, constant in known.items():
            said = f"mask buffer {node.name} changed: convert the program again"
            _assert(call(aten.eq.Tensor, node, constant), said, call)
        for node in conversion.binary:
            said = f"padding mask {node.name} holds more than 0 and 1, for which it was proven"
            either = (call(aten.eq.Scalar, node, number) for number in (0, 1))
            _assert(call(aten.logical_or.default, *either), said, call)


def _assert(condition: fx.Node, said: str, call: Caller) -> None:
    every = call(torch.ops.aten.all.default, condition)
    call(torch.ops.aten._assert_async.msg, every, f"nsa_compile: {said}")
