"""Shell completion: a script for the user's shell, made by shtab from the options themselves."""

from __future__ import annotations

import argparse
from pathlib import Path

from nsa_compile.cli.values import UsageError
from nsa_compile.passes.reasons import Reason

SHELLS = ("bash", "zsh", "fish")


def completion(parser: argparse.ArgumentParser, shell: str) -> str:
    """A script that completes ``parser``'s options, their choices, files and folders.

    Raises:
        UsageError: shtab is not installed.
    """
    try:
        import shtab
    except ImportError as error:
        raise UsageError(
            "--completion needs shtab, which is not installed: pip install "
            "'nsa-compile[completion]'"
        ) from error
    for action in parser._actions:
        if action.dest == "target" or action.type is Path:
            folder = action.metavar == "DIR"
            action.complete = shtab.DIRECTORY if folder else shtab.FILE  # type: ignore[attr-defined]
        if action.dest == "fail_on":
            action.choices = [reason.code for reason in Reason]
    return str(shtab.complete(parser, shell=shell))
