"""HTML and SVG elements as text, with everything that is not markup escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


class Markup(str):
    """Text that is markup already."""


def tag(name: str, *children: object, **attributes: object) -> Markup:
    """``tag("td", "a < b", class_="wide")``; ``data_site`` makes ``data-site``, None is left out.

    Children that are no :class:`Markup` are escaped; so is every attribute.
    """
    texts = [
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    ]
    inner = "".join(map(_text, children))
    return Markup(f"<{name}{''.join(texts)}>{inner}</{name}>")


def joined(*parts: Markup) -> Markup:
    """Markup after markup, a line each."""
    return Markup("\n".join(parts))


def table(headings: Iterable[str], rows: Iterable[Sequence[object]]) -> Markup:
    """A table with a row of headings."""
    head = tag("tr", *(tag("th", heading, scope="col") for heading in headings))
    body = (tag("tr", *(tag("td", cell) for cell in row)) for row in rows)
    return tag("table", tag("thead", head), tag("tbody", *body))


def pairs(rows: dict[str, object]) -> Markup:
    """Names with their values."""
    return tag("dl", *(part for row in rows.items() for part in _pair(*row)))


def _pair(name: str, value: object) -> tuple[Markup, Markup]:
    text = ", ".join(map(str, value)) if isinstance(value, list) else value
    return tag("dt", name), tag("dd", text)


def _text(child: object) -> str:
    return child if isinstance(child, Markup) else escape(str(child))
