"""What ``nsa-convert --verify`` measured, as texts for Markdown and HTML."""

from __future__ import annotations

from typing import Any

from nsa_compile.report.units import number, share

HEADINGS = ("layer", "relative error", "cosine", "attention covered", "worst query")


def cells(layer: dict[str, Any]) -> list[str]:
    """One layer's line; a kept layer has its reason in the place of the error."""
    name = layer["module"] or "(no module path)"
    name = f"{name} #{layer['ordinal'] + 1}" if layer["ordinal"] else name
    error = layer["relative_error"]
    if layer["decision"] != "converted":
        said = f"kept, {layer['reason']}"
    elif error is None:
        said = "did not run"
    else:
        said = number(error) + ", dense here" * layer["runs_dense"]
    shares = (share(layer[kind]) for kind in ("coverage", "coverage_worst"))
    return [name, said, _cosine(layer["cosine"]), *shares]


def sentences(found: dict[str, Any]) -> list[str]:
    """End to end: errors, tokens, perplexity; the first layer too far off; the suggestion."""
    output = found["end_to_end"]
    lines = [
        f"Verified on {found['device']}: relative error of the output "
        f"{number(output['relative_error']) or 'not finite'}, cosine "
        f"{_cosine(output['cosine']) or 'not finite'}"
    ]
    if output["kl"] is not None:
        agreed = share(output["top1_agreement"])
        tokens = f"{output['tokens']} tokens"
        lines.append(f"{tokens}: KL {number(output['kl'])} nats, same top token {agreed}")
    if output["perplexity_dense"] is not None and output["perplexity_converted"] is not None:
        before, after = output["perplexity_dense"], output["perplexity_converted"]
        lines.append(f"perplexity: dense {before:.4g}, converted {after:.4g}")
    if found["first_beyond"] is not None:
        lines.append(f"first layer beyond {found['threshold']:g}: {found['first_beyond']}")
    suggestion = found["suggestion"]
    if suggestion is not None:
        kept = ", ".join(suggestion["keep_dense"]) or "nothing"
        error = number(suggestion["relative_error"])
        met = "" if suggestion["met"] else ", which is not within it"
        lines.append(f"for {suggestion['tolerance']:g} keep dense: {kept} (error {error}{met})")
    return [*lines, *found["failures"]]


def _cosine(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
