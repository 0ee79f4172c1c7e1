"""Target -> report: build, capture and convert on the meta device, showing progress."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

import nsa_compile.kernels.library  # noqa: F401  (the rewriter names its operators)
from nsa_compile.capture import Capture, capture
from nsa_compile.dynamo_text import describe, mixes_devices, needs_data
from nsa_compile.graphs import GraphFolder
from nsa_compile.passes.config import NSAConfig
from nsa_compile.passes.projection import LENGTHS
from nsa_compile.report import RewriteReport
from nsa_compile.targets import Request, Target, load
from nsa_compile.verdicts import verdicts


class ForwardError(Exception):
    """The model's own forward refused the inputs."""


def preview(
    request: Request,
    config: NSAConfig,
    lengths: Sequence[int] = LENGTHS,
    folder: GraphFolder | None = None,
) -> tuple[RewriteReport, list[str]]:
    """What the backend would do to the model that ``request`` names -> report, notes.

    ``lengths`` are those of the predicted costs; ``folder`` gets the graphs as files.

    Raises:
        TargetError: the target cannot be used.
        ForwardError: the model's forward fails on the inputs.
        GraphFolderError: a file in ``folder`` cannot be written.
    """
    with progress() as step:
        step(f"building {request.target} on the meta device")
        target = load(request)
        step("capturing the graph")
        captured = _captured(target, request)
        step("converting")
        report = verdicts(target.name, captured, config, lengths, folder)
    return report, target.notes + captured.notes


def _captured(target: Target, request: Request) -> Capture:
    if target.graphs:
        return Capture(target.graphs)
    target.model.train(request.train)
    with torch.set_grad_enabled(request.train), quiet():
        captured = capture(target.model, target.args, target.kwargs, values=target.values)
    error = captured.error
    if error is None:
        return captured
    if needs_data(error):
        captured.failures.append(
            "the forward reads tensor values, which do not exist on the meta device; what follows "
            f"was not captured ({describe(error)})"
        )
        return captured
    todo = "change the inputs, --seq-len or --batch"
    if mixes_devices(error):
        todo = "make new tensors on the device of an input: torch.arange(n, device=x.device)"
    raise ForwardError(
        f"the forward of {target.name} failed with these inputs ({_shapes(target)}): "
        f"{describe(error)}; {todo}"
    ) from error


def _shapes(target: Target) -> str:
    named = [*((None, value) for value in target.args), *target.kwargs.items()]
    texts = []
    for name, value in named:
        text = f"{list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)[:40]
        texts.append(f"{name}={text}" if name else text)
    return ", ".join(texts) or "none"


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back what torch logs and warns: errors are reported here, in a line.

    ``TORCH_LOGS`` in the environment lets everything through.
    """
    if "TORCH_LOGS" in os.environ:
        yield
        return
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="torch")
            yield
    finally:
        logging.disable(before)


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A spinner and a clock on standard error, when that is a terminal."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda text: bar.update(task, description=text)
