"""Decide: is converting a site legal, and wanted? One verdict a site, with a reason."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from nsa_compile.passes import dialect
from nsa_compile.passes.config import NSAConfig
from nsa_compile.passes.reasons import Reason, Refusal
from nsa_compile.passes.site import AttentionSite, Decision, Mask
from nsa_compile.passes.templates import template

MAX_HEAD_DIM = 256
# Refusals of attention whose axes nobody could tell apart: its sizes say nothing.
_UNREAD = (Reason.UNSUPPORTED_SHAPE, Reason.UNRECOGNISED_ATTENTION)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def decide(site: AttentionSite, config: NSAConfig) -> Decision:
    """Verdict on ``site`` under ``config`` (whose ``per_layer`` fields are applied here).

    The first check that refuses decides; what it said, and what passed before it, is kept. Of a
    prepared layer, ``config`` says only whether it is included.
    """
    layer = config.for_layer(site.module)
    if site.mark is not None:  # the config that its parameters were made for
        layer = template(site.mark.template).config
    outcomes: list[tuple[str, Refusal | None]] = []
    for name, check in _CHECKS:
        outcomes.append((name, check(site, layer, config)))
        if outcomes[-1][1] is not None:
            break
    return Decision(site, layer, outcomes[-1][1], tuple(outcomes))


def _enclosed(site: AttentionSite) -> Refusal | None:
    enclosed = isinstance(site.mask, Refusal) and site.mask.reason is Reason.INSIDE_OPERATOR
    return site.mask if enclosed and isinstance(site.mask, Refusal) else None


def _filters(site: AttentionSite, config: NSAConfig) -> Refusal | None:
    if config.selects(site.module):
        return None
    return Refusal(Reason.EXCLUDED, f"{site.module or '(no module path)'}")


def _gates(site: AttentionSite, layer: NSAConfig) -> Refusal | None:
    if site.unmarked:
        why = (
            "torch.compile leaves the hooks of the module it is given to eager mode, the one that "
            "marks this layer too; compile a module around it, or set "
            "torch._dynamo.config.wrap_top_frame"
        )
        return Refusal(Reason.NOT_PREPARED, why)
    if site.mark is not None and site.mark.overwritten:
        why = f"node {site.mark.overwritten} writes to the hidden states before the attention"
        return Refusal(Reason.NOT_PREPARED, why)
    if layer.merge == "gate" and site.mark is None:
        return Refusal(Reason.NOT_PREPARED, "merge='gate'")
    return None


def _already_local(site: AttentionSite, config: NSAConfig) -> Refusal | None:
    """A layer that reads no more keys than its conversion would gains nothing by it."""
    mask = site.mask
    if config.merge == "gate":  # the model was trained with gates
        return None
    if not isinstance(mask, Mask) or mask.prefix is not None:
        return None
    seen = [] if mask.chunk is None else [(mask.chunk, f"chunk({mask.chunk})")]
    if mask.window is not None:
        both_sides = 1 if mask.causal else 2
        seen.append((both_sides * (mask.window - 1) + 1, f"window({mask.window})"))
    budget = (config.num_selected or 0) * config.select_block
    if not seen or min(seen)[0] > budget:
        return None
    keys, term = min(seen)
    return Refusal(
        Reason.ALREADY_LOCAL,
        f"{term} is {keys} keys, num_selected={config.num_selected} blocks of "
        f"{config.select_block} are {budget}",
    )


def _mask(site: AttentionSite) -> Refusal | None:
    return site.mask if isinstance(site.mask, Refusal) else None


def _modifiers(site: AttentionSite) -> Refusal | None:
    mask, modifiers = site.mask, site.modifiers
    if isinstance(mask, Mask) and mask.prefix is not None:
        # What such a query sees is a prefix and a piece further on: no one range of keys.
        if mask.window is not None or mask.chunk is not None:
            return Refusal(Reason.MODIFIER_NOT_SUPPORTED, f"mask {mask.describe()}")
    for name in ("slopes", "positions"):
        node = getattr(modifiers, name)
        if isinstance(node, fx.Node) and dialect.value(node).requires_grad:
            return Refusal(
                Reason.MODIFIER_NOT_SUPPORTED,
                f"node {dialect.describe(node)}: learned ALiBi {name}",
            )
    return None


def _dropout(site: AttentionSite) -> Refusal | None:
    if isinstance(site.dropout, (int, float)) and site.dropout == 0:
        return None
    return Refusal(Reason.DROPOUT, f"dropout_p={site.dropout}")


def _shapes(site: AttentionSite) -> Refusal | None:
    if isinstance(site.mask, Refusal) and site.mask.reason in _UNREAD:
        return site.mask
    if max(site.head_dim, site.value_dim) > MAX_HEAD_DIM:
        return Refusal(Reason.UNSUPPORTED_SHAPE, f"D={site.head_dim}, Dv={site.value_dim}")
    if not site.kv_heads or site.q_heads % site.kv_heads:
        return Refusal(Reason.UNSUPPORTED_SHAPE, f"Hq={site.q_heads}, Hkv={site.kv_heads}")
    return None


def _decode(site: AttentionSite) -> Refusal | None:
    # isinstance first: comparing a SymInt would install a guard.
    if isinstance(site.q_len, int) and site.q_len == 1:
        if isinstance(site.kv_len, int) and site.kv_len == 1:
            return None
        return Refusal(Reason.DECODE_STEP, f"q_len=1, kv_len={site.kv_len}")
    return None


def _dtype(site: AttentionSite) -> Refusal | None:
    if site.dtype in DTYPES:
        return None
    return Refusal(Reason.UNSUPPORTED_DTYPE, str(site.dtype))


def _scale(site: AttentionSite) -> Refusal | None:
    if isinstance(site.scale, fx.Node) or site.scale > 0:
        return None
    return Refusal(Reason.UNSUPPORTED_SCALE, f"scale={site.scale}")


def _gated(site: AttentionSite) -> Refusal | None:
    """What the three branches do not compute; and the parameters must be this layer's."""
    mask, modifiers = site.mask, site.modifiers
    if not isinstance(mask, Mask):
        return None
    segments = mask.segments is not None and not mask.segments_sorted
    unknown = modifiers.describe() or "its log-sum-exp is read" * (site.lse is not None)
    if mask.window is not None or mask.prefix is not None or segments:
        unknown = f"mask {mask.describe()}"
    if unknown:
        return Refusal(Reason.MODIFIER_NOT_SUPPORTED, f"{unknown}, under merge='gate'")
    if site.mark is None:
        return None
    made = template(site.mark.template)
    expected = (made.q_heads, made.kv_heads, made.head_dim, made.value_dim)
    found = (site.q_heads, site.kv_heads, site.head_dim, site.value_dim)
    if expected == found:
        return None
    return Refusal(
        Reason.UNSUPPORTED_SHAPE, f"prepared for Hq, Hkv, D, Dv = {expected}, got {found}"
    )


