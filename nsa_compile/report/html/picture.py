"""A picture of the model: its modules as a tree, attention layers coloured by verdict.

Layers that differ only in the numbers of their path stand side by side in strips, so that a model
of 80 layers is eight lines and not eighty.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import networkx as nx

from nsa_compile.passes.site import SiteRecord
from nsa_compile.report.html.markup import Markup, joined, tag

_ROW, _MARGIN, _GAP, _LETTER = 34, 24, 48, 6.9  # pixels
_STRIP = 10  # layers in a strip
_NO_PATH = "(no module path)"
_NAMED, _INSIDE = 34, 4  # letters of a name that are shown, and inside a circle


@dataclass
class _Module:
    """A part of a path, numbers left out, the parts below it and the sites that are its own."""

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
    left, lefts = float(_MARGIN), {}
    for depth, nodes in sorted(columns.items()):
        lefts[depth] = left
        left += max(_width(graph.nodes[node]) for node in nodes) + _GAP
    ys = [layout[node][1] for node in graph]
    height = _ROW * (max(map(len, columns.values())) - 1)
    at = {
        node: (lefts[graph.nodes[node]["depth"]], _MARGIN + _scaled(y, ys) * height)
        for node, (_, y) in layout.items()
    }
    edges = [
        _edge(at[parent], _width(graph.nodes[parent]), at[child]) for parent, child in graph.edges
    ]
    drawn = [_drawn(graph.nodes[node], at[node], sites) for node in graph]
    wide, high = round(left), height + 2 * _MARGIN
    return tag(
        "svg", joined(*edges, *drawn), class_="picture", role="img", width=wide, height=high,
        viewBox=f"0 0 {wide} {high}", aria_label=f"{model}: attention layers by verdict",
    )  # fmt: skip


def _graph(model: str, sites: list[SiteRecord]) -> nx.DiGraph:
    """Modules and strips of sites by number, from the top down; chains of modules are one node."""
    root = _Module(model)
    for index, site in enumerate(sites):
        module = root
        for part in site.module.split(".") if site.module else ():
            part = re.sub(r"\d+", "*", part)
            module = module.parts.setdefault(part, _Module(part))
        module.sites.append(index)
    graph = nx.DiGraph()
    if len(root.parts) == 1 and not root.sites:  # the page's heading names the model
        root, model = _chain(*root.parts.values())
    alone = root.sites if len(sites) == 1 else []
    graph.add_node(0, depth=0, name=model, sites=alone)
    waiting: list[tuple[int, _Module]] = [] if alone else [(0, root)]
    while waiting:
        parent, module = waiting.pop(0)
        depth = graph.nodes[parent]["depth"] + 1
        for start in range(0, len(module.sites), _STRIP):
            strip = module.sites[start : start + _STRIP]
            name = _NO_PATH if len(strip) == 1 and not sites[strip[0]].module else ""
            graph.add_node(len(graph), depth=depth, name=name, sites=strip)
            graph.add_edge(parent, len(graph) - 1)
        for node in module.parts.values():
            node, name = _chain(node)
            alone = node.sites if len(node.sites) == 1 and not node.parts else []
            number = len(graph)
            graph.add_node(number, depth=depth, name=name, sites=alone)
            graph.add_edge(parent, number)
            if not alone:
                waiting.append((number, node))
    return graph


def _chain(module: _Module) -> tuple[_Module, str]:
    """The first of a chain of single modules that has more than a part, and the chain's name."""
    name = module.name
    while len(module.parts) == 1 and not module.sites:
        (module,) = module.parts.values()
        name += f".{module.name}"
    return module, name


def _scaled(value: float, values: list[float]) -> float:
    """Where ``value`` stands between the least and the greatest, from 0 to 1."""
    least, most = min(values), max(values)
    return 0.5 if most == least else float((value - least) / (most - least))


def _shown(name: str) -> str:
    return name if len(name) <= _NAMED else f"...{name[3 - _NAMED :]}"


def _width(node: dict[str, object]) -> float:
    """Pixels from the centre of a node's first circle to its right end."""
    strip, name = node["sites"], _shown(str(node["name"]))
    assert isinstance(strip, list)
    return (len(strip) - 1) * _ROW + 16 if strip and not name else 18 + _LETTER * len(name)


def _edge(start: tuple[float, float], width: float, end: tuple[float, float]) -> Markup:
    (x0, y0), (x1, y1) = start, end
    x0, x1 = x0 + width, x1 - 14
    middle = (x0 + x1) / 2
    path = f"M{x0:.0f} {y0:.0f} C{middle:.0f} {y0:.0f} {middle:.0f} {y1:.0f} {x1:.0f} {y1:.0f}"
    return tag("path", d=path, class_="edge")


def _drawn(node: dict[str, object], at: tuple[float, float], sites: list[SiteRecord]) -> Markup:
    x, y = (round(value) for value in at)
    strip, name = node["sites"], _shown(str(node["name"]))
    assert isinstance(strip, list)
    if not strip:
        text = tag("text", name, x=x + 10, y=y + 4)
        return tag("g", tag("circle", cx=x, cy=y, r=4), text, class_="module")
    if name:
        return _site(strip[0], sites[strip[0]], x, y, name)
    drawn = (_site(index, sites[index], x + place * _ROW, y) for place, index in enumerate(strip))
    return joined(*drawn)


def _site(index: int, site: SiteRecord, x: int, y: int, name: str = "") -> Markup:
    """A circle with the numbers of the site's path inside, or with its name beside it."""
    verdict = site.reason or site.decision
    numbers = re.findall(r"\d+", site.module)
    call = f"#{site.ordinal + 1}" if site.ordinal else ""
    inside = ".".join(numbers) + call
    if len(inside) > _INSIDE:  # the title has all of it
        inside = call or numbers[-1]
    parts = [
        tag("title", f"{site.module or _NO_PATH}: {verdict}"),
        tag("circle", cx=x, cy=y, r=13),
        tag("text", inside, x=x, y=y + 4, class_="number"),
    ]
    if name:
        parts.append(tag("text", name, x=x + 18, y=y + 4))
    return tag(
        "a", joined(*parts), href=f"#site-{index}", class_=f"node {site.decision}",
        data_reason=verdict,
    )  # fmt: skip
