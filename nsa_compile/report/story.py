"""The whole story of one site: what was matched, what its mask means, each check, the verdict."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from fnmatch import fnmatchcase

from nsa_compile.passes.site import SiteRecord
from nsa_compile.report.measured import site_times


def label(site: SiteRecord) -> str:
    """``"layers.0.attn"``, with ``" #2"`` for the second attention of one module."""
    name = site.module or "(no module path)"
    return f"{name} #{site.ordinal + 1}" if site.ordinal else name


def chosen(sites: list[SiteRecord], layer: str) -> list[SiteRecord]:
    """The sites whose label or module path is ``layer``, else those that it matches as a glob.

    Raises:
        LookupError: there is none; the text names what there is.
    """
    found = [site for site in sites if layer in (label(site), site.module)]
    found = found or [site for site in sites if fnmatchcase(label(site), layer)]
    if found:
        return found
    labels = [label(site) for site in sites]
    near = get_close_matches(layer, labels, 1)
    if near:
        raise LookupError(f"no attention layer {layer!r}; did you mean {near[0]!r}?")
    listed = ", ".join(labels[:3]) + (", ..." if len(labels) > 3 else "")
    raise LookupError(f"no attention layer {layer!r}; there is {listed or 'none at all'}")


def story(site: SiteRecord) -> str:
    """One site as indented text of several paragraphs."""
    return "\n".join(_lines(site))


def _lines(site: SiteRecord) -> Iterator[str]:
    evidence = site.extra.get("evidence", {})
    yield f"{label(site)}: {site.decision}"
    yield from _table("found", found(site))
    yield from _table("nodes", evidence.get("nodes", {}))
    yield from _table(f"mask: {site.mask}", evidence.get("mask", {}))
    yield ""
    yield "checks"
    for row in evidence.get("checks", []):
        why = f": {row['reason']}: {row['text']}" if "reason" in row else ""
        yield f"  {row['outcome']:<11}  {row['check']}{why}"
    yield from _table(f"decision: {site.decision}", outcome(site))
    times = site_times(site)
    if times:
        yield from _table("measured on this device", times)


def found(site: SiteRecord) -> dict[str, object]:
    """How the site is written, where it stands and its sizes."""
    place = " at ".join(part for part in (site.module_class, site.source) if part)
    return {
        "written as": site.spelling,
        "in": place or "unknown code",
        "sizes": f"B {site.batch}, Hq {site.q_heads}, Hkv {site.kv_heads}, Tq {site.q_len}, "
        f"Tk {site.kv_len}, D {site.head_dim}, Dv {site.value_dim}, {site.dtype}",
        "scale": site.scale,
        "modifiers": site.modifiers or "none",
    }


def outcome(site: SiteRecord) -> dict[str, object]:
    """What a converted site becomes, or why it is kept."""
    if site.decision != "converted":
        return {
            "reason": site.reason,
            "because": site.reason_text,
            "what to do": site.hint,
            "FLOPs": site.flops_dense,
        }
    used = ", ".join(f"{name}={value}" for name, value in (site.config or {}).items())
    rows: dict[str, object] = {"with": used}
    rows["FLOPs"] = f"{site.flops_dense} -> {site.flops_sparse}"
    if "predicted_break_even" in site.extra:
        length = site.extra["predicted_break_even"]
        rows["predicted"] = (
            f"fewer FLOPs from {length} tokens on" if length else "never fewer FLOPs"
        )
    return rows


def _table(heading: str, rows: dict[str, object]) -> Iterator[str]:
    yield ""
    yield heading
    width = max(map(len, rows), default=0)
    for name, value in rows.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else value
        yield f"  {name:<{width}}  {text}"
