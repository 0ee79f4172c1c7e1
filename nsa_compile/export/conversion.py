"""nsa_compile.convert: an exported program with its attention rewritten, as an exported program."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

import nsa_compile.kernels.library  # noqa: F401  registers torch.ops.nsa
from nsa_compile.dynamo_text import describe
from nsa_compile.export.checks import add_checks
from nsa_compile.export.constants import Constants
from nsa_compile.passes import dialect
from nsa_compile.passes.config import NSAConfig
from nsa_compile.passes.masks.mutation import base
from nsa_compile.passes.operators import to_operators
from nsa_compile.passes.pipeline import analyse, rewrite
from nsa_compile.passes.projection import LENGTHS
from nsa_compile.passes.record import record
from nsa_compile.report import RewriteReport


class ConvertError(RuntimeError):
    """A program that cannot be converted; the text says why."""


def convert(
    program: ExportedProgram,
    config: NSAConfig | Mapping[str, Any] | None = None,
    *,
    name: str | None = None,
    lengths: Sequence[int] = LENGTHS,
) -> tuple[ExportedProgram, RewriteReport]:
    """Rewrite the attention of an exported program, as ``torch.compile(backend="nsa")`` would.

    The result holds operators alone (``torch.ops.nsa.*`` and aten), so ``torch.export.save`` writes
    it, ``torch.export.load`` reads it wherever ``nsa_compile`` has been imported, and
    ``torch._inductor.aoti_compile_and_package`` compiles it. Weights, buffers, names of inputs and
    outputs, mutations and symbolic sizes are those of ``program``, which stays as it is. Tensors
    are shared, not copied.

    There is no dense graph to fall back to. What a proof took for granted is asserted in the
    program: a mask buffer that was read keeps its values, a padding mask that the model does
    arithmetic on holds 0 and 1. A layer whose check cannot be said in operators (a BlockMask of
    flex_attention that comes in as an input) stays dense.

    Args:
        program: from ``torch.export.export`` or ``torch.export.load``.
        config: options of the backend; ``inner`` has no part in it.
        name: what the report calls the model; None is the class that was exported.
        lengths: of the sequences for which the report predicts costs.

    Returns:
        The converted program, ``program`` itself if there is nothing to convert, and the report.

    Raises:
        NSAConfigError: unknown or impossible options.
        ConvertError: the rewrite failed: a ``selector`` function may read values, which no program
            can hold; or a prepared model was exported in another process, and not converted there.
    """
    if not isinstance(program, ExportedProgram):
        raise TypeError(
            f"expected a torch.export.ExportedProgram, got {type(program).__name__}; call "
            "torch.export.export(model, args) first"
        )
    config = NSAConfig.from_options(config)
    gm = _copy(program)
    values = known_values(program, gm)
    try:
        conversion = analyse(gm, config, values=values, checks_blocks=False)
    except LookupError as error:  # a prepared model, exported in another process
        raise ConvertError(str(error.args[0])) from error
    rows = [record(decision, "0/0", lengths) for decision in conversion.decisions]
    report = RewriteReport.merge(name or root_class(gm), rows)
    if not conversion.changes:
        return program, report
    signature = copy.deepcopy(program.graph_signature)
    constants = Constants(gm, signature)
    try:
        with gm._set_replace_hook(signature.get_replace_hook()):
            add_checks(gm, conversion, values, constants)
            rewrite(gm, conversion)
            to_operators(gm, constants.add)
    except Exception as error:
        raise ConvertError(f"the rewrite failed: {describe(error)}") from error
    return _assembled(program, gm, signature, constants.values), report


def known_values(program: ExportedProgram, gm: fx.GraphModule) -> dict[fx.Node, torch.Tensor]:
    """Real tensors of the placeholders of ``gm`` that nothing writes to: buffers, constants."""
    signature = program.graph_signature
    names = {**signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
    held = {**program.constants, **program.state_dict}
    changed = {base(target) for node in gm.graph.nodes for target in dialect.written(node)}
    mutated = set(signature.buffers_to_mutate.values())
    values = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        target = names.get(node.name)
        tensor = held.get(target)
        if node in changed or target in mutated or not isinstance(tensor, torch.Tensor):
            continue
        if not tensor.is_meta:
            values[node] = tensor.detach()
    return values


def _copy(program: ExportedProgram) -> fx.GraphModule:
    """The graph, to write to; weights are no part of it."""
    gm: fx.GraphModule = copy.deepcopy(program.graph_module)
    gm.meta.update(program.graph_module.meta)
    return gm


def _assembled(
    program: ExportedProgram, gm: fx.GraphModule, signature: Any, constants: dict[str, torch.Tensor]
) -> ExportedProgram:
    """``program`` with the graph ``gm``."""
    made = ExportedProgram(
        root=gm,
        graph=gm.graph,
        graph_signature=signature,
        state_dict=program.state_dict,
        range_constraints=dict(program.range_constraints),
        module_call_graph=_calls(program),
        example_inputs=program.example_inputs,
        constants={**program.constants, **constants},
        verifiers=program.verifiers,
    )
    made.graph_module.meta.update(gm.meta)
    return made


def _calls(program: ExportedProgram) -> list[Any]:
    """A copy of the calls, whose tree structures, which nobody writes to, are shared."""
    signatures = [entry.signature for entry in program.module_call_graph if entry.signature]
    specs = [spec for each in signatures for spec in (each.in_spec, each.out_spec)]
    return copy.deepcopy(program.module_call_graph, {id(spec): spec for spec in specs})


def root_class(gm: fx.GraphModule) -> str:
    """The class of the module that was exported."""
    for node in gm.graph.nodes:
        for path, cls in (node.meta.get("nn_module_stack") or {}).values():
            if not path:
                full = cls if isinstance(cls, str) else cls.__name__
                return full.rpartition(".")[2]
    return "ExportedProgram"
