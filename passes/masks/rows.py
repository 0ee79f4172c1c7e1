"""Tensors ``[B, T]`` (or with more dimensions of size 1) that say one thing of each position."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from nsa_compile.passes import dialect
from nsa_compile.passes.masks.affine import Affine, Var, affine
from nsa_compile.passes.masks.conditions import Condition
from nsa_compile.passes.masks.values import Value, as_number, is_bit, truth


class Rows:
    """The rows that lifting came past, by what they hold.

    A proof is about elements; the rewritten graph needs whole tensors. Whatever a mask says of key
    j alone (padding), of a sequence (a prefix) or compares between query i and key j (document
    ids) must be held by one of these.

    Attributes:
        valid: rows over keys by the condition under which their element is not 0.
        flags: rows of 0 and 1 over queries or keys, by dtype and by the condition under which
            they hold 1.
        ids: integer rows over queries, keys or the batch by their element.
    """

    def __init__(self) -> None:
        self.valid: dict[Condition, fx.Node] = {}
        self.flags: dict[torch.dtype, dict[Condition, fx.Node]] = {}
        self.ids: dict[Affine, fx.Node] = {}

    def remember(
        self, node: fx.Node, index: Sequence[Affine], sizes: Sequence[Affine], found: Value
    ) -> None:
        """Note ``node``, whose element at ``index`` is ``found``, if it is a row read whole."""
        name = runs_over(index, sizes)
        if name is None:
            return
        held = truth(found)
        # [B, 1] says the same of all keys, of which there may be but one.
        if held is not None and (name == "j" or (name == "b" and len(sizes) > 1)):
            self.valid.setdefault(held, node)
        number = as_number(found)
        dtype = dialect.value(node).dtype
        if held is not None and is_bit(number):
            self.flags.setdefault(dtype, {}).setdefault(held, node)
        if isinstance(number, Affine) and not dtype.is_floating_point:
            self.ids.setdefault(number, node)

    def flagged(self, query: Condition, key: Condition) -> tuple[fx.Node, fx.Node] | None:
        """Rows of one dtype that hold 1 where ``query`` and where ``key`` holds, else 0."""
        for rows in self.flags.values():
            if query in rows and key in rows:
                return rows[query], rows[key]
        return None

    def over(self, name: str) -> dict[Affine, fx.Node]:
        """The integer rows over queries (``"i"``) or keys (``"j"``)."""
        return {
            held: node
            for held, node in self.ids.items()
            if name in {v.name for v in held.variables()}
        }


def runs_over(index: Sequence[Affine], sizes: Sequence[Affine]) -> str | None:
    """``"i"`` or ``"j"`` when ``index`` runs over the batch, if there is one, then that position.

    ``"b"`` when it runs over the batch and no more, or the tensor holds one number.
    """
    wide = [p for p, size in enumerate(sizes) if size.constant != 1]
    if any(index[p].constant != 0 for p in range(len(sizes)) if p not in wide):
        return None
    if wide[:1] == [0] and _is(index[0], "b", sizes[0]):
        wide = wide[1:]
    if not wide:
        return "b"
    (at, *more) = wide
    if more or (at == 0 and len(sizes) > 1):
        return None
    return next((name for name in "ij" if _is(index[at], name, sizes[at])), None)


def _is(at: Affine, name: str, size: Affine) -> bool:
    return at == affine(Var(name, size))
