"""Which element of which input an element of a view is: the index maps of shape operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import fx

from nsa_compile.passes import dialect
from nsa_compile.passes.dialect import Op
from nsa_compile.passes.masks.affine import Affine, floor_div, lower, modulo
from nsa_compile.passes.masks.sizes import Size, Sizes, product
from nsa_compile.passes.masks.values import Stuck


class Element(NamedTuple):
    """The element ``node[at]``."""

    node: fx.Node
    at: tuple[Affine, ...]


Index = tuple[Affine, ...]
# Value of an integer tensor element that serves as an index (x[rows, columns]).
LiftIndex = Callable[[fx.Node, Index], Affine]

_PASS_THROUGH = ("contiguous", "clone", "detach", "alias", "lift_fresh_copy")


def source(node: fx.Node, op: Op, index: Index, sizes: Sizes, lift: LiftIndex) -> Element | None:
    """The input element that ``node[index]`` is, or None when ``node`` is no view.

    Raises:
        Stuck: ``node`` is a view, but which element it shows could not be worked out.
    """
    if op.name in _PASS_THROUGH:
        return Element(op["x"], index)
    if op.name in _GATHERS:
        return _GATHERS[op.name](op, index, sizes, lift)
    rule = _VIEWS.get(op.name)
    x = op["x"]
    if rule is None or not isinstance(x, fx.Node):
        return None
    before, after = dialect.shape(x), dialect.shape(node)
    if before is None or after is None:
        return None  # a split or unbind result: not a view of one tensor
    return Element(x, tuple(rule(op, index, before, after)))


def broadcast(shape: Sequence[Size], out: Sequence[Size], index: Sequence[Affine]) -> Index:
    """Index into an operand of ``shape`` for element ``index`` of the broadcast result ``out``."""
    lead = len(out) - len(shape)
    result = []
    for size, wide, at in zip(shape, out[lead:], index[lead:], strict=True):
        if size == wide:
            result.append(at)
        elif isinstance(size, int) and size == 1:
            result.append(Affine())
        else:
            raise Stuck(f"broadcast of size {size} to {wide}")
    return tuple(result)


def _expand(op: Op, index: Index, before: Sequence[Size], after: Sequence[Size]) -> Index:
    return broadcast(before, after, index)


def _reshape(op: Op, index: Index, before: Sequence[Size], after: Sequence[Size]) -> Index:
    """Match runs of dimensions with equal products, and renumber inside each run."""
    if op["dtype"] is not None or any(isinstance(s, torch.dtype) for s in op["sizes"] or ()):
        raise Stuck("a view that reinterprets bits")
    return _reshaped(tuple(before), tuple(after), index)


@lru_cache(maxsize=2048)
def _reshaped(before: tuple[Size, ...], after: tuple[Size, ...], index: Index) -> Index:
    """The layers of a model share their reshapes."""
    result: list[Affine] = []
    old = [(p, s) for p, s in enumerate(before) if s != 1]
    new = [(p, s) for p, s in enumerate(after) if s != 1]
    by_position: dict[int, Affine] = {}
    while old or new:
        take_old, take_new = _equal_run([s for _, s in old], [s for _, s in new])
        at = _renumber(
            [s for _, s in old[:take_old]],
            [s for _, s in new[:take_new]],
            [index[p] for p, _ in new[:take_new]],
        )
        by_position.update(zip((p for p, _ in old[:take_old]), at, strict=True))
        old, new = old[take_old:], new[take_new:]
    for position in range(len(before)):
        result.append(by_position.get(position, Affine()))
    return tuple(result)


def _equal_run(old: list[Size], new: list[Size]) -> tuple[int, int]:
    """The shortest leading runs of ``old`` and ``new`` whose products are equal."""
    for total in range(2, len(old) + len(new) + 1):
        for first in range(max(1, total - len(new)), min(len(old), total - 1) + 1):
            if product(old[:first]) == product(new[: total - first]):
                return first, total - first
    raise Stuck("a reshape whose sizes could not be matched")


def _renumber(old: list[Size], new: list[Size], index: list[Affine]) -> list[Affine]:
    if len(old) == len(new) == 1:
        return index
    linear = Affine()
    for position, at in enumerate(index):
        if at.constant == 0:
            continue
        linear = linear + at.times(_static(product(new[position + 1 :])))
    result = []
    for position in range(len(old)):
        if linear.constant == 0:
            result.append(linear)
            continue
        stride = _static(product(old[position + 1 :]))
        at = floor_div(linear, stride)
        result.append(at if position == 0 else modulo(at, _static(old[position])))
    return result


def _static(size: Size) -> int:
    if not isinstance(size, int):
        raise Stuck(f"a reshape across the run-time size {size}")
    return size


def _unsqueeze(op: Op, index: Index, before: Sequence[Size], after: Sequence[Size]) -> Index:
    dim = _dim(op["dim"], len(after))
    return index[:dim] + index[dim + 1 :]


def _transpose(op: Op, index: Index, before: Sequence[Size], after: Sequence[Size]) -> Index:
    first, second = _dim(op["dim0"], len(after)), _dim(op["dim1"], len(after))
    swapped = list(index)
    swapped[first], swapped[second] = swapped[second], swapped[first]
    return tuple(swapped)


def _t(op: Op, index: Index, before: Sequence[Size], after: Sequence[Size]) -> Index:
    return tuple(reversed(index))


def _permute(op: Op, index: Index, before: Sequence[Size], after: Sequence[Size]) -> Index:
    dims = [_dim(d, len(before)) for d in op["dims"]]
    result = [Affine()] * len(before)
    for position, dim in enumerate(dims):
        result[dim] = index[position]
    return tuple(result)


def _repeat_interleave(
    op: Op, index: Index, before: Sequence[Size], after: Sequence[Size]
) -> Index:
    """Every element ``repeats`` times in a row along ``dim``."""
    repeats, dim = op["repeats"], op["dim"]
    if not isinstance(repeats, int) or dim is None or repeats < 1:
        raise Stuck("repeat_interleave without a constant count and dim")
    dim = _dim(dim, len(before))
    return tuple(floor_div(at, repeats) if p == dim else at for p, at in enumerate(index))


def _repeat(op: Op, index: Index, before: Sequence[Size], after: Sequence[Size]) -> Index:
    """Tiles: element ``at`` of a repeated dimension shows ``at mod size``."""
    lead = len(after) - len(before)
    result = []
    for size, wide, at in zip(before, after[lead:], index[lead:], strict=True):
        if size == wide:
            result.append(at)
        elif size == 1:
            result.append(Affine())
        else:
            result.append(modulo(at, _static(size)))
    return tuple(result)


_VIEWS: dict[str, Callable[[Op, Index, Sequence[Size], Sequence[Size]], Index]] = {
    "expand": _expand,
    "expand_as": _expand,
    "view": _reshape,
    "view_as": _reshape,
    "flatten": _reshape,
    "unflatten": _reshape,
    "squeeze": _reshape,
    "unsqueeze": _unsqueeze,
    "transpose": _transpose,
    "t": _t,
    "permute": _permute,
    "repeat_interleave": _repeat_interleave,
    "repeat": _repeat,
    "tile": _repeat,
}


def _getitem(op: Op, index: Index, sizes: Sizes, lift: LiftIndex) -> Element | None:
    """``x[...]`` with integers, slices, None, Ellipsis and integer tensors."""
    x = op["x"]
    shape = dialect.shape(x) if isinstance(x, fx.Node) else None
    if shape is None:
        return None
    items = list(op["index"]) if isinstance(op["index"], (tuple, list)) else [op["index"]]
    if op.name == "index":  # aten writes a whole dimension as None
        items = [slice(None) if item is None else item for item in items]
    items = without_ellipsis(items, len(shape))
    tensors = [p for p, item in enumerate(items) if _is_tensor(item)]
    shapes = [dialect.shape(items[p]) or () for p in tensors]
    rank = max((len(s) for s in shapes), default=0)
    # Adjacent index tensors put their dimensions where they stand; separated ones put them first.
    between = items[tensors[0] : tensors[-1] + 1] if tensors else []
    if any(not _is_tensor(i) and isinstance(i, (int, fx.Node)) for i in between):
        raise Stuck("an integer between index tensors")
    adjacent = all(_is_tensor(i) for i in between)
    cursor = 0 if adjacent or not tensors else rank
    gathered = index[:rank] if not adjacent else None
    result: list[Affine] = []
    for item in items:
        if _is_tensor(item):
            if gathered is None:
                gathered = index[cursor : cursor + rank]
                cursor += rank
            result.append(_gathered(item, gathered, lift))
        elif item is None:
            cursor += 1
        elif isinstance(item, slice):
            size = shape[len(result)]
            result.append(_sliced(item, size, index[cursor], sizes))
            cursor += 1
        else:
            result.append(picked(item, shape[len(result)], sizes))
    if cursor != len(index):
        raise Stuck("an indexing expression whose dimensions do not add up")
    return Element(x, tuple(result))


def without_ellipsis(items: list[Any], rank: int) -> list[Any]:
    """``items`` with a full slice for every dimension that they leave out."""
    used = sum(1 for i in items if i is not None and i is not Ellipsis)
    missing: list[Any] = [slice(None)] * (rank - used)
    for position, item in enumerate(items):
        if item is Ellipsis:
            return items[:position] + missing + items[position + 1 :]
    return items + missing


def _is_tensor(item: Any) -> bool:
    return isinstance(item, fx.Node) and dialect.shape(item) is not None


def _gathered(item: fx.Node, index: Index, lift: LiftIndex) -> Affine:
    """The value of one index tensor at ``index`` of the broadcast of all of them."""
    shape = dialect.shape(item) or ()
    if dialect.value(item).dtype == torch.bool:
        raise Stuck("indexing with a boolean tensor")
    aligned = index[len(index) - len(shape) :]
    at = lift(item, tuple(Affine() if s == 1 else a for s, a in zip(shape, aligned, strict=True)))
    low = lower(at)
    if low is None or low < 0:
        raise Stuck(f"an index that may be negative, {at!r}")
    return at


def _sliced(item: slice, size: Size, at: Affine, sizes: Sizes) -> Affine:
    step = 1 if item.step is None else item.step
    if not isinstance(step, int) or step < 1:
        raise Stuck("a slice with a run-time step")
    return at.times(step) + start(item.start, item.stop, size, sizes)


def start(start: Any, stop: Any, size: Size, sizes: Sizes) -> Affine:
    """Where a slice begins. One that begins past the end is empty, so that case needs no care."""
    if start is None:
        return Affine()
    begin = sizes.integer(start)
    if begin is None:
        raise Stuck("a slice that starts at a run-time value")
    low = lower(begin)
    if low is not None and low >= 0:
        return begin
    from_end = sizes.affine(size) + begin
    low_from_end, high = lower(from_end), lower(-begin - 1)
    if high is not None and high >= 0 and low_from_end is not None and low_from_end >= 0:
        return from_end
    if begin.constant is not None and isinstance(size, int):
        return Affine(max(0, size + begin.constant))
    raise Stuck("a slice start that may lie before the first element")


def picked(item: Any, size: Size, sizes: Sizes) -> Affine:
    """The index that an integer names, which may count from the end."""
    at = sizes.integer(item)
    if at is None:
        raise Stuck("an index of unknown kind")
    low, high = lower(at), lower(-at - 1)
    if low is not None and low >= 0:
        return at
    if high is not None and high >= 0:
        return sizes.affine(size) + at
    raise Stuck("an index of unknown sign")


def _select(op: Op, index: Index, sizes: Sizes, lift: LiftIndex) -> Element | None:
    shape = dialect.shape(op["x"])
    if shape is None:
        return None
    dim = _dim(op["dim"], len(shape))
    at = picked(op["index"], shape[dim], sizes)
    return Element(op["x"], (*index[:dim], at, *index[dim:]))


def _slice(op: Op, index: Index, sizes: Sizes, lift: LiftIndex) -> Element | None:
    shape = dialect.shape(op["x"])
    if shape is None:
        return None
    dim = _dim(op["dim"] or 0, len(shape))
    part = slice(op["start"], op["end"], op["step"])
    at = _sliced(part, shape[dim], index[dim], sizes)
    return Element(op["x"], (*index[:dim], at, *index[dim + 1 :]))


def _narrow(op: Op, index: Index, sizes: Sizes, lift: LiftIndex) -> Element | None:
    shape = dialect.shape(op["x"])
    if shape is None:
        return None
    dim = _dim(op["dim"], len(shape))
    at = index[dim] + start(op["start"], None, shape[dim], sizes)
    return Element(op["x"], (*index[:dim], at, *index[dim + 1 :]))


_GATHERS: dict[str, Callable[[Op, Index, Sizes, LiftIndex], Element | None]] = {
    "getitem": _getitem,
    "index": _getitem,
    "select": _select,
    "slice": _slice,
    "narrow": _narrow,
}


def _dim(dim: Any, rank: int) -> int:
    if not isinstance(dim, int) or not -rank <= dim < max(rank, 1):
        raise Stuck(f"dim {dim!r} of a {rank}-d tensor")
    return dim % rank if rank else 0
