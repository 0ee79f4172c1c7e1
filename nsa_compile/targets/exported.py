"""Graphs on disk as target: a .pt2 exported program, and a pickled GraphModule the user trusts."""

from __future__ import annotations

import logging
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import fx

from nsa_compile.capture import CapturedGraph
from nsa_compile.dynamo_text import describe
from nsa_compile.export.conversion import known_values
from nsa_compile.targets.inputs import example_inputs
from nsa_compile.targets.skeleton import made
from nsa_compile.targets.target import Request, Target, TargetError, ids_for

_NO_PICKLES = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # torch.load reads it at every call


def load_exported(path: Path, request: Request) -> Target:
    """The program that ``torch.export.save`` wrote; its sizes are those it was exported with.

    A file may hold pickles (of example inputs, tensor subclasses, custom objects), which can run
    any code. Without ``--trust`` torch reads only tensors and plain values from it.

    Raises:
        TargetError: the file is no exported program, or needs ``--trust``.
    """
    if not zipfile.is_zipfile(path):
        raise TargetError(
            f"{path}: expected an exported program (torch.export.save), got no archive"
        )
    with _logged_errors() as logged:
        try:
            with _only_plain_values(request.trust):
                program = torch.export.load(path)
        except Exception as error:
            causes = [_first_cause(each) for each in (*logged, error)]
            pickled = any("weights_only" in str(each) for each in causes)
            todo = "; if it holds pickled objects you trust, pass --trust" if pickled else ""
            raise TargetError(f"{path} cannot be loaded: {_one_line(causes[0])}{todo}") from error
    target = Target(path.stem, torch.nn.Module(), program=program)
    target.args, target.kwargs = program.example_inputs or ((), {})
    gm = program.graph_module
    target.graphs = [CapturedGraph(gm, known_values(program, gm), "0/0")]
    ours = sum(map(_is_converted, gm.graph.nodes))
    if ours:
        target.notes.append(
            f"{path} was converted before: {ours} operators of nsa-compile stand in it and stay as "
            "they are"
        )
    return target


def _is_converted(node: fx.Node) -> bool:
    """Whether a node computes attention as nsa_compile rewrites it; a marker computes nothing."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "nsa":
        return False
    return target is not torch.ops.nsa.site.default


def load_pickled(path: Path, request: Request) -> Target:
    """A pickled ``fx.GraphModule``; pickling drops its shapes, so it is captured again.

    Raises:
        TargetError: the file is not trusted, cannot be read or holds something else.
    """
    if not request.trust:
        raise TargetError(
            f"{path}: a pickled graph can run any code when it is read; if you trust the file, "
            "pass --trust"
        )
    try:
        read = partial(torch.load, path, map_location="cpu", weights_only=False)
        skeleton = made(read, request)
    except Exception as error:
        raise TargetError(f"{path} cannot be unpickled: {_one_line(error)}") from error
    model = skeleton.result
    if not isinstance(model, fx.GraphModule):
        raise TargetError(
            f"{path}: expected a pickled torch.fx.GraphModule, got {type(model).__name__}"
        )
    target = Target(path.stem, model, values=skeleton.values, notes=skeleton.notes)
    if request.inputs is not None:
        target.args, target.kwargs = example_inputs(request)
    else:
        target.args = (ids_for(model, str(path), request),)
    return target


@contextmanager
def _logged_errors() -> Iterator[list[BaseException]]:
    """What torch logs with its stack, before it raises "check the warnings above": held back."""
    found: list[BaseException] = []

    def keep(entry: logging.LogRecord) -> bool:
        if not entry.exc_info or entry.exc_info[1] is None:
            return True
        found.append(entry.exc_info[1])
        return False

    log = logging.getLogger("torch.export")
    log.addFilter(keep)
    try:
        yield found
    finally:
        log.removeFilter(keep)


def _first_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


@contextmanager
def _only_plain_values(trust: bool) -> Iterator[None]:
    before = os.environ.get(_NO_PICKLES)
    if not trust:
        os.environ[_NO_PICKLES] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_NO_PICKLES, None)
        else:
            os.environ[_NO_PICKLES] = before


def _one_line(error: BaseException) -> str:
    return describe(error)[:300]
