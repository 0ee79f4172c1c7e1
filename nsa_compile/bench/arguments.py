"""The command line of the benchmark."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

import nsa_compile.bench
from nsa_compile.bench.settings import CONVERSIONS, PATHS, Settings
from nsa_compile.passes.config import NSAConfigError

_SIZES = ("query_tile", "num_selected", "window", "dense_len", "score_channels", "candidates")


@dataclass(frozen=True)
class Arguments:
    """What to measure, or the file to show again, and where to write."""

    settings: Settings
    load: Path | None
    json: Path | None
    markdown: Path | None
    plot: Path | None


def parse(arguments: list[str]) -> Arguments:
    """Settings from the command line; what is not given depends on the device."""
    parser = _parser()
    given = parser.parse_args(arguments)
    for flag, file in _outputs(given):
        if file is not None and not file.parent.is_dir():
            parser.error(f"{flag} {file}: the directory {file.parent} does not exist")
    if given.load is not None and given.json is not None:
        parser.error("--json writes a measurement; with --load nothing is measured")
    settings = _settings(parser, given)
    try:
        for path in settings.paths:
            settings.config(path)
    except NSAConfigError as error:
        parser.error(str(error))
    return Arguments(settings, given.load, given.json, given.markdown, given.plot)


def _outputs(given: argparse.Namespace) -> list[tuple[str, Path | None]]:
    return [(f"--{name}", getattr(given, name)) for name in ("json", "markdown", "plot")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m nsa_compile.bench", description=nsa_compile.bench.__doc__
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: a GPU if there is one")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--heads", help="query/kv heads, e.g. 32/8,64/4")
    parser.add_argument("--lengths", help="tokens, e.g. 8192,65536")
    parser.add_argument("--dim", type=int, help="D, the head dim")
    parser.add_argument("--paths", help=f"of {','.join(PATHS)}; default: {','.join(CONVERSIONS)}")
    for name in _SIZES:
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, default=getattr(Settings, name), help=name
        )
    parser.add_argument("--forward-only", action="store_true")
    parser.add_argument("--budget-ms", type=float, default=400.0, help="time for each measurement")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the numbers to a file")
    parser.add_argument("--markdown", type=Path, metavar="PATH", help="write medians and ratios")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="write a plot (.svg, .png, .pdf)")
    parser.add_argument(
        "--load", type=Path, metavar="PATH", help="show a file of --json again; measures nothing"
    )
    return parser


def _settings(parser: argparse.ArgumentParser, given: argparse.Namespace) -> Settings:
    on_gpu = (given.device or ("cuda" if torch.cuda.is_available() else "cpu")) == "cuda"
    heads = (given.heads or ("32/8,32/32,64/4" if on_gpu else "8/8")).split(",")
    lengths = given.lengths or ("8192,16384,32768,65536" if on_gpu else "4096,8192,16384")
    paths = tuple((given.paths or ",".join(CONVERSIONS)).split(","))
    try:
        pairs = tuple((int(q), int(kv)) for q, kv in (pair.split("/") for pair in heads))
        tokens = tuple(sorted(int(length) for length in lengths.split(",")))
    except ValueError:
        parser.error(
            "--heads takes pairs such as 32/8,64/4 and --lengths numbers such as 8192,65536"
        )
    if any(q < 1 or kv < 1 or q % kv for q, kv in pairs):
        parser.error(f"query heads must be a multiple of kv heads, got {given.heads}")
    if tokens[0] < 1:
        parser.error(f"--lengths must be positive, got {given.lengths}")
    if not set(paths) <= set(PATHS):
        parser.error(f"--paths takes some of {','.join(PATHS)}, got {given.paths}")
    return Settings(
        device="cuda" if on_gpu else "cpu",
        dtype=given.dtype or ("bfloat16" if on_gpu else "float32"),
        dim=given.dim or (128 if on_gpu else 64), heads=pairs, lengths=tokens, paths=paths,
        backward=not given.forward_only, budget_ms=given.budget_ms,
        **{name: getattr(given, name) for name in _SIZES},
    )  # fmt: skip
