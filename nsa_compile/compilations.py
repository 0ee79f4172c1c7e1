"""Remembers what the backend did for each torch.compile call, so that report() can tell."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from nsa_compile.passes.site import SiteRecord
from nsa_compile.report import RewriteReport


@dataclass
class CompiledGraph:
    """One call of the backend: one graph of one compilation.

    Attributes:
        compile_id: Dynamo's id, ``"frame/recompile"``.
        owner: weak reference to the callable that ``torch.compile`` made for the backend.
        root: weak reference to the module whose code was compiled, or None for a function.
        layout: the names, classes and sizes of that module, by which Dynamo shares its code.
        trace: weak reference to Dynamo's trace that the graph comes from, or a part of it.
        failures: internal failures (the graph was compiled untouched, or fell back at run time).
    """

    compile_id: str
    owner: Callable[[], Any]
    root: Callable[[], Any]
    model: str
    layout: int = 0
    trace: Callable[[], Any] = lambda: None
    records: list[SiteRecord] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


_graphs: list[CompiledGraph] = []


def begin(
    owner: object, compile_id: str, root: object, model: str, trace: object = None
) -> CompiledGraph:
    """Start the entry of one backend call.

    A call that Dynamo restarted has a new trace and replaces its entry; the parts into which one
    trace is split (for DistributedDataParallel) have an entry each.
    """
    _graphs[:] = [
        entry
        for entry in _graphs
        if entry.owner() is not None
        and not (
            entry.owner() is owner
            and entry.compile_id == compile_id
            and (trace is None or entry.trace() is not trace)
        )
    ]
    layout = _layout(root) if isinstance(root, nn.Module) else 0
    entry = CompiledGraph(compile_id, weakref.ref(owner), _weak(root), model, layout, _weak(trace))
    _graphs.append(entry)
    return entry


def discard(entry: CompiledGraph) -> None:
    """Forget a backend call that Dynamo will restart."""
    _graphs[:] = [known for known in _graphs if known is not entry]


def report(compiled: object) -> RewriteReport:
    """Which attention layers were converted, which were not, and why.

    Args:
        compiled: what ``torch.compile(..., backend="nsa")`` returned, or a module that had
            ``.compile(backend="nsa")`` called on it or on its submodules.

    Returns:
        One report over every graph compiled so far: graph breaks and recompiles are merged. Models
        that are built alike and compiled with equal options share Dynamo's code, and the report.

    Raises:
        TypeError: ``compiled`` was not compiled with this backend.
    """
    owners, modules, name = _owners(compiled)
    paths = {id(module): path for path, module in reversed(modules.items())}
    equal = [entry for entry in _graphs if any(entry.owner() == known for known in owners)]
    own = [
        entry
        for entry in equal
        if id(entry.root()) in paths or any(entry.owner() is known for known in owners)
    ]
    if not own and modules:
        # Dynamo shares code between equal torch.compile calls on models that are built alike.
        layout = _layout(modules[""])
        own = [entry for entry in equal if entry.layout == layout]
    return RewriteReport.merge(
        name,
        [row for entry in own for row in _absolute(entry, paths.get(id(entry.root()), ""))],
        [failure for entry in own for failure in entry.failures],
    )


def _absolute(entry: CompiledGraph, prefix: str) -> list[SiteRecord]:
    """The rows with module paths from the top: a graph break leaves them relative to its frame."""
    return [
        replace(row, module=".".join(part for part in (prefix, row.module) if part))
        for row in entry.records
    ]


def _layout(root: nn.Module) -> int:
    """Equal for modules that are built alike."""
    modules = [(path, type(module)) for path, module in root.named_modules()]
    # Not state_dict: its hooks shard the parameters of fully_shard, in the middle of a forward.
    state = (*root.named_parameters(), *root.named_buffers())
    tensors = [(path, x.shape, x.dtype) for path, x in state]
    return hash((*modules, *tensors))


def _owners(compiled: object) -> tuple[list[Any], dict[str, nn.Module], str]:
    """-> backend callables behind ``compiled``, its modules by path, the model's name."""
    if isinstance(compiled, nn.Module):
        modules = {_path(path): module for path, module in compiled.named_modules()}
        calls = [getattr(child, "_compiled_call_impl", None) for child in compiled.modules()]
        # A wrapper, for distributed training say, may hold what torch.compile returned.
        whole = [getattr(child, "dynamo_ctx", None) for child in compiled.modules()]
        contexts = [*whole, *map(_context, calls)]
        name = type(modules[""]).__name__
    else:
        modules, contexts = {}, [_context(compiled)]
        name = str(getattr(compiled, "__qualname__", type(compiled).__name__))
    owners = [_backend(context) for context in contexts if context is not None]
    if not owners:
        raise TypeError(
            "expected the result of torch.compile(..., backend='nsa'), got "
            f"{type(compiled).__name__} that was never compiled; pass what torch.compile returned"
        )
    return owners, modules, name


def _path(path: str) -> str:
    """``path`` as it was before torch.compile wrapped modules on its way."""
    return ".".join(part for part in path.split(".") if part != "_orig_mod")


def _context(function: object) -> object | None:
    """The Dynamo context that a compiled function closes over; None for a plain function."""
    for cell in getattr(function, "__closure__", None) or ():
        try:
            content = cell.cell_contents
        except ValueError:  # a cell that is still empty
            continue
        if isinstance(content, torch._dynamo.eval_frame._TorchDynamoContext):
            context: object = content
            return context
    return None


def _backend(context: object) -> object:
    """The innermost backend callable: one object for each torch.compile call."""
    callback: Any = context.callback  # type: ignore[attr-defined]
    while hasattr(callback, "_torchdynamo_orig_backend") or hasattr(
        callback, "_torchdynamo_orig_callable"
    ):
        callback = getattr(callback, "_torchdynamo_orig_backend", None) or (
            callback._torchdynamo_orig_callable
        )
    return callback


def _weak(root: object) -> Callable[[], Any]:
    try:
        return weakref.ref(root)
    except TypeError:  # None and other objects without weak references
        return lambda: None
