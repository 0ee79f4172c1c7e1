"""nsa-convert: which attention layers of a model would be converted, without weights or a GPU."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from ast import literal_eval
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from nsa_compile.passes.config import NSAConfig, NSAConfigError
from nsa_compile.preview import ForwardError, preview
from nsa_compile.report import RewriteReport
from nsa_compile.targets import Request, TargetError

CONVERTED, KEPT, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
_DESCRIPTION = """\
Report which attention layers of a model torch.compile(model, backend="nsa") would rewrite into
Native Sparse Attention, which it would leave dense, and why. The model is built on the meta device:
no weights, no GPU."""
_EPILOG = """\
exit status: 0 done; 1 with --strict when a layer is kept dense or could not be looked at; 2 bad
input. The table goes to standard output, progress and notes to standard error."""


class UsageError(Exception):
    """A command line that cannot be understood."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``nsa-convert``; returns the exit status."""
    _never_fail_to_print()
    try:
        return _run(_parser().parse_args(argv))
    except SystemExit as finished:  # --help and --version
        return int(finished.code or 0)
    except (UsageError, NSAConfigError, TargetError, ForwardError) as error:
        print(f"nsa-convert: error: {error}", file=sys.stderr)
        return BAD_INPUT
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CONVERTED
    except KeyboardInterrupt:
        print("nsa-convert: interrupted", file=sys.stderr)
        return INTERRUPTED


def _run(arguments: argparse.Namespace) -> int:
    config = NSAConfig.from_options(_options(arguments.option))
    outputs = {"--json": arguments.json, "--markdown": arguments.markdown}
    for flag, path in outputs.items():
        _check_writable(flag, path)
    request = Request(arguments.target, arguments.seq_len, arguments.batch, arguments.train)
    report, notes = preview(request, config)
    _print(report)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    _write("--json", arguments.json, report.to_json() + "\n")
    _write("--markdown", arguments.markdown, report.to_markdown())
    strict = arguments.strict or config.strict
    return KEPT if strict and _incomplete(report) else CONVERTED


def _print(report: RewriteReport) -> None:
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


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="nsa-convert",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "target",
        metavar="TARGET",
        help="file.py[:callable] (default callable: build), or a Hugging Face directory or "
        "config.json",
    )
    parser.add_argument("--seq-len", type=_positive, metavar="T", help="tokens in a sequence")
    parser.add_argument("--batch", type=_positive, metavar="B", help="sequences (default 1)")
    parser.add_argument(
        "--train", action="store_true", help="keep the model in training mode (dropout active)"
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the backend, such as num_selected=32; repeatable",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the report as JSON")
    parser.add_argument("--markdown", type=Path, metavar="PATH", help="write it as Markdown")
    parser.add_argument(
        "--strict", action="store_true", help="exit status 1 when a layer is kept dense"
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    return parser


def _version() -> str:
    import nsa_compile

    return nsa_compile.__version__


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return value


def _options(pairs: Sequence[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.strip():
            raise UsageError(f"--option expects name=value, got {pair!r}")
        options[name.strip()] = _value(text.strip())
    return options


def _value(text: str) -> Any:
    """JSON or a Python literal (``64``, ``true``, ``None``, ``{"*": {...}}``), else the text."""
    for parse in (json.loads, literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    return text


def _check_writable(flag: str, path: Path | None) -> None:
    """Refuse before the long work what could not be written after it."""
    if path is None:
        return
    if path.is_dir():
        raise UsageError(f"{flag} {path}: is a directory; expected a file to write")
    if not path.parent.is_dir():
        raise UsageError(f"{flag} {path}: the directory {path.parent} does not exist")


def _write(flag: str, path: Path | None, text: str) -> None:
    if path is None:
        return
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{flag} {path}: cannot be written: {error.strerror or error}") from error


if __name__ == "__main__":
    sys.exit(main())
