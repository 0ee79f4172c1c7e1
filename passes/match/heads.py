"""Undo the repetition of key/value heads, whatever operators repeat them."""

from __future__ import annotations

from torch import fx

from nsa_compile.passes import dialect
from nsa_compile.passes.masks import views
from nsa_compile.passes.masks.affine import Affine, Var, affine, floor_div
from nsa_compile.passes.masks.lift import Lifter
from nsa_compile.passes.masks.sizes import Sizes
from nsa_compile.passes.masks.values import Stuck

# unsqueeze, expand, reshape, contiguous and a cast or two: longer chains are no repetition.
_LONGEST = 8


def undo(key: fx.Node, value: fx.Node, reader: fx.Node, lifter: Lifter) -> tuple[fx.Node, fx.Node]:
    """The tensors whose heads ``key`` and ``value`` repeat, each head G times in a row.

    before: k ``[B, Hkv, Tk, D]`` -> unsqueeze, expand, reshape -> ``[B, Hkv * G, Tk, D]``
    after:  k

    Skips when the two do not go back to the same number of heads, when the repetition has another
    order (a tiled ``repeat`` puts head h at ``h mod Hkv``), or when the tensor below is written to
    in place between the repetition and ``reader``, the node that attends.
    """
    unrepeated_key, unrepeated_value = (
        _unchanged(repeated(node, lifter.sizes), node, reader, lifter) for node in (key, value)
    )
    if unrepeated_key is None or unrepeated_value is None:
        return key, value
    if dialect.shape(unrepeated_key)[1] != dialect.shape(unrepeated_value)[1]:  # type: ignore[index]
        return key, value
    return unrepeated_key, unrepeated_value


def _unchanged(
    found: fx.Node | None, node: fx.Node, reader: fx.Node, lifter: Lifter
) -> fx.Node | None:
    """``found``, unless it changes between ``node``, which repeats it, and ``reader``."""
    if found is None:
        return None
    before, after = (lifter.mutations.version(found, at) for at in (node, reader))
    return found if before == after else None


def repeated(node: fx.Node, sizes: Sizes) -> fx.Node | None:
    """The tensor ``x`` with ``node[b, h, j, d] == x[b, h // G, j, d]``, G at least 2, or None.

    The views between are followed by their index maps, so every spelling that has this map is
    found, and none that has another.
    """
    shape = dialect.shape(node)
    if shape is None or len(shape) != 4 or not isinstance(shape[1], int):
        return None
    start = tuple(affine(Var(name, sizes.affine(s))) for name, s in zip("bhjd", shape, strict=True))
    index: views.Index = start
    found: fx.Node | None = None
    for _ in range(_LONGEST):
        op = dialect.view(node)
        try:
            element = op and views.source(node, op, index, sizes, _no_tensor_index)
        except Stuck:
            return found
        if not element:
            return found
        node, index = element
        if _drops_heads(start, index, shape[1], node):
            found = node
    return found


def _drops_heads(start: views.Index, index: views.Index, heads: int, node: fx.Node) -> bool:
    shape = dialect.shape(node)
    if shape is None or len(shape) != 4 or not isinstance(shape[1], int):
        return False
    if shape[1] == heads or heads % shape[1]:
        return False
    batch, head, key, channel = start
    expected = (batch, floor_div(head, heads // shape[1]), key, channel)
    return all(_same(a, b, s) for a, b, s in zip(index, expected, shape, strict=True))


def _same(at: Affine, expected: Affine, size: object) -> bool:
    return at == expected or (size == 1 and at.constant == 0)


def _no_tensor_index(node: fx.Node, index: views.Index) -> Affine:
    raise Stuck("heads picked by an index tensor")
