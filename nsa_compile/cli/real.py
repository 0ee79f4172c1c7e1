"""What nsa-convert does with a model's weights: verify the conversion, save the result."""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils._pytree import tree_map_only

from nsa_compile.cli.values import UsageError, check_writable
from nsa_compile.dynamo_text import describe
from nsa_compile.export import ConvertError, convert, imports, save
from nsa_compile.export.call import call_text
from nsa_compile.guards import ConversionWarning
from nsa_compile.passes.config import NSAConfig
from nsa_compile.passes.projection import LENGTHS
from nsa_compile.preview import ForwardError, progress, quiet
from nsa_compile.report import RewriteReport
from nsa_compile.report.summary import summary
from nsa_compile.targets import Request, Target
from nsa_compile.targets.real import device_of, exported, has_values, load_real, read_batch
from nsa_compile.verification import VerifyReport
from nsa_compile.verification.outputs import NoOutput
from nsa_compile.verify import verify


@dataclass
class Done:
    """What came of ``--verify`` and ``--save``.

    Attributes:
        report: on the program that was saved.
        lines: what to tell about the file.
        notes: about how the model was built.
    """

    verification: VerifyReport | None = None
    report: RewriteReport | None = None
    lines: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def tell(self, show: Callable[[VerifyReport], None]) -> None:
        """Print it."""
        if self.verification is not None:
            print("", flush=True)
            show(self.verification)
        for line in self.lines:
            print(line, flush=True)


def check(arguments: argparse.Namespace) -> None:
    """Refuse, before any work, what would be ignored or could not be written."""
    if arguments.tolerance is not None and not arguments.verify:
        raise UsageError("--tolerance needs --verify, which measures the error")
    if arguments.data is not None and not arguments.verify:
        raise UsageError("--data needs --verify, which runs the model on it")
    _check_device(arguments)
    if arguments.save is not None:
        if arguments.save.suffix != ".pt2":
            raise UsageError(f"--save expects a path that ends in .pt2, got {arguments.save}")
        check_writable("--save", arguments.save)


def _check_device(arguments: argparse.Namespace) -> None:
    if arguments.device is None:
        return
    if not (arguments.verify or arguments.bench or arguments.save):
        raise UsageError("--device needs --verify, --bench or --save; the report needs no device")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no GPU here; expected cpu")


def verify_and_save(arguments: argparse.Namespace, request: Request, config: NSAConfig) -> Done:
    """Do what ``--verify`` and ``--save`` ask.

    Raises:
        UsageError, TargetError, ForwardError: what the user can change.
    """
    done = Done()
    with progress() as step, _quietly():
        step(f"building {request.target} with its weights")
        target = load_real(request)
        done.notes = target.notes
        if arguments.verify:
            step("running it dense and converted")
            done.verification = found = _verified(target, arguments, config)
            if found.suggestion is not None:
                config = replace(config, **_globs(found.suggestion.options))
        if arguments.save is not None:
            step("exporting and converting")
            program = exported(target)
            lengths = arguments.lengths or LENGTHS
            done.report = _saved(program, arguments.save, config, target.name, lengths)
            done.lines = _told(program, arguments.save, done.report)
    return done


def _globs(options: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(globs) for name, globs in options.items()}


def _verified(target: Target, arguments: argparse.Namespace, config: NSAConfig) -> VerifyReport:
    args, kwargs = target.args, target.kwargs
    if arguments.data is not None:
        switches = {name: x for name, x in kwargs.items() if not isinstance(x, Tensor)}
        args, named = read_batch(arguments.data)
        kwargs = {**switches, **named}
    elif not has_values(target):
        raise UsageError(
            "--verify runs the model and needs inputs with values: pass --data batch.pt (a tensor, "
            "a tuple or a dict, by torch.save), or let build() return (model, inputs)"
        )
    model = target.model if target.program is None else target.program
    device = device_of(target)
    args, kwargs = tree_map_only(Tensor, lambda x: x.to(device), (args, dict(kwargs)))
    labels = kwargs.pop("labels", None)
    try:
        return verify(
            model, *args, config=config, labels=labels, tolerance=arguments.tolerance, **kwargs
        )
    except NoOutput as error:
        raise UsageError(f"--verify: {error}") from error
    except Exception as error:
        raise ForwardError(f"--verify: {target.name} failed: {describe(error)}") from error


def _saved(
    program: ExportedProgram, path: Path, config: NSAConfig, name: str, lengths: Sequence[int]
) -> RewriteReport:
    """Write the converted program whole or not at all."""
    part = path.with_name(f".{path.stem}.{os.getpid()}.pt2")
    try:
        converted, report = convert(program, config, name=name, lengths=lengths)
        save(converted, part)
        part.replace(path)
    except ConvertError as error:
        raise UsageError(f"--save {path}: {error}") from error
    except OSError as error:
        raise UsageError(f"--save {path}: cannot be written: {error.strerror or error}") from error
    except Exception as error:
        raise UsageError(f"--save {path}: torch cannot save it: {describe(error)}") from error
    finally:
        part.unlink(missing_ok=True)
    return report


def _told(program: ExportedProgram, path: Path, report: RewriteReport) -> list[str]:
    needed = ", ".join(["torch", "nsa_compile", *imports(program)])
    return [
        f"saved {path}: {summary(report)}",
        f'  to load it: import {needed}; program = torch.export.load("{path}")',
        f"  to call it: program.module()({call_text(*(program.example_inputs or ((), {})))})",
    ]


@contextmanager
def _quietly() -> Iterator[None]:
    """What falls back to dense stands in the report; no warning has to say it again."""
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConversionWarning)
        yield
