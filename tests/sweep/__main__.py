"""Convert every architecture of transformers, tiny, and compare it with dense attention.

    python -m tests.sweep --only 'gemma*' --json sweep.json

Exit status 1 when a converted model differs from the dense one or anything crashes.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from nsa_compile.passes import decide
from tests.sweep.table import show
from tests.sweep.trial import Case, Row, rows

# (padding, cache) for each implementation
_SOME = (("none", False), ("none", True), ("left", False), ("right", True))
_ALL = tuple((padding, cache) for padding in ("none", "left", "right") for cache in (False, True))
_INPUTS = {
    "few": {"sdpa": (("none", False),), "eager": (("left", True),)},
    "some": {"sdpa": _SOME, "eager": _SOME},
    "all": {"sdpa": _ALL, "eager": _ALL},
}


@dataclass
class Job:
    """One architecture in a process of its own, forked so that imports are paid once."""

    name: str
    process: ForkProcess
    results: Connection
    deadline: float
    cases: list[Case]
    rows: list[Row] = field(default_factory=list)


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    torch.set_num_threads(1)
    if options.local:
        decide._already_local = lambda site, config: None
    tasks = ["causal"] * (options.task != "masked") + ["masked"] * (options.task != "causal")
    found: list[Row] = []
    for task in tasks:
        names = [n for n in _architectures(task) if fnmatch.fnmatch(n, options.only)]
        for rows_of_one in _sweep(names, _cases(options, task), task, options):
            found += rows_of_one
            _save(found, options.json)
    show(found, Console(width=None if sys.stdout.isatty() else 160))
    return int(any(row.failed for row in found))


def _save(found: list[Row], path: Path | None) -> None:
    """Written after every architecture, so that an interrupted sweep leaves what it found."""
    if path is not None:
        path.write_text(json.dumps([row.to_dict() for row in found], indent=1) + "\n")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.sweep", description=__doc__)
    parser.add_argument("--only", default="*", metavar="GLOB", help="model types to run")
    parser.add_argument("--task", choices=("causal", "masked", "both"), default="causal")
    parser.add_argument("--implementation", choices=("sdpa", "eager"), help="default: both")
    parser.add_argument("--inputs", choices=_INPUTS, default="some", help="padding and cache")
    parser.add_argument("--local", action="store_true", help="convert local layers as well")
    parser.add_argument("--dynamic", action="store_true", help="compile with symbolic sizes")
    parser.add_argument("--jobs", type=int, default=1, metavar="N")
    parser.add_argument("--limit", type=float, default=240, help="seconds an architecture may take")
    parser.add_argument("--json", type=Path, metavar="PATH")
    return parser.parse_args(arguments)


def _architectures(task: str) -> list[str]:
    from transformers.models.auto import modeling_auto
    from transformers.utils import logging

    logging.set_verbosity_error()
    names = {
        "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    }
    return sorted(names[task])


def _cases(options: argparse.Namespace, task: str) -> list[Case]:
    cases = [
        Case(implementation, padding, cache and task == "causal", options.dynamic)
        for implementation, inputs in _INPUTS[options.inputs].items()
        if options.implementation in (None, implementation)
        for padding, cache in inputs
    ]
    return list(dict.fromkeys(cases))


def _sweep(
    names: list[str], cases: list[Case], task: str, options: argparse.Namespace
) -> Iterator[list[Row]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        bar = progress.add_task(task, total=len(names))
        for job in _run(names, cases, task, options):
            progress.update(bar, advance=1, description=f"{task}: {job.name:24.24}")
            yield job.rows


def _run(
    names: list[str], cases: list[Case], task: str, options: argparse.Namespace
) -> Iterator[Job]:
    """Run every architecture, at most ``--jobs`` at a time, and yield each as it ends."""
    waiting, running = list(reversed(names)), []
    while waiting or running:
        while waiting and len(running) < options.jobs:
            running.append(_start(waiting.pop(), cases, task, options.limit))
        wait([job.results for job in running], timeout=1)
        for job in list(running):
            if _ended(job):
                running.remove(job)
                yield job


def _start(name: str, cases: list[Case], task: str, limit: float) -> Job:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, name, cases, task), daemon=True)
    process.start()
    sender.close()
    return Job(name, process, receiver, time.monotonic() + limit, cases)


def _child(sender: Connection, name: str, cases: list[Case], task: str) -> None:
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    for row in rows(name, cases, task):
        sender.send(row)


def _ended(job: Job) -> bool:
    """Take in what ``job`` has sent; True once it is over, by itself or at its deadline."""
    try:
        while job.results.poll():
            job.rows.append(job.results.recv())
    except EOFError:
        job.process.join()
        return _close(job, f"the process ended with status {job.process.exitcode}")
    if time.monotonic() < job.deadline:
        return False
    job.process.kill()
    job.process.join()
    return _close(job, "time limit")


def _close(job: Job, why: str) -> bool:
    """A case without a row is a crash."""
    missing = job.cases[len(job.rows) :]
    if missing:
        job.rows.append(Row(job.name, str(missing[0]), problem="crash", detail=why))
    return True


if __name__ == "__main__":
    sys.exit(main())
