"""The operands that tell an operator which keys a query sees, built once for the layers that share
a mask: valid keys, a range of keys for each query, document ids."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from nsa_compile.passes import dialect
from nsa_compile.passes.emit import Caller
from nsa_compile.passes.site import Mask


class Operands(NamedTuple):
    """In the order in which the operators take them.

    ``valid`` bool [B, Tk]; ``ranges`` int32 [B, Tq, 2] (B may be 1), the first key of a query and
    the first past its last; segments int32 [B, T]. None says nothing. ``causal`` is False where
    the ranges say it.
    """

    valid: fx.Node | None
    ranges: fx.Node | None
    query_segments: fx.Node | None
    key_segments: fx.Node | None
    causal: bool


class Visibility:
    """Builds the operands of every mask of one graph; equal masks share their nodes."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Any] = {}

    def operands(self, mask: Mask, q: fx.Node, k: fx.Node, call: Caller) -> Operands:
        """The operands of ``mask`` for queries [B, Hq, Tq, D] and keys [B, Hkv, Tk, D]."""
        segments: tuple[fx.Node | None, fx.Node | None] = (None, None)
        if mask.segments is not None and not mask.segments_sorted:
            segments = self._once(("ids", mask.segments), _segments, mask.segments, call)
        sizes = tuple(dialect.shape(x)[2] for x in (q, k))  # type: ignore[index]
        terms = (mask.causal, mask.offset, mask.chunk, mask.prefix)
        documents = mask.segments if mask.segments_sorted else None
        ranges = self._once(("ranges", *sizes, *terms, documents), _ranges, mask, q, k, call)
        return Operands(
            self._valid(mask, q, k, call), ranges, *segments, mask.causal and mask.prefix is None
        )

    def _valid(self, mask: Mask, q: fx.Node, k: fx.Node, call: Caller) -> fx.Node | None:
        if mask.valid is None and mask.hidden is None:
            return None
        return self._once(("valid", mask.valid, mask.hidden), _valid_keys, mask, q, k, call)

    def _once(self, key: Hashable, build: Any, *args: Any) -> Any:
        # Sites come in graph order, so what the first one builds stands before all the others.
        if key not in self._known:
            self._known[key] = build(*args)
        return self._known[key]


def _valid_keys(mask: Mask, q: fx.Node, k: fx.Node, call: Caller) -> fx.Node:
    """The real keys of ``mask`` as bool [B, Tk]."""
    rows = []
    if mask.valid is not None:
        keys = row(mask.valid, call)
        rows.append(keys if dialect.value(keys).dtype == torch.bool else call(torch.ne, keys, 0))
    if mask.hidden is not None:
        rows.append(call(torch.eq, row(mask.hidden, call), 0))
    keys = rows[0] if len(rows) == 1 else call(torch.logical_and, *rows)
    batch, length = (isinstance(s, int) and s == 1 for s in dialect.value(keys).shape)
    if batch or length:
        sizes = (
            call("size", x, dim) if one else -1 for x, dim, one in ((q, 0, batch), (k, 2, length))
        )
        keys = call("expand", keys, *sizes)
    return keys


def row(x: fx.Node, call: Caller) -> fx.Node:
    """``x`` as [B, T]: a mask may hold it with more dimensions of size 1, or without B."""
    dims = dialect.value(x).dim()
    if dims == 1:
        return call("unsqueeze", x, 0)
    return x if dims == 2 else call("flatten", x, 1)


def _segments(ids: tuple[fx.Node, fx.Node], call: Caller) -> tuple[fx.Node, fx.Node]:
    """Document ids as int32 that are equal where ``ids`` are, whatever 64-bit values those hold.

    Keys become their rank among the keys' ids; a query with an id that no key has becomes -1.
    """
    queries, keys = (row(x, call) for x in ids)
    queries = keys if ids[0] is ids[1] else queries
    if all(dialect.value(x).dtype in _NARROW for x in ids):
        return call.cast(queries, torch.int32), call.cast(keys, torch.int32)
    ordered = call(operator.getitem, call(torch.sort, keys, -1), 0)

    def rank(x: fx.Node, right: bool) -> fx.Node:
        return call(torch.searchsorted, ordered, x, out_int32=True, right=right)

    key_ranks = rank(call("contiguous", keys), False)
    if queries is keys:
        return key_ranks, key_ranks
    queries = call("contiguous", queries)
    low, high = rank(queries, False), rank(queries, True)
    return call(torch.where, call(torch.gt, high, low), low, -1), key_ranks


_NARROW = {torch.bool, torch.int8, torch.int16, torch.int32, torch.uint8}


def _ranges(mask: Mask, q: fx.Node, k: fx.Node, call: Caller) -> fx.Node | None:
    """int32 [B, Tq, 2] of a mask with chunks, a prefix or sorted documents; None for another."""
    if mask.chunk is None and mask.prefix is None and not mask.segments_sorted:
        return None
    position = call(
        torch.arange, call("size", q, 2), device=dialect.value(q).device, dtype=torch.int32
    )
    if mask.offset != 0:
        position = call(torch.add, position, mask.offset)
    position = call("unsqueeze", position, 0)
    low: list[fx.Node] = []
    high: list[fx.Node] = []
    if mask.chunk is not None:
        chunk = call(torch.div, position, mask.chunk, rounding_mode="floor")
        low.append(call(torch.mul, chunk, mask.chunk))
        high.append(call(torch.add, low[-1], mask.chunk))
    if mask.segments is not None and mask.segments_sorted:
        queries, keys = (call("contiguous", row(ids, call)) for ids in mask.segments)
        for end, right in ((low, False), (high, True)):
            end.append(call(torch.searchsorted, keys, queries, out_int32=True, right=right))
    if mask.prefix is not None:
        future = call(torch.add, position, 1)
        high.append(call(torch.maximum, future, _column(mask.prefix, position, call)))
    bounds = _common(low, torch.maximum, call), _common(high, torch.minimum, call)
    first, stop = (b if b is not None else call(torch.zeros_like, position) for b in bounds)
    first, stop = (
        call(operator.getitem, call(torch.broadcast_tensors, first, stop), n) for n in (0, 1)
    )
    return call.cast(call(torch.stack, [first, stop], -1), torch.int32)


def _column(prefix: int | fx.Node, position: fx.Node, call: Caller) -> fx.Node:
    """A prefix length as int32 [B, 1] or [1, 1]."""
    if isinstance(prefix, fx.Node) and isinstance(dialect.value(prefix), torch.Tensor):
        return call("reshape", call.cast(prefix, torch.int32), -1, 1)
    return call(torch.full_like, position, prefix)


def _common(bounds: Sequence[fx.Node], closer: Any, call: Caller) -> fx.Node | None:
    """The tightest of some bounds, None of none."""
    if not bounds:
        return None
    tightest = bounds[0]
    for bound in bounds[1:]:
        tightest = call(closer, tightest, bound)
    return tightest
