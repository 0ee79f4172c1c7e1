"""The verification as a rich table, on a console or as text."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from nsa_compile.report.table import as_text
from nsa_compile.report.units import number, share

if TYPE_CHECKING:
    from nsa_compile.verification.report import EndToEnd, LayerCheck, Suggestion, VerifyReport

_COLUMNS = ("layer", "covered", "worst query", "error", "cosine", "verdict")


def table(report: VerifyReport) -> RenderableType:
    """Verdict, layers, output, first layer beyond the threshold, suggestion."""
    tone = "green" if report.equal else "yellow"
    parts: list[RenderableType] = [
        Text.assemble((report.model, "bold"), ": ", (_verdict(report), tone))
    ]
    if report.layers:
        parts.append(_grid(report))
    parts += [Text(line) for line in _output(report.end_to_end)]
    beyond = report.first_beyond
    if beyond is not None:
        where = f"{_name(beyond)} (error {number(beyond.relative_error)})"
        parts.append(Text(f"first layer beyond {report.threshold:g}: {where}", "yellow"))
    if report.suggestion is not None:
        parts += [Text(line) for line in _suggestion(report.suggestion)]
    for layer in report.kept:
        said = f"{layer.reason}: {layer.reason_text}"
        parts.append(Text.assemble((f"kept {_name(layer)}: ", "bold yellow"), said))
    parts += [Text.assemble(("failure: ", "bold red"), failure) for failure in report.failures]
    return Group(*parts)


def table_text(report: VerifyReport) -> str:
    """:func:`table` without colours, as wide as the terminal within reason."""
    return as_text(table(report))


def _verdict(report: VerifyReport) -> str:
    layers = len(report.converted)
    noun = "layer" if layers == 1 else "layers"
    if not layers:
        return "no layer is converted: there is nothing to compare"
    if all(layer.runs_dense for layer in report.converted):
        return f"{layers} converted {noun} run dense at this length (dense_len)"
    if report.equal:
        return f"{layers} converted {noun} equal the dense model, but for rounding"
    error = number(report.end_to_end.relative_error)
    return f"{layers} converted {noun}, relative error of the output {error}"


def _grid(report: VerifyReport) -> Table:
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in _COLUMNS:
        if heading in ("layer", "verdict"):
            grid.add_column(heading, overflow="fold")
        else:
            grid.add_column(heading, justify="right", no_wrap=True)
    for layer in report.layers:
        grid.add_row(*_cells(layer, report.threshold))
    return grid


def _cells(layer: LayerCheck, threshold: float) -> list[Text]:
    if layer.decision != "converted":
        blank = [Text("") for _ in range(4)]
        return [Text(_name(layer)), *blank, Text(f"kept, {layer.reason}", "yellow")]
    error = layer.relative_error
    if error is None:
        said, tone = "did not run", "yellow"
    elif layer.equal:
        said, tone = "dense here" if layer.runs_dense else "equal", "green"
    else:
        far = not error <= threshold
        said, tone = ("beyond", "red") if far else ("close", "green")
    return [
        Text(_name(layer)),
        Text(share(layer.coverage)),
        Text(share(layer.coverage_worst)),
        Text(number(error)),
        Text("" if layer.cosine is None else f"{layer.cosine:.4f}"),
        Text(said, tone),
    ]


def _output(found: EndToEnd) -> list[str]:
    shape = " x ".join(map(str, found.shape))
    lines = [
        f"output [{shape}]: relative error {number(found.relative_error)}, largest difference "
        f"{number(found.max_error)}, cosine {found.cosine:.4f}"
    ]
    if found.kl is not None:
        lines.append(
            f"{found.tokens} tokens: KL {number(found.kl)} nats, same top token "
            f"{share(found.top1_agreement)}"
        )
    if found.perplexity_dense is not None and found.perplexity_converted is not None:
        lines.append(
            f"perplexity: dense {found.perplexity_dense:.4g}, converted "
            f"{found.perplexity_converted:.4g}"
        )
    return lines


def _suggestion(found: Suggestion) -> list[str]:
    error = number(found.relative_error)
    if not found.met:
        return [
            f"no choice of layers stays within {found.tolerance:g}: error {error} with "
            f"{len(found.keep_dense)} kept dense"
        ]
    runs = f"{found.runs} run" + "s" * (found.runs != 1)
    if not found.keep_dense:
        return [f"within {found.tolerance:g} as it is: keep nothing dense"]
    return [
        f"for {found.tolerance:g} keep {len(found.keep_dense)} dense, convert {found.converted}: "
        f"error {error} (measured, {runs})",
        f"  add to the options: {json.dumps(found.options)}",
    ]


def _name(layer: LayerCheck) -> str:
    path = layer.module or "(no module path)"
    return f"{path} #{layer.ordinal + 1}" if layer.ordinal else path
