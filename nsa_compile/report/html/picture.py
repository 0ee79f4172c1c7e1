"""A picture of the model: its modules as a tree, attention layers coloured by verdict."""

from __future__ import annotations

from dataclasses import dataclass, field

import networkx as nx

from nsa_compile.passes.site import SiteRecord
from nsa_compile.report.html.markup import Markup, joined, tag

_COLUMN, _ROW, _MARGIN = 260, 24, 20  # pixels


@dataclass
class _Module:
    """A part of a module path, the parts below it and the sites that are its own."""

    name: str
    parts: dict[str, _Module] = field(default_factory=dict)
    sites: list[int] = field(default_factory=list)


def picture(model: str, sites: list[SiteRecord]) -> Markup:
    """An SVG in which every site links to ``#site-N``, N its place in ``sites``."""
    graph = _graph(model, sites)
    # Columns by depth, rows in the order of the graph: the same picture in every run.
    layout = nx.multipartite_layout(graph, subset_key="depth", align="vertical")
    columns: dict[int, list[int]] = {}
    for node, depth in graph.nodes(data="depth"):
        columns.setdefault(depth, []).append(node)
    tallest = max(map(len, columns.values()))
    xs, ys = ([layout[node][axis] for node in graph] for axis in (0, 1))
    width, height = _COLUMN * len(columns), _ROW * tallest
    at = {
        node: (
            _MARGIN + _scaled(x, xs) * _COLUMN * (len(columns) - 1),
            _MARGIN + _scaled(y, ys) * _ROW * (tallest - 1),
        )
        for node, (x, y) in layout.items()
    }
    edges = [_edge(at[parent], at[child]) for parent, child in graph.edges]
    nodes = [_node(graph.nodes[node], at[node], sites) for node in graph]
    return tag(
        "svg", joined(*edges, *nodes), class_="picture", role="img", width=width + _MARGIN,
        height=height + _MARGIN, viewBox=f"0 0 {width + _MARGIN} {height + _MARGIN}",
        aria_label=f"{model}: attention layers by verdict",
    )  # fmt: skip


def _graph(model: str, sites: list[SiteRecord]) -> nx.DiGraph:
    """Modules and sites by number, from the top down; chains of single modules are one node."""
    root = _Module(model)
    for index, site in enumerate(sites):
        module = root
        for part in site.module.split(".") if site.module else ():
            module = module.parts.setdefault(part, _Module(part))
        module.sites.append(index)
    graph = nx.DiGraph()
    graph.add_node(0, depth=0, name=model, site=None)
    waiting: list[tuple[int, _Module]] = [(0, root)]
    while waiting:
        parent, module = waiting.pop(0)
        depth = graph.nodes[parent]["depth"] + 1
        for node in module.parts.values():
            name = node.name
            while len(node.parts) == 1 and not node.sites:
                (node,) = node.parts.values()
                name += f".{node.name}"
            alone = node.sites[0] if len(node.sites) == 1 and not node.parts else None
            number = len(graph)
            graph.add_node(number, depth=depth, name=name, site=alone)
            graph.add_edge(parent, number)
            if alone is None:
                waiting.append((number, node))
        if graph.nodes[parent]["site"] is None:
            for index in module.sites:
                graph.add_node(len(graph), depth=depth, name=f"#{sites[index].ordinal + 1}",
                               site=index)  # fmt: skip
                graph.add_edge(parent, len(graph) - 1)
    return graph


def _scaled(value: float, values: list[float]) -> float:
    """Where ``value`` stands between the least and the greatest, from 0 to 1."""
    least, most = min(values), max(values)
    return 0.5 if most == least else float((value - least) / (most - least))


def _edge(start: tuple[float, float], end: tuple[float, float]) -> Markup:
    (x0, y0), (x1, y1) = start, end
    middle = (x0 + x1) / 2
    path = f"M{x0:.0f} {y0:.0f} C{middle:.0f} {y0:.0f} {middle:.0f} {y1:.0f} {x1:.0f} {y1:.0f}"
    return tag("path", d=path, class_="edge")


def _node(node: dict[str, object], at: tuple[float, float], sites: list[SiteRecord]) -> Markup:
    x, y = (round(value) for value in at)
    name, index = str(node["name"]), node["site"]
    text = tag("text", name if len(name) < 34 else f"...{name[-30:]}", x=x + 10, y=y + 4)
    if not isinstance(index, int):
        return tag("g", tag("circle", cx=x, cy=y, r=4), text, class_="module")
    site = sites[index]
    verdict = site.reason or site.decision
    drawn = joined(tag("title", f"{site.module}: {verdict}"), tag("circle", cx=x, cy=y, r=7), text)
    return tag(
        "a", drawn, href=f"#site-{index}", class_=f"node {site.decision}", data_reason=verdict
    )
