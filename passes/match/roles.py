"""What every axis of an attention is for: batch, heads or queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nsa_compile.passes.masks.affine import Affine, Var
from nsa_compile.passes.masks.views import Index


@dataclass(frozen=True)
class Roles:
    """Axes outermost first; ``heads`` are those of the queries. ``rows`` has at most one."""

    batch: tuple[Var, ...]
    heads: tuple[Var, ...]
    rows: tuple[Var, ...]


def assign(
    order: Sequence[Var],
    of_query: set[Var],
    of_key: set[Var],
    key_at: Affine,
    masks: Sequence[Index],
    filled: Sequence[Index],
    one_sequence: bool,
) -> Roles | str:
    """Roles of the axes in ``order``, or what speaks against an attention.

    An axis of keys or values is batch or heads; one that only queries have counts queries or the
    heads that share a key. Which of two it is changes no result, only which masks and which heads
    are recognised, so the choice may follow hints: ``masks``, the elements of masks, ``filled``,
    those that are surely no bias of each head, and ``one_sequence``, whether queries and keys come
    from tensors ``[1, ...]``.
    """
    if not set(order) <= of_query | of_key:
        return "the result has an axis that neither queries nor keys have"
    if not of_key <= set(order):
        return "keys have an axis that the result lacks"
    shared = [var for var in order if var in of_key]
    own = [var for var in order if var not in of_key]
    # What is left of an axis of which the keys have a part are heads that share a key.
    parted = {var.name[:-1] for var in shared if _is_part(var)}
    row = _row([v for v in own if not (_is_part(v) and v.name[:-1] in parted)], masks, key_at)
    groups = tuple(var for var in own if var is not row)
    batch, heads = _batch_and_heads(shared, bool(groups), filled, one_sequence)
    return Roles(batch, heads + groups, () if row is None else (row,))


def _row(own: list[Var], masks: Sequence[Index], key_at: Affine) -> Var | None:
    """The axis that counts queries: one that masks compare with keys, or as long as the keys."""
    if len(own) < 2:
        return own[0] if own else None
    compared = {var for index in masks for var in _variables(index)} & set(own)
    candidates = [var for var in own if var in compared] or own
    lengths = [var for var in candidates if any(var.size == k.size for k in key_at.variables())]
    run_time = [var for var in candidates if var.size.constant is None]
    return (lengths or run_time or candidates)[-1]


def _batch_and_heads(
    shared: list[Var], grouped: bool, masks: Sequence[Index], one_sequence: bool
) -> tuple[tuple[Var, ...], tuple[Var, ...]]:
    if one_sequence:
        return (), tuple(shared)
    if len(shared) < 2:
        return tuple(shared), ()
    head = shared[-1]
    if len(shared) == 2:
        compared = {var for index in masks for var in _variables(index)}
        static = shared[0].size.constant is not None  # as a number of heads must be
        if static and head in compared and shared[0] not in compared and not grouped:
            head = shared[0]
        elif head.size.constant is None and shared[0].size.constant is not None:
            head = shared[0]
    # Parts of one axis that was taken apart are heads together, where that leaves a batch.
    heads = [var for var in shared if var.name[:-1] == head.name[:-1] and _is_part(var)]
    if head not in heads or len(heads) == len(shared):
        heads = [head]
    return tuple(var for var in shared if var not in heads), tuple(heads)


def _is_part(var: Var) -> bool:
    return var.name[-1] in "oi"


def _variables(index: Index) -> set[Var]:
    return {var for at in index for var in at.variables()}
