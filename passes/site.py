"""AttentionSite: one place in a graph where softmax attention is computed, and its proven mask."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nsa_compile.passes.reasons import Refusal

if TYPE_CHECKING:
    import torch
    from torch import fx

    from nsa_compile.passes.config import NSAConfig


@dataclass(frozen=True)
class Mask:
    """Normal form of a mask: a conjunction over query i (position ``p = i + offset``) and key j.

    Attributes:
        causal: keep keys ``j <= p``.
        offset: int, or the SymInt-valued node of a dynamic graph.
        window: keep keys ``j > p - window``; None is no window. Two-sided (``|p - j| < window``)
            when not causal.
        valid: node of the padding mask, bool or integer ``[B, Tk]`` (or ``[1, Tk]``), nonzero is a
            real key; None is no padding.
        buffers: placeholder nodes whose *values* the proof read, to be guarded at run time.
    """

    causal: bool
    offset: int | fx.Node = 0
    window: int | None = None
    valid: fx.Node | None = None
    buffers: tuple[fx.Node, ...] = ()

    def describe(self) -> str:
        """``"causal"``, ``"causal & window(4096) & padding"``, ``"full"``."""
        terms = []
        if self.causal:
            shifted = self.offset if isinstance(self.offset, int) else self.offset.name
            terms.append("causal" if shifted == 0 else f"causal(offset={shifted})")
        if self.window is not None:
            terms.append(f"window({self.window})")
        if self.valid is not None:
            terms.append("padding")
        return " & ".join(terms) or "full"


@dataclass
class AttentionSite:
    """What the matcher read off the graph for one attention.

    ``query`` is ``[B, Hq, Tq, D]``; ``key`` and ``value`` are ``[B, Hkv, Tk, D]`` and
    ``[B, Hkv, Tk, Dv]`` with head repetition undone. ``output`` is the node that is replaced.

    Attributes:
        ordinal: counts the sites of one module path, in graph order.
        scale: a number, or the node that holds it in a dynamic graph.
        mask_node: the mask tensor as the model passed it, or None.
        mask: its proven normal form, or the refusal that says why there is none.
        spelling: name of the form it was written in, e.g. ``"sdpa"``.
    """

    output: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    scale: float | fx.Node
    dropout: float
    mask_node: fx.Node | None
    mask: Mask | Refusal
    spelling: str
    module: str
    module_class: str
    source: str
    ordinal: int
    q_heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    batch: int | torch.SymInt
    q_len: int | torch.SymInt
    kv_len: int | torch.SymInt
    dtype: torch.dtype


@dataclass(frozen=True)
class Decision:
    """Verdict on one site: the config it is converted with, or the refusal that keeps it dense."""

    site: AttentionSite
    config: NSAConfig
    refusal: Refusal | None = None

    @property
    def converted(self) -> bool:
        return self.refusal is None


@dataclass
class SiteRecord:
    """One row of the report (JSON schema version 1): plain values, no graph kept alive.

    ``q_len``, ``kv_len`` and the FLOPs are integers, or symbol text under dynamic shapes.
    FLOPs count multiply and add as two, forward only, for the whole batch.
    """

    module: str
    module_class: str
    source: str
    spelling: str
    decision: str
    reason: str | None
    reason_text: str | None
    hint: str | None
    q_heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    q_len: int | str
    kv_len: int | str
    mask: str
    scale: float | str
    dtype: str
    config: dict[str, Any] | None
    flops_dense: int | str
    flops_sparse: int | str | None
    batch: int | str = 1
    ordinal: int = 0
    compile_id: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
