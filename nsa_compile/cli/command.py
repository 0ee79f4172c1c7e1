"""What nsa-convert does with its arguments, and its exit status."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path

from rich.console import Console

from nsa_compile.cli.arguments import parser
from nsa_compile.cli.completion import completion
from nsa_compile.cli.real import Done, check, verify_and_save
from nsa_compile.cli.values import UsageError, check_folder, check_writable, pairs, reasons, write
from nsa_compile.dynamo_text import describe
from nsa_compile.graphs import GraphFolder, GraphFolderError
from nsa_compile.passes.config import NSAConfig, NSAConfigError
from nsa_compile.passes.projection import LENGTHS
from nsa_compile.passes.site import SiteRecord
from nsa_compile.preview import ForwardError, preview, progress
from nsa_compile.report import RewriteReport
from nsa_compile.report.diff import ReportFileError, difference, read_report
from nsa_compile.report.story import chosen, story
from nsa_compile.targets import EXPECTED, Request, TargetError, path_of
from nsa_compile.verification import VerifyReport

DONE, KEPT, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
# What a user can change; anything else is ours.
_MISTAKES = (
    UsageError, ReportFileError, NSAConfigError, TargetError, ForwardError, GraphFolderError,
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``nsa-convert``; returns the exit status."""
    _never_fail_to_print()
    try:
        arguments = parser().parse_args(argv)
    except UsageError as error:
        return _refused(error)
    except SystemExit as finished:  # --help and --version
        return int(finished.code or 0)
    try:
        return _run(arguments)
    except _MISTAKES as error:
        return _refused(error)
    except SystemExit as error:
        return _refused(f"{arguments.target} ended the run: {describe(error)}")
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except KeyboardInterrupt:
        print("nsa-convert: interrupted", file=sys.stderr)
        return INTERRUPTED


def _refused(why: object) -> int:
    print(f"nsa-convert: error: {' '.join(str(why).split())}", file=sys.stderr)
    return BAD_INPUT


def _run(arguments: argparse.Namespace) -> int:
    if arguments.completion:
        _alone(arguments, "--completion", "a shell")
        print(completion(parser(), arguments.completion), flush=True)
        return DONE
    if arguments.diff:
        return _diff(arguments)
    config = NSAConfig.from_options(pairs("--option", arguments.option))
    fatal = reasons("--fail-on", arguments.fail_on)
    check(arguments)
    _check_files(arguments)
    check_folder("--graph", arguments.graph)
    folder = None if arguments.graph is None else GraphFolder(arguments.graph)
    lengths = arguments.lengths or LENGTHS
    request = _request(arguments)
    done = Done()
    with redirect_stdout(sys.stderr):  # what the model prints is no part of the report
        report, notes = preview(request, config, lengths, folder)
        if arguments.verify or arguments.save:
            done = verify_and_save(arguments, request, config)
            report = done.report or report
            report.verification = done.verification.to_dict() if done.verification else None
    explained = None if arguments.explain is None else _chosen(report, arguments.explain)
    if arguments.bench:
        _measure(report, arguments)
    if explained is None:
        _print(report)
    else:
        print("\n\n".join(map(story, explained)), flush=True)
    done.tell(_print)
    for note in dict.fromkeys((*notes, *done.notes)):
        print(f"note: {note}", file=sys.stderr)
    for flag, path, face in _files(arguments):
        if path is not None:
            write(flag, path, face(report))
    failed = (arguments.strict or config.strict) and _incomplete(report)
    return KEPT if failed or any(site.reason in fatal for site in report.skipped) else DONE


def _files(
    arguments: argparse.Namespace,
) -> list[tuple[str, Path | None, Callable[[RewriteReport], str]]]:
    """What to write where: the option, the user's path and the text."""
    return [
        ("--json", arguments.json, lambda report: report.to_json() + "\n"),
        ("--markdown", arguments.markdown, RewriteReport.to_markdown),
        ("--html", arguments.html, RewriteReport.to_html),
    ]


def _check_files(arguments: argparse.Namespace) -> None:
    """Refuse what cannot be written, or would be written over TARGET or another output."""
    taken = {path_of(arguments.target or "").resolve(): "TARGET"}
    if arguments.save is not None:
        taken.setdefault(arguments.save.resolve(), "--save")
    for flag, path, _ in _files(arguments):
        check_writable(flag, path)
        if path is None:
            continue
        other = taken.setdefault(path.resolve(), flag)
        if other != flag:
            raise UsageError(f"{flag} {path}: would be written over {other}")


def _diff(arguments: argparse.Namespace) -> int:
    _alone(arguments, "--diff", "two reports")
    before, after = map(read_report, arguments.diff)
    print(difference(before, after), flush=True)
    return DONE


def _alone(arguments: argparse.Namespace, flag: str, what: str) -> None:
    """Refuse what would be ignored beside ``flag``, which expects ``what``."""
    if arguments.target is not None:
        raise UsageError(f"{flag} expects {what}, no TARGET, got {arguments.target!r}")
    defaults = vars(parser().parse_args([]))
    given = [name for name, value in vars(arguments).items() if value != defaults[name]]
    others = [f"--{name.replace('_', '-')}" for name in given]
    others.remove(flag)
    if others:
        raise UsageError(f"{flag} expects {what} and no other option, got {', '.join(others)}")


def _measure(report: RewriteReport, arguments: argparse.Namespace) -> None:
    from nsa_compile.bench.sites import measure_sites

    with progress() as step:
        measure_sites(
            report, arguments.lengths, step, device=arguments.device, backward=arguments.train
        )


def _chosen(report: RewriteReport, layer: str) -> list[SiteRecord]:
    try:
        return chosen(report.sites, layer)
    except LookupError as error:
        raise UsageError(f"--explain: {error.args[0]}") from error


def _request(arguments: argparse.Namespace) -> Request:
    if not arguments.target:
        raise UsageError(f"TARGET is missing; expected {EXPECTED}")
    return Request(
        arguments.target,
        arguments.seq_len,
        arguments.batch,
        arguments.train,
        arguments.inputs,
        arguments.attn,
        pairs("--hf-config", arguments.hf_config),
        arguments.trust,
        device=arguments.device,
    )


def _print(report: RewriteReport | VerifyReport) -> None:
    """In colour and as wide as it is on a terminal; else as text of a fixed width."""
    console = Console(highlight=False)
    console.print(report) if console.is_terminal else print(report, flush=True)


def _never_fail_to_print() -> None:
    """The table draws lines, which a terminal without Unicode shall show as ``?``."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _incomplete(report: RewriteReport) -> bool:
    return bool(report.skipped or report.failures)
