"""Marks of prepared attention modules in a graph, nsa::site: read them, take them out."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

from torch import fx

from nsa_compile.passes import dialect
from nsa_compile.passes.masks.mutation import base
from nsa_compile.passes.match import origin
from nsa_compile.passes.site import AttentionSite, Mark
from nsa_compile.passes.templates import template

_NAME = "nsa.site"


def attach(sites: Iterable[AttentionSite], graph: fx.Graph, prepared: Collection[str] = ()) -> None:
    """Tell each site the mark of the module call that it belongs to.

    A module that is called again leaves another mark, which holds from there on. Sites of
    ``prepared`` paths ought to have one.
    """
    at = {site.output: site for site in sites}
    marks: dict[str, Mark] = {}
    for node in graph.nodes:
        if is_mark(node):
            mark = _read(node)
            inner = template(mark.template).site
            marks[".".join(part for part in (mark.module, inner) if part)] = mark
            continue
        for target in dialect.written(node):
            marks = {at: _written(mark, target, node) for at, mark in marks.items()}
        if node in at:
            site = at[node]
            site.mark = marks.get(site.module)
            site.unmarked = site.mark is None and site.module in prepared


def _written(mark: Mark, target: fx.Node, node: fx.Node) -> Mark:
    """``mark`` after ``node`` wrote to ``target``: gates of later values are not the layer's."""
    if base(target) is not base(mark.hidden):
        return mark
    return replace(mark, overwritten=dialect.describe(node))


def is_mark(node: fx.Node) -> bool:
    """Whether ``node`` calls nsa::site."""
    return node.op == "call_function" and str(node.target).removesuffix(".default") == _NAME


def marks_of(gm: fx.GraphModule) -> list[fx.Node]:
    """The marks in ``gm`` and the bodies in it."""
    return [node for each in _graphs(gm) for node in each.graph.nodes if is_mark(node)]


def erase_marks(gm: fx.GraphModule) -> None:
    """Take every mark out of ``gm`` and the bodies in it."""
    for module in _graphs(gm):
        marks = [node for node in module.graph.nodes if is_mark(node)]
        for node in marks:
            module.graph.erase_node(node)
        if marks:
            module.recompile()


def _read(node: fx.Node) -> Mark:
    given: Any = node.args
    hidden, parameters, name, training = given
    module, _ = origin.module(node)
    return Mark(module, hidden, tuple(parameters), str(name), bool(training))


def _graphs(gm: fx.GraphModule) -> list[fx.GraphModule]:
    return [module for module in gm.modules() if isinstance(module, fx.GraphModule)]
