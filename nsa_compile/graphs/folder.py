"""A folder with the graphs before and after each pass that changes or copies them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import fx

from nsa_compile.capture import CapturedGraph
from nsa_compile.dynamo_text import describe
from nsa_compile.graphs.dot import dot
from nsa_compile.passes.pipeline import Conversion
from nsa_compile.passes.site import Decision


class GraphFolderError(Exception):
    """A file that cannot be written."""


class GraphFolder:
    """Writes ``graph-0-0/2-rewrite.before.txt`` and the like below ``root``.

    The numbers are the captured graph's compile id. ``1-read`` is how the passes read a graph whose
    attention stands in bodies of higher-order operators or in fused calls: a copy in which both are
    written out; where a graph is read as it is there is none. ``2-rewrite`` is the graph itself,
    which stays the same where nothing is converted.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    @contextmanager
    def rewriting(self, graph: CapturedGraph, conversion: Conversion) -> Iterator[None]:
        """Write files around the block that rewrites ``graph``; those after it if it succeeds.

        Raises:
            GraphFolderError: a file cannot be written.
        """
        gm, name = graph.gm, f"graph-{graph.compile_id.replace('/', '-')}"
        folder = self.root / name
        reading, decisions = conversion.reading, conversion.decisions
        given = _verdicts(decisions)
        if reading is not None:
            inlined = reading.inlined
            copied = given
            given = {
                inlined.site(node)[1] if node in inlined.origin else node: verdict
                for node, verdict in copied.items()
            }
            _write(folder / "1-read.before", gm, given)
            _write(folder / "1-read.after", inlined.module, copied)
        _write(folder / "2-rewrite.before", gm, given)
        yield
        _write(folder / "2-rewrite.after", gm, given)


def _verdicts(decisions: tuple[Decision, ...]) -> dict[fx.Node, str]:
    """By the node that computes attention: converted, or the reason why not."""
    return {
        each.site.output: each.refusal.code if each.refusal else "converted" for each in decisions
    }


def _write(path: Path, gm: fx.GraphModule, verdicts: dict[fx.Node, str]) -> None:
    """``path`` with .txt and .dot; nothing that goes wrong here is a verdict on the graph."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        texts = {
            ".txt": gm.print_readable(print_output=False, colored=False),
            ".dot": dot(f"{path.parent.name} {path.name}", gm, verdicts),
        }
        for suffix, text in texts.items():
            file = path.with_name(path.name + suffix)
            file.write_text(text, encoding="utf-8", errors="replace")
    except Exception as error:
        why = error.strerror if isinstance(error, OSError) else describe(error)
        raise GraphFolderError(f"{path}: cannot be written: {why}") from error
