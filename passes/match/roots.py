"""One attention as its spelling gives it: operands by element, before its axes are told apart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import fx

from nsa_compile.passes import dialect
from nsa_compile.passes.masks.affine import Affine
from nsa_compile.passes.masks.lift import Lifter
from nsa_compile.passes.masks.term import Term
from nsa_compile.passes.masks.views import Element, Index
from nsa_compile.passes.match.logits import Factor
from nsa_compile.passes.reasons import Reason, Refusal


@dataclass(frozen=True)
class Root:
    """The output element ``output[out]`` and what it reads, in the index variables of the spelling.

    ``sum over key of softmax(scale * query . key) * value``, the product running over ``channel``.

    Attributes:
        query, key, value: the elements that meet at ``key_at``, ``channel`` and ``value_channel``.
        reader: the node that reads query and key; it decides which in-place writes they see.
        terms: what else happens to the logits, in order.
        factors: tensors that multiply the logits.
        sinks: the element of one more logit a row.
        lse: the element of a log-sum-exp of the row's logits that the program reads.
        dtype: in which the logits are computed.
        refusal: why the site cannot be converted, where its spelling alone says so.
    """

    output: fx.Node
    out: Index
    query: Element
    key: Element
    value: Element
    key_at: Affine
    channel: Affine
    value_channel: Affine
    reader: fx.Node
    scale: float | fx.Node
    dtype: torch.dtype
    spelling: str
    terms: tuple[Term, ...] = ()
    is_causal: bool | fx.Node = False
    dropout: float = 0.0
    softcap: float = 0.0
    factors: tuple[Factor, ...] = ()
    sinks: Element | None = None
    lse: Element | None = None
    mask: fx.Node | None = None
    refusal: Refusal | None = None


@dataclass(frozen=True)
class Unparsed:
    """An attention whose shapes or steps could not be read: reported, never converted."""

    output: fx.Node
    refusal: Refusal
    spelling: str
    query: fx.Node | None = None
    key: fx.Node | None = None
    value: fx.Node | None = None
    mask: fx.Node | None = None
    operands: tuple[fx.Node, ...] = field(default=())


def find_roots(graph: fx.Graph, lifter: Lifter) -> Iterator[Root | Unparsed]:
    """Every attention of ``graph``, in the order of their outputs."""
    from nsa_compile.passes.match import eager, sdpa

    found = [_without_vmap(r) for r in (*sdpa.find(graph, lifter), *eager.find(graph, lifter))]
    order = {node: position for position, node in enumerate(graph.nodes)} if found else {}
    yield from sorted(found, key=lambda root: order[root.output])


def _without_vmap(root: Root | Unparsed) -> Root | Unparsed:
    """Inside ``torch.vmap`` tensors have a hidden dimension, which the operators do not know."""
    value = dialect.value(root.output)
    if not isinstance(value, torch.Tensor) or not torch._C._functorch.is_batchedtensor(value):
        return root
    why = f"{dialect.describe(root.output)}: it runs under torch.vmap"
    given = (root.query, root.key, root.value)
    q, k, v = (each.node if isinstance(each, Element) else each for each in given)
    refusal = Refusal(Reason.UNRECOGNISED_ATTENTION, why)
    return Unparsed(root.output, refusal, root.spelling, q, k, v, root.mask)
