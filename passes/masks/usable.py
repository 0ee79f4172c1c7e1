"""Whether a proven mask can stand for the tensor it was read off, where the attention is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from nsa_compile.passes.masks.affine import Affine, lower
from nsa_compile.passes.masks.lift import Lifter
from nsa_compile.passes.site import Mask

if TYPE_CHECKING:
    from nsa_compile.passes.masks.alibi import Alibi
    from nsa_compile.passes.masks.prove import Geometry


def overwritten(mask: Mask, bias: Alibi | None, reader: fx.Node, lifter: Lifter) -> fx.Node | None:
    """A tensor of ``mask`` or ``bias`` that no longer holds what was proven when ``reader`` runs.

    The rewritten graph reads padding, ids, prefix and slopes where the attention stands.
    """
    named: tuple[object, ...] = (
        mask.valid,
        mask.hidden,
        mask.prefix,
        *(mask.segments or ()),
        *mask.binary,
    )
    if bias is not None:
        named = (*named, bias.slopes, bias.positions)
    tensors = [n for n in named if isinstance(n, fx.Node)]
    changed = (n for n in tensors if lifter.mutations.version(n, reader) is not n)
    return next(changed, None)


def every_row_sees_a_key(mask: Mask, geometry: Geometry, lifter: Lifter) -> bool:
    """Whether every query sees a key, padding aside: rows of padding may hold anything."""
    sizes = lifter.sizes
    offset = sizes.integer(mask.offset)
    assert offset is not None
    if mask.causal and not _at_least_zero(offset):
        return False
    if not _shares_its_id(mask):
        return False
    if mask.window is None and mask.chunk is None and mask.segments is None:
        return True
    # The last query stands at Tq - 1 + offset; a window must reach back to key Tk - 1.
    last = sizes.affine(geometry.q_len) + offset - 1
    reach = 0 if mask.window is None or mask.chunk or mask.segments else mask.window - 1
    return _at_least_zero(sizes.affine(geometry.kv_len) - 1 - last + reach)


def _shares_its_id(mask: Mask) -> bool:
    """Whether query i is proven to have the id of the key at its own position."""
    if mask.segments is None or mask.segments_sorted:
        return True
    return mask.segments[0] is mask.segments[1] and mask.offset == 0


def _at_least_zero(integer: Affine) -> bool:
    low = lower(integer)
    return low is not None and low >= 0
