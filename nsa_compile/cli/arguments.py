"""The options of nsa-convert."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from nsa_compile.cli.completion import SHELLS
from nsa_compile.cli.values import UsageError, lengths, positive, tolerance
from nsa_compile.targets import EXPECTED

_DESCRIPTION = """\
Report which attention layers of a model torch.compile(model, backend="nsa") would rewrite into
Native Sparse Attention, which it would leave dense, and why. The model is built on the meta device:
no weights, no GPU."""
_EPILOG = """\
exit status: 0 done; 1 with --strict when a layer is kept dense or could not be looked at, with
--fail-on when a layer is kept for one of these reasons; 2 bad input. What was asked for goes to
standard output, progress and notes to standard error."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{' '.join(message.split())}; see {self.prog} --help")


def parser() -> argparse.ArgumentParser:
    """The parser of the command line; it raises :class:`UsageError`."""
    made = _Parser(
        prog="nsa-convert",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("target", nargs="?", metavar="TARGET", help=EXPECTED)
    _model(made.add_argument_group("the model"))
    _output(made.add_argument_group("what it tells"))
    made.add_argument(
        "--completion",
        choices=SHELLS,
        help="without TARGET: print a script that completes these options in that shell",
    )
    made.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    return made


def _model(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--seq-len", type=positive, metavar="T", help="tokens in a sequence")
    group.add_argument("--batch", type=positive, metavar="B", help="sequences (default 1)")
    group.add_argument(
        "--inputs",
        metavar="SPEC",
        help="inputs of the model, such as 'input_ids=int64[B,T], bias=float32[T=4096]'; named "
        "sizes stay symbolic",
    )
    group.add_argument(
        "--train", action="store_true", help="keep the model in training mode (dropout active)"
    )
    group.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the backend, such as num_selected=32; repeatable",
    )
    group.add_argument(
        "--attn",
        choices=("sdpa", "eager"),
        help="attention implementation of a Hugging Face model (default sdpa)",
    )
    group.add_argument(
        "--hf-config",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="replace a value of a Hugging Face configuration; repeatable",
    )
    group.add_argument(
        "--trust", action="store_true", help="unpickle the target, which can run any code"
    )


def _output(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--json", type=Path, metavar="PATH", help="write the report as JSON")
    group.add_argument("--markdown", type=Path, metavar="PATH", help="write it as Markdown")
    group.add_argument("--html", type=Path, metavar="PATH", help="write it as one HTML file")
    group.add_argument(
        "--save",
        type=Path,
        metavar="OUT.pt2",
        help="write the converted model, with its weights, as an exported program",
    )
    group.add_argument(
        "--verify",
        action="store_true",
        help="run the model with its weights, dense and converted, and measure how far they are "
        "apart",
    )
    group.add_argument(
        "--data",
        type=Path,
        metavar="BATCH.pt",
        help="inputs for --verify, a file of torch.save: a tensor, a tuple, or a dict by name, "
        "where labels are for perplexity",
    )
    group.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        help="where --verify runs the model and --save leaves it (default: where its weights "
        "are), and --bench measures (default: a GPU if there is one)",
    )
    group.add_argument(
        "--tolerance",
        type=tolerance,
        metavar="ERROR",
        help="find the layers to keep dense so that --verify measures at most this relative error",
    )
    group.add_argument(
        "--bench",
        action="store_true",
        help="measure the layers' shapes on this machine, dense and converted (with --train "
        "backward too)",
    )
    group.add_argument(
        "--graph",
        type=Path,
        metavar="DIR",
        help="write each graph before and after each pass, as text and as dot",
    )
    group.add_argument(
        "--lengths",
        type=lengths,
        metavar="T,...",
        help="predict costs for sequences of these lengths (default 4096,8192,...,262144), and "
        "measure at them",
    )
    group.add_argument(
        "--explain",
        metavar="LAYER",
        help="tell the whole story of one layer (module path or glob) in place of the table",
    )
    group.add_argument(
        "--diff",
        nargs=2,
        type=Path,
        metavar=("BEFORE.json", "AFTER.json"),
        help="without TARGET: what changed between two reports",
    )
    group.add_argument(
        "--strict", action="store_true", help="exit status 1 when a layer is kept dense"
    )
    group.add_argument(
        "--fail-on",
        metavar="REASON,...",
        help="exit status 1 when a layer is kept dense for one of these reasons",
    )


def _version() -> str:
    import nsa_compile

    return nsa_compile.__version__
