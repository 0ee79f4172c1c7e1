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
        failures: internal failures (the graph was compiled untouched, or fell back at run time).
    """

    compile_id: str
    owner: Callable[[], Any]
    root: Callable[[], Any]
    model: str
    records: list[SiteRecord] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


_graphs: list[CompiledGraph] = []


def begin(owner: object, compile_id: str, root: object, model: str) -> CompiledGraph:
    """Start the entry of one backend call. A call that Dynamo restarted replaces its entry."""
    _graphs[:] = [
        entry
        for entry in _graphs
        if entry.owner() is not None
        and not (entry.owner() is owner and entry.compile_id == compile_id)
    ]
    entry = CompiledGraph(compile_id, weakref.ref(owner), _weak(root), model)
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
        One report over every graph compiled so far: graph breaks and recompiles are merged.

    Raises:
        TypeError: ``compiled`` was not compiled with this backend.
    """
    owners, paths, name = _owners(compiled)
    graphs = [entry for entry in _graphs if _belongs(entry, owners, paths)]
    return RewriteReport.merge(
        name,
        [row for entry in graphs for row in _absolute(entry, paths)],
        [failure for entry in graphs for failure in entry.failures],
    )


def _belongs(entry: CompiledGraph, owners: list[Any], paths: dict[int, str]) -> bool:
    """Dynamo shares code between equal torch.compile calls on one model: equal counts there."""
    owner, root = entry.owner(), entry.root()
    if any(owner is known for known in owners):
        return True
    return id(root) in paths and any(owner == known for known in owners)


def _absolute(entry: CompiledGraph, paths: dict[int, str]) -> list[SiteRecord]:
    """The rows with module paths from the top: a graph break leaves them relative to its frame."""
    prefix = paths.get(id(entry.root()), "")
    return [
        replace(row, module=".".join(part for part in (prefix, row.module) if part))
        for row in entry.records
    ]


def _owners(compiled: object) -> tuple[list[Any], dict[int, str], str]:
    """-> backend callables behind ``compiled``, paths of its modules by id, the model's name."""
    if isinstance(compiled, nn.Module):
        module = getattr(compiled, "_orig_mod", compiled)
        paths = {id(child): path for path, child in module.named_modules()}
        calls = [getattr(child, "_compiled_call_impl", None) for child in module.modules()]
        contexts = [getattr(compiled, "dynamo_ctx", None), *map(_context, calls)]
        name = type(module).__name__
    else:
        paths, contexts = {}, [_context(compiled)]
        name = str(getattr(compiled, "__qualname__", type(compiled).__name__))
    owners = [_backend(context) for context in contexts if context is not None]
    if not owners:
        raise TypeError(
            "expected the result of torch.compile(..., backend='nsa'), got "
            f"{type(compiled).__name__} that was never compiled; pass what torch.compile returned"
        )
    return owners, paths, name


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
