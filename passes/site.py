"""AttentionSite: one place in a graph where softmax attention is computed, and its proven mask."""

from __future__ import annotations

from collections.abc import Callable
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
        hidden: node like ``valid`` in which nonzero is padding; a graph may hold the one, the other
            or both.
        chunk: keep keys of the query's own chunk, ``p // chunk == j // chunk``; None is no chunks.
        prefix: keys ``j < prefix`` are seen by every query, whatever ``causal`` and ``window`` say:
            an int, a SymInt-valued node, or an integer tensor with one number, ``[B]`` or
            ``[B, 1]``; None is no prefix.
        segments: nodes (query ids ``[B, Tq]``, key ids ``[B, Tk]``), B may be 1; only equal ids see
            each other (packed documents). None is one document.
        segments_sorted: the ids are proven never to fall along the sequence, and query i stands at
            the key ``i + offset`` of the same ids: then documents are ranges of keys.
        binary: graph inputs that the proof takes to hold 0 and 1 only, whatever their dtype allows,
            to be checked at run time (``(1 - padding) * -1e9`` says nothing sensible of a 2).
        averages: a query whose keys are all padding averages all values, as the softmax over equal
            numbers does where padding adds the lowest finite one; else such a query gives 0.
        buffers: placeholder nodes whose *values* the proof read, to be guarded at run time.
    """

    causal: bool
    offset: int | fx.Node = 0
    window: int | None = None
    valid: fx.Node | None = None
    hidden: fx.Node | None = None
    chunk: int | None = None
    prefix: int | fx.Node | None = None
    segments: tuple[fx.Node, fx.Node] | None = None
    segments_sorted: bool = False
    binary: tuple[fx.Node, ...] = ()
    averages: bool = False
    buffers: tuple[fx.Node, ...] = ()

    def describe(self) -> str:
        """``"causal"``, ``"causal & window(4096) & padding"``, ``"full"``."""
        terms = []
        if self.causal:
            shifted = self.offset if isinstance(self.offset, int) else self.offset.name
            terms.append("causal" if shifted == 0 else f"causal(offset={shifted})")
        if self.window is not None:
            terms.append(f"window({self.window})")
        if self.chunk is not None:
            terms.append(f"chunk({self.chunk})")
        if self.prefix is not None:
            shown = self.prefix if isinstance(self.prefix, int) else self.prefix.name
            terms.append(f"prefix({shown})")
        if self.segments is not None:
            terms.append("document")
        if self.valid is not None or self.hidden is not None:
            terms.append("padding")
        return " & ".join(terms) or "full"


# Calls that turn one node into another: (method name or function, its further arguments).
Steps = tuple[tuple[str | Callable[..., Any], tuple[Any, ...]], ...]


@dataclass(frozen=True)
class Modifiers:
    """What a site does to its logits besides scale and mask.

    ``logit = softcap * tanh(scale * q . k / softcap) + slope * (positions[j] - positions[p])`` with
    ``slope = slope_factor * slopes[h]``, and a sink adds ``exp(sinks[h])`` to the denominator of
    its head's softmax.

    Attributes:
        softcap: 0.0 is none.
        sinks: node ``[Hq]`` of one more logit a head, or None.
        slopes: ALiBi slopes of the heads, node ``[Hq]`` or numbers, or None.
        positions: node ``[B, Tk]`` (or ``[1, Tk]``) of key positions; None is the key's index.
        slope_factor: what the slopes are multiplied by.
    """

    softcap: float = 0.0
    sinks: fx.Node | None = None
    slopes: fx.Node | tuple[float, ...] | None = None
    positions: fx.Node | None = None
    slope_factor: float = 1.0

    def describe(self) -> str:
        """``"softcap(50.0) & sinks"``, ``"alibi"``; empty when there are none."""
        terms = [f"softcap({self.softcap})"] if self.softcap else []
        terms += ["alibi"] if self.slopes is not None else []
        terms += ["sinks"] if self.sinks is not None else []
        return " & ".join(terms)


@dataclass(frozen=True)
class Mark:
    """What nsa::site said of an attention whose module ``nsa_compile.prepare`` has seen.

    Attributes:
        module: path of the module that holds the parameters.
        hidden: node of its hidden states.
        parameters: nodes in the order of the template's names.
        template: its name in ``passes.templates``.
        overwritten: the node that writes to the hidden states before the attention, described;
            empty is none.
    """

    module: str
    hidden: fx.Node
    parameters: tuple[fx.Node, ...]
    template: str
    training: bool
    overwritten: str = ""


@dataclass
class AttentionSite:
    """What the matcher read off the graph for one attention.

    ``query`` is ``[B, Hq, Tq, D]``; ``key`` and ``value`` are ``[B, Hkv, Tk, D]`` and
    ``[B, Hkv, Tk, Dv]`` with head repetition undone, each once its steps are applied to the node.
    ``output`` is the node that is replaced by ``output_steps`` of the result ``[B, Hq, Tq, Dv]``.

    Attributes:
        ordinal: counts the sites of one module path, in graph order.
        scale: a number, or the node that holds it in a dynamic graph.
        mask_node: the mask tensor as the model passed it, or None.
        mask: its proven normal form, or the refusal that says why there is none.
        lse: node of the rows' log-sum-exp where the model reads it, or None; it is replaced by
            ``lse_steps`` of the operators' ``[B, Hq, Tq, 1]``.
        spelling: name of the form it was written in, e.g. ``"sdpa"``.
        mark: of a prepared module, else None.
        unmarked: the module is prepared, and its mark is not in this graph.
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
    modifiers: Modifiers = Modifiers()
    query_steps: Steps = ()
    key_steps: Steps = ()
    value_steps: Steps = ()
    output_steps: Steps = ()
    lse: fx.Node | None = None
    lse_steps: Steps = ()
    mark: Mark | None = None
    unmarked: bool = False


@dataclass(frozen=True)
class Decision:
    """Verdict on one site: the config it is converted with, or the refusal that keeps it dense.

    Attributes:
        checks: what was asked in order, with the refusal of the last one where it refused.
    """

    site: AttentionSite
    config: NSAConfig
    refusal: Refusal | None = None
    checks: tuple[tuple[str, Refusal | None], ...] = ()

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
    modifiers: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