def _sizes(site: AttentionSite, config: NSAConfig) -> Refusal | None:
    """The forced blocks of this mask must fit the budget, whatever its offset's alignment."""
    if config.merge == "gate":
        return _gated(site)
    if config.selector != "nsa":  # forces no block
        return None
    if not isinstance(site.mask, Mask):
        return None
    offset = site.mask.offset if isinstance(site.mask.offset, int) else None
    # With a prefix the operators run without causality: its ranges say what a query sees.
    causal = site.mask.causal and site.mask.prefix is None
    forced = config.forced_blocks(offset, causal)
    if forced <= (config.num_selected or 0):
        return None
    return Refusal(
        Reason.SIZES_DO_NOT_FIT,
        f"init_blocks={config.init_blocks} and window={config.window} force up to {forced} blocks "
        f"under mask {site.mask.describe()}, more than num_selected={config.num_selected}",
    )


# First whether the operators can compute the site, then whether the user wants it. Each check is
# given the site, the configuration of its layer and the whole one.
_CHECKS: tuple[tuple[str, Callable[..., Refusal | None]], ...] = (
    ("operator body", lambda site, layer, config: _enclosed(site)),
    ("shapes", lambda site, layer, config: _shapes(site)),
    ("decode step", lambda site, layer, config: _decode(site)),
    ("mask", lambda site, layer, config: _mask(site)),
    ("modifiers", lambda site, layer, config: _modifiers(site)),
    ("dropout", lambda site, layer, config: _dropout(site)),
    ("dtype", lambda site, layer, config: _dtype(site)),
    ("scale", lambda site, layer, config: _scale(site)),
    ("sizes", lambda site, layer, config: _sizes(site, layer)),
    ("filters", lambda site, layer, config: _filters(site, config)),
    ("gates", lambda site, layer, config: _gates(site, layer)),
    ("own reach", lambda site, layer, config: _already_local(site, layer)),
)
CHECKS = tuple(name for name, _ in _CHECKS)
