"""What the matcher hands to the prover: one thing that a site does to its logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from nsa_compile.passes import dialect
from nsa_compile.passes.masks.affine import Affine


@dataclass(frozen=True)
class Term:
    """One operation on the logits of a site besides scale, softcap and sinks.

    Attributes:
        node: the tensor operand.
        kind: ``"add"``: ``logit + factor * node``. ``"keep"``: ``fill`` where ``node`` is false.
            ``"hide"``: ``fill`` where ``node`` is true. ``"times"``: ``logit * node``.
        reader: the node that applies it; it decides which in-place writes to ``node`` count.
        at: which element of ``node`` meets the logit of (b, h, i, j), over the variables of
            ``positions``; None: ``node`` broadcasts to ``[B, Hq, Tq, Tk]``.
        fill: a number, or the node of a tensor that broadcasts like ``node``'s result.
        factor: what the program multiplies the logits by after this term (-1 where it subtracts
            it); None is a factor that is only known at run time.
        floor: what it clamps the logits to from below afterwards, in the final scale.
    """

    node: fx.Node
    kind: str
    reader: fx.Node
    at: tuple[Affine, ...] | None = None
    fill: float | fx.Node = float("-inf")
    factor: float | None = 1.0
    floor: float = float("-inf")


def of_mask(mask: fx.Node | None, reader: fx.Node) -> tuple[Term, ...]:
    """The ``attn_mask`` of SDPA as terms: a boolean one keeps where it is true."""
    if mask is None:
        return ()
    fake = dialect.value(mask)
    boolean = isinstance(fake, torch.Tensor) and fake.dtype == torch.bool
    return (Term(mask, "keep" if boolean else "add", reader),)
