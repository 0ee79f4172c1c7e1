"""An fx graph in Graphviz's dot language: attention coloured by verdict, our operators marked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeGuard

import torch
from torch import fx

from nsa_compile.passes import dialect
from nsa_compile.passes.match import origin

_CONVERTED, _KEPT, _INPUT, _BODY = "#aceebb", "#ffdf9e", "#eaeef2", "#d1d9e0"
_NAMESPACE = "nsa::"


def dot(name: str, gm: fx.GraphModule, verdicts: Mapping[fx.Node, str]) -> str:
    """``gm`` as a digraph called ``name``; ``verdicts`` are of the nodes that compute attention.

    Bodies of higher-order operators are clusters, drawn once however often they are called.
    """
    lines = [
        f"digraph {_quoted(name)} {{",
        '  node [shape=box, style="rounded,filled", fillcolor=white, fontname=monospace];',
        *(f"  {line}" for line in _lines(gm, "n", verdicts)),
        "}",
    ]
    return "\n".join(lines) + "\n"


def _lines(gm: fx.GraphModule, prefix: str, verdicts: Mapping[fx.Node, str]) -> Iterator[str]:
    names = {node: f"{prefix}{number}" for number, node in enumerate(gm.graph.nodes)}
    for node, name in names.items():
        yield f"{name} [{_attributes(node, verdicts)}];"
        yield from (f"{names[operand]} -> {name};" for operand in node.all_input_nodes)
    for number, (node, body) in enumerate(_bodies(gm)):
        inner = f"{names[node]}_{number}_"
        yield f"subgraph cluster_{inner} {{"
        yield f'  label={_quoted(str(node.target))}; color="{_BODY}";'
        yield from (f"  {line}" for line in _lines(body, inner, verdicts))
        yield "}"


def _attributes(node: fx.Node, verdicts: Mapping[fx.Node, str]) -> str:
    verdict = verdicts.get(node)
    label = [node.name, _operation(node)]
    label += [text for text in (_shape(dialect.value(node)), verdict) if text]
    path, _ = origin.module(node)
    given = {"label": "\n".join(label), "tooltip": path, "fillcolor": _colour(node, verdict)}
    return ", ".join(f"{key}={_quoted(value)}" for key, value in given.items() if value)


def _operation(node: fx.Node) -> str:
    if _is_ours(node.target):
        return str(node.target.name())
    return dialect.name(node) if node.op.startswith("call") else node.op


def _colour(node: fx.Node, verdict: str | None) -> str:
    if verdict is not None:
        return _CONVERTED if verdict == "converted" else _KEPT
    if _is_ours(node.target):
        return _CONVERTED
    return _INPUT if node.op in ("placeholder", "get_attr", "output") else ""


def _is_ours(target: object) -> TypeGuard[torch._ops.OpOverload]:
    return isinstance(target, torch._ops.OpOverload) and target.name().startswith(_NAMESPACE)


def _bodies(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, fx.GraphModule]]:
    """The graphs that ``gm`` holds, each at the first node that names it."""
    known = set()
    for node in gm.graph.find_nodes(op="get_attr"):
        held = getattr(gm, str(node.target), None)
        if isinstance(held, fx.GraphModule) and held not in known:
            known.add(held)
            yield node, held


def _shape(value: object) -> str:
    """``"float32[1, 8, T]"``."""
    if not isinstance(value, torch.Tensor):
        return ""
    sizes = ", ".join(map(str, value.shape))
    return f"{str(value.dtype).removeprefix('torch.')}[{sizes}]"


def _quoted(text: str) -> str:
    text = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{text}"'
