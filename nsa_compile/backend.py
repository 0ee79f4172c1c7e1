"""The torch.compile backend "nsa": convert a Dynamo graph, report it, compile the result."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo import lookup_backend
from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException
from torch._guards import CompileContext, GuardSource
from torch._subclasses.fake_tensor import FakeTensor

import nsa_compile.kernels.library  # noqa: F401  registers torch.ops.nsa
from nsa_compile import compilations
from nsa_compile.buckets import compile_parts
from nsa_compile.capture import traced_module
from nsa_compile.compilations import CompiledGraph
from nsa_compile.guards import (
    Agreement,
    Binary,
    Condition,
    ConversionWarning,
    GuardedCallable,
    Unchanged,
)
from nsa_compile.hook_guards import guard_absent_hooks
from nsa_compile.nn.parameters import prepared_sites
from nsa_compile.passes.config import NSAConfig, NSAConfigError
from nsa_compile.passes.pipeline import Conversion, analyse, rewrite
from nsa_compile.passes.record import failed_record, record
from nsa_compile.passes.site import SiteRecord
from nsa_compile.passes.snapshot import Snapshot
from nsa_compile.trace import trace

Compiled = Callable[..., Any]


class StrictError(RuntimeError):
    """strict=True, and at least one attention layer would stay dense."""


def nsa(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | NSAConfig | None = None,
    mode: str | None = None,
) -> Compiled:
    """Dynamo backend: rewrite attention to Native Sparse Attention, then compile with ``inner``.

    Args:
        gm: the graph that Dynamo captured.
        example_inputs: its inputs; parameters and buffers are real tensors.
        options: any field of :class:`NSAConfig`, and ``mode``: ``torch.compile`` takes either its
            own ``mode`` or ``options``, never both.
        mode: Inductor's mode, as in ``torch.compile``; needs ``inner="inductor"``.

    Raises:
        NSAConfigError: unknown or impossible options.
        StrictError: ``strict`` is set and a layer stays dense.
    """
    if isinstance(options, Mapping) and "mode" in options:
        mode, options = options["mode"], {k: v for k, v in options.items() if k != "mode"}
    config = NSAConfig.from_options(options)
    if mode and config.inner != "inductor":
        raise NSAConfigError(f"mode={mode!r} needs inner='inductor', got inner={config.inner!r}")
    guard_absent_hooks()
    entry = _begin()
    values = constant_inputs(gm, example_inputs)
    try:
        conversion = analyse(gm, config, values=values, prepared=prepared_sites(entry.root()))
        entry.records = _records(conversion, entry)
    except Exception as error:
        return _untouched(gm, example_inputs, config, mode, entry, error)
    trace(entry)
    _enforce_strict(config, entry.records)
    if not conversion.changes:
        return _inner(gm, example_inputs, config, mode)
    original = Snapshot(gm)
    conditions = conditions_of(gm, conversion, values)
    try:
        rewrite(gm, conversion)
        compiled = _inner(gm, example_inputs, config, mode)
    except Exception as error:
        if _is_control_flow(error):
            compilations.discard(entry)
            raise
        return _untouched(original.module(), example_inputs, config, mode, entry, error)
    if not conditions:
        return compiled
    return GuardedCallable(
        compiled, lambda: _inner(original.module(), example_inputs, config, mode), conditions, entry
    )


def _inner(
    gm: fx.GraphModule, example_inputs: Sequence[Any], config: NSAConfig, mode: str | None
) -> Compiled:
    """Compile ``gm`` with the compiler the user chose."""

    def compile_part(part: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        if config.inner != "inductor":
            compiled: Compiled = lookup_backend(config.inner)(part, list(inputs))
            return compiled
        from torch._inductor import list_mode_options
        from torch._inductor.compile_fx import compile_fx

        patches = list_mode_options(mode) if mode else None
        compiled = compile_fx(part, list(inputs), config_patches=patches)
        return compiled

    return compile_parts(gm, example_inputs, compile_part)


def _untouched(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    config: NSAConfig,
    mode: str | None,
    entry: CompiledGraph,
    error: Exception,
) -> Compiled:
    """Compile the user's own graph after an internal failure: warned about once, and reported."""
    text = f"graph {entry.compile_id} of {entry.model} stays dense: {type(error).__name__}: {error}"
    try:
        compiled = _inner(gm, example_inputs, config, mode)
    except Exception:
        compilations.discard(entry)  # nothing was compiled: there is nothing to report
        raise
    entry.failures.append(text)
    entry.records = [failed_record(row, text) for row in entry.records]
    trace(entry)
    warnings.warn(f"nsa_compile failed and left the model as it was; {text}", ConversionWarning, 2)
    return compiled


