"""Capture: a model and a call of it -> the graphs that torch.compile would hand to a backend."""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo import pgo
from torch._dynamo.utils import counters
from torch._guards import CompileContext
from torch._subclasses.fake_tensor import fake_tensor_tls

from nsa_compile.dynamo_text import headline, mixes_devices

_CPU, _META = torch.device("cpu"), torch.device("meta")
# Capturing one model must not be cut short by what else was compiled in this process.
NO_LIMIT = {"recompile_limit": 1 << 16, "accumulated_recompile_limit": 1 << 16}


# Finds the placeholders of a graph whose values are known, given its example inputs.
Known = Callable[[fx.GraphModule, Sequence[Any]], dict[fx.Node, torch.Tensor]]


@dataclass(frozen=True)
class CapturedGraph:
    """One graph: ``values`` holds the tensors of placeholders (buffers) whose value is known.

    ``root`` is the module whose code it is; module paths in the graph start there.
    """

    gm: fx.GraphModule
    values: dict[fx.Node, torch.Tensor]
    compile_id: str
    root: nn.Module | None = None


@dataclass
class Capture:
    """What torch.compile saw of one forward call.

    Attributes:
        graphs: one for each frame that was captured; graph breaks make several.
        failures: code that could not be captured, as text: attention in it is not in any graph.
        notes: graph breaks, as text.
        error: the exception that ended the forward early, or None.
        seconds: time that Dynamo and the meta forward took.
    """

    graphs: list[CapturedGraph] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    error: Exception | None = None
    seconds: float = 0.0


def capture(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    dynamic: bool = False,
    values: Mapping[int, torch.Tensor] | None = None,
    known: Known | None = None,
) -> Capture:
    """Run ``model(*args, **kwargs)`` and keep every graph that is compiled.

    Args:
        model, args, kwargs: wholly on the meta device, or on real ones.
        dynamic: capture with symbolic sizes.
        values: real values of buffers, by the ``id`` of the meta tensor in ``model``.
        known: in place of ``values``, finds in a graph and its inputs which values are known.

    Returns:
        The graphs, with failures as values: an exception of the forward is in ``error``.
    """
    start = time.perf_counter()
    on_meta = known is None
    known = known or _standing_for(values or {})
    with _meta_constants() if on_meta else nullcontext():
        result = _run(model, args, kwargs, dynamic, known, nullcontext())
        if on_meta and result.error is not None and mixes_devices(result.error):
            # The forward makes tensors without naming a device. Dynamo traces a default device
            # three times slower, so only models that need it pay for it.
            result = _run(model, args, kwargs, dynamic, known, _META)
    result.seconds = time.perf_counter() - start
    for graph in result.graphs:
        _constants_to_cpu(graph.gm.graph)
    return result


def _run(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    dynamic: bool,
    known: Known,
    default_device: AbstractContextManager[Any],
) -> Capture:
    result = Capture()
    limits = torch._dynamo.config.patch(**NO_LIMIT)
    with _dynamo_counters(result), sizes_forgotten(), limits, default_device:
        try:
            torch.compile(model, backend=_keeper(result, known), dynamic=dynamic)(*args, **kwargs)
        except Exception as error:
            result.error = error
    return result


def _standing_for(values: Mapping[int, torch.Tensor]) -> Known:
    """The values of placeholders whose example input stands for one of ``values``."""

    def known(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> dict[fx.Node, torch.Tensor]:
        placeholders = gm.graph.find_nodes(op="placeholder")
        return {
            node: values[id(value)]
            for node, value in zip(placeholders, example_inputs, strict=True)
            if id(value) in values
        }

    return known


def _keeper(result: Capture, known: Known) -> Callable[..., Any]:
    """A backend that keeps its graphs in ``result`` and runs them as they are."""
    frames: dict[str, list[str]] = {}

    def keep(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        result.graphs.append(
            CapturedGraph(gm, known(gm, example_inputs), compile_id(frames), traced_module())
        )
        forward: Callable[..., Any] = gm.forward
        return forward

    return keep


def traced_module() -> nn.Module | None:
    """The module whose code Dynamo is compiling right now: the first among its locals."""
    scope = torch._dynamo.symbolic_convert.InstructionTranslator.current_tx().output.local_scope
    return next((value for value in scope.values() if isinstance(value, nn.Module)), None)


@contextmanager
def sizes_forgotten() -> Iterator[None]:
    """Dynamo remembers sizes by code: compiled in earnest, the model must not look dynamic."""
    known = pgo.get_code_state()
    before = copy.deepcopy(known)
    try:
        yield
    finally:
        known.clear()
        known.update(before)


@contextmanager
def _meta_constants() -> Iterator[None]:
    """``torch.tensor([], device="meta")`` is no fake tensor, and fake mode refuses to use it.

    The caches of Hugging Face models begin with one.
    """
    before = fake_tensor_tls.allow_non_fake_inputs_override
    fake_tensor_tls.allow_non_fake_inputs_override = True
    try:
        yield
    finally:
        fake_tensor_tls.allow_non_fake_inputs_override = before


def compile_id(frames: dict[str, list[str]]) -> str:
    """Dynamo's ``"frame/recompile"``, both counted from 0 in this capture.

    Dynamo counts for the whole process, which would make equal captures differ.
    """
    frame, _, recompile = str(CompileContext.current_compile_id() or "0/0").rpartition("/")
    recompiles = frames.setdefault(frame, [])
    if recompile not in recompiles:
        recompiles.append(recompile)
    return f"{list(frames).index(frame)}/{recompiles.index(recompile)}"


@contextmanager
def _dynamo_counters(result: Capture) -> Iterator[None]:
    """Turn what Dynamo counted during the block into failures and notes."""
    before = {name: Counter(counters[name]) for name in ("frames", "graph_break", "unimplemented")}
    yield
    new = {name: Counter(counters[name]) - known for name, known in before.items()}
    breaks = [headline(reason) for reason in new["graph_break"]]
    skipped = new["frames"]["total"] - new["frames"]["ok"]
    if skipped > 0 and result.error is None:
        reasons = [headline(reason) for reason in new["unimplemented"]] or ["no reason given"]
        result.failures.append(
            f"{skipped} function{'s' * (skipped > 1)} could not be captured and would run in "
            f"eager mode; attention in such code is not listed: {'; '.join(dict.fromkeys(reasons))}"
        )
    result.notes += [f"graph break: {reason}" for reason in dict.fromkeys(breaks)]


def _constants_to_cpu(graph: fx.Graph) -> None:
    """Let tensor factories in the graph name the CPU: a proof may evaluate them for values."""
    for node in graph.nodes:
        if node.kwargs.get("device") == _META:
            node.kwargs = {**node.kwargs, "device": _CPU}