def _is_control_flow(error: Exception) -> bool:
    """Dynamo restarts and skips frames through exceptions; only a failed compile is ours."""
    return isinstance(error, TorchDynamoException) and not isinstance(error, BackendCompilerFailed)


def _begin() -> CompiledGraph:
    """Open the report entry of this backend call, tied to the torch.compile call it came from."""
    tracer = torch._dynamo.symbolic_convert.InstructionTranslator.current_tx()
    name, root = tracer.output.root_tx.f_code.co_name, traced_module()
    model = type(root).__name__ if root is not None else name
    compile_id = str(CompileContext.current_compile_id())
    return compilations.begin(_caller(), compile_id, root, model, tracer.output)


def _caller() -> object:
    """The object torch.compile made for this backend: it stands on the stack just above us."""
    frame = sys._getframe(2)
    for _ in range(8):
        owner = frame.f_locals.get("self")
        if isinstance(owner, torch._TorchCompileWrapper):
            return owner
        if frame.f_back is None:
            break
        frame = frame.f_back
    return nsa


def constant_inputs(
    gm: fx.GraphModule, example_inputs: Sequence[Any]
) -> dict[fx.Node, torch.Tensor]:
    """Real tensors of placeholders that belong to a module or a global and are not parameters.

    Their values may be read for a proof, since the guard can see a change: a tensor without a
    version counter (inference mode) is left out.
    """
    constants = {}
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True):
        if not isinstance(value, torch.Tensor) or isinstance(value, (nn.Parameter, FakeTensor)):
            continue
        if _is_state(node) and not value.is_inference() and not value.requires_grad:
            constants[node] = value
    return constants


def _is_state(node: fx.Node) -> bool:
    """Whether a placeholder stands for module state or a global, not for a call's argument."""
    if "_dynamo_static_input_type" in (node.meta.get("tensor_dict") or {}):
        return True
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        return False
    kind = source.guard_source
    return (kind() if callable(kind) else kind) is GuardSource.GLOBAL


def conditions_of(
    gm: fx.GraphModule, conversion: Conversion, values: Mapping[fx.Node, torch.Tensor]
) -> list[Condition]:
    """What the proofs took for granted, to be looked at in every call."""
    position = {node: at for at, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
    found: list[Condition] = [Unchanged(position[n], values[n]) for n in conversion.guarded]
    found += [Binary(position[n]) for n in conversion.binary]
    found += [Agreement(blocks, position) for blocks in conversion.blocks]
    return found


def _records(conversion: Conversion, entry: CompiledGraph) -> list[SiteRecord]:
    return [record(decision, entry.compile_id) for decision in conversion.decisions]


def _enforce_strict(config: NSAConfig, records: Sequence[SiteRecord]) -> None:
    kept = [row for row in records if row.decision == "kept"]
    if not config.strict or not kept:
        return
    lines = [
        f"  {row.module or '(no module path)'} ({row.source}): {row.reason}: {row.reason_text}"
        for row in kept
    ]
    raise StrictError(
        f"strict=True, and {len(kept)} of {len(records)} attention layers would stay dense:\n"
        + "\n".join(lines)
    )
