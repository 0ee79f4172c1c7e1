"""Does a BlockMask of flex_attention list the blocks that its mask_mod shows?

flex_attention reads the listed blocks only, and applies mask_mod in those that are not listed as
full. The mask that is proven is mask_mod alone, so the two have to agree: where the BlockMask is
computed from constants this is checked once, where it comes in as inputs whenever they change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import fx
from torch.utils._python_dispatch import _disable_current_modes

from nsa_compile.passes import dialect
from nsa_compile.passes.lower.calls import Unsupported
from nsa_compile.passes.masks.mutation import base
from nsa_compile.passes.reasons import Reason, Refusal

# Block sizes of the mask that flex_attention makes for itself when it is given none.
_ONE_BLOCK = 1 << 30
# Scores looked at in one go, and in all while compiling (a length of 16,384).
_AT_ONCE, _AT_COMPILE_TIME = 1 << 24, 1 << 28


@dataclass(frozen=True)
class Blocks:
    """What a BlockMask says and its mask_mod.

    Attributes:
        listed: number and indices of the blocks with hidden keys, ``[B, H, rows]`` and
            ``[B, H, rows, columns]``, and the same of the full blocks, if there are any: graph
            inputs.
        buffers: further inputs of ``mask_mod``.
        lengths: B, Hq, Tq, Tk.
        sizes: queries and keys in a block.
    """

    listed: tuple[fx.Node | None, ...]
    buffers: tuple[Any, ...]
    mask_mod: fx.GraphModule
    lengths: tuple[int, ...]
    sizes: tuple[int, int]

    def inputs(self) -> list[fx.Node]:
        """The nodes whose values decide."""
        return [n for n in (*self.listed, *self.buffers) if isinstance(n, fx.Node)]

    def renamed(self, names: Callable[[fx.Node], fx.Node]) -> Blocks:
        """The same in terms of other nodes."""
        listed, buffers = fx.map_arg((self.listed, self.buffers), names)
        return replace(self, listed=tuple(listed), buffers=tuple(buffers))

    def agree(self, values: Mapping[fx.Node, Any]) -> bool:
        """Whether exactly the blocks that ``mask_mod`` shows something of are listed, once."""
        with torch.no_grad():
            return self._agree(*fx.map_arg((self.listed, self.buffers), values.__getitem__))

    def _agree(self, listed: Sequence[Any], buffers: Sequence[Any]) -> bool:
        partial = _counts(*listed[:2])
        full = torch.zeros_like(partial) if listed[2] is None else _counts(*listed[2:])
        *_, queries, keys = self.lengths
        rows, columns = (-(-n // size) for n, size in zip((queries, keys), self.sizes, strict=True))
        if partial.shape[-2] < rows or partial.shape[-1] < columns or (partial + full > 1).any():
            return False
        step = max(1, _AT_ONCE // (keys * self.sizes[0]))
        for first in range(0, rows, step):
            last = min(rows, first + step)
            some, every = self._shown(first, last, buffers, partial.device)
            here = (..., slice(first, last), slice(0, columns))
            hidden, whole = partial[here] == 0, full[here] > 0
            if (some & hidden & ~whole).any() or (whole & ~every).any():
                return False
        return True

    def _shown(
        self, first: int, last: int, buffers: Sequence[Any], device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Whether some, and whether every score of these rows of blocks is shown."""
        batch, heads, queries, keys = self.lengths
        height, width = self.sizes
        stop = min(queries, last * height)
        extents = ((0, batch), (0, heads), (first * height, stop), (0, keys))
        index = [
            torch.arange(*extent, device=device).view([-1 if d == dim else 1 for d in range(4)])
            for dim, extent in enumerate(extents)
        ]
        shown = fx.Interpreter(self.mask_mod).run(*index, *buffers)
        shown = shown[0] if isinstance(shown, (tuple, list)) else shown
        size = (*shown.shape[:2], stop - first * height, keys)
        shown = shown.expand(size)
        below, beyond = (last - first) * height - size[2], -keys % width
        grids = []
        for outside in (False, True):
            padded = torch.nn.functional.pad(shown, (0, beyond, 0, below), value=outside)
            grids.append(padded.unflatten(3, (-1, width)).unflatten(2, (-1, height)))
        return grids[0].any(5).any(3), grids[1].all(5).all(3)


def is_given(block_mask: Sequence[Any]) -> bool:
    """Whether the caller passed a BlockMask: without one, everything is a single block."""
    return not all(isinstance(size, int) and size >= _ONE_BLOCK for size in block_mask[-3:-1])


def claimed(call: fx.Node, owner: fx.GraphModule) -> Blocks | None:
    """What the BlockMask of ``call`` claims, to be checked at run time; None is proven or absent.

    Raises:
        Unsupported: it claims something else than its mask_mod, or nobody can tell.
    """
    block_mask = call.args[4]
    assert isinstance(block_mask, (tuple, list))
    if not is_given(block_mask):
        return None
    *_, height, width, mod = block_mask
    module = getattr(owner, str(mod.target), None) if isinstance(mod, fx.Node) else None
    q, k = (dialect.shape(x) for x in call.args[:2] if isinstance(x, fx.Node))
    lengths = (*(q or ())[:3], *(k or ())[2:3])
    constant = all(isinstance(n, int) for n in (*lengths, height, width))
    if not isinstance(module, fx.GraphModule) or not constant:
        _refuse(call, "whose sizes are no constants")
    buffers = call.args[8] if len(call.args) > 8 else ()
    listed, sizes = tuple(block_mask[2:6]), (height, width)
    blocks = Blocks(listed, tuple(buffers), module, lengths, sizes)
    if all(node.op == "placeholder" for node in blocks.inputs()):
        return blocks
    if not blocks.agree(_evaluated(call, blocks)):
        _refuse(call, "that lists other blocks than its mask_mod shows")
    return None


def _evaluated(call: fx.Node, blocks: Blocks) -> dict[fx.Node, Any]:
    """The values of what ``blocks`` reads, computed by the graph from constants alone."""
    *_, queries, keys = blocks.lengths
    if queries * keys > _AT_COMPILE_TIME:
        _refuse(call, f"computed in the graph for {queries} queries and {keys} keys")
    needed = _program(call, blocks.inputs())
    values: dict[fx.Node, Any] = {}
    with _disable_current_modes(), torch.no_grad():
        for node in call.graph.nodes:
            if node is call:
                break
            # Levels of vmap are opened and closed by calls that no result depends on.
            if node in needed or dialect.name(node).endswith("crement_nesting"):
                args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
                method = node.op == "call_method"
                run: Any = getattr(torch.Tensor, str(node.target)) if method else node.target
                values[node] = run(*args, **kwargs)
    return values


def _program(call: fx.Node, results: Sequence[fx.Node]) -> set[fx.Node]:
    """The nodes that compute ``results``, writes in place included."""
    writes: dict[fx.Node, list[fx.Node]] = {}
    for node in call.graph.nodes:
        for target in dialect.written(node):
            writes.setdefault(base(target), []).append(node)
    needed: set[fx.Node] = set()
    pending = list(results)
    while pending:
        node = pending.pop()
        if node in needed:
            continue
        operator = isinstance(node.target, torch._ops.HigherOrderOperator)
        if node.op not in ("call_function", "call_method") or operator:
            _refuse(call, f"computed from {dialect.describe(node)}")
        needed.add(node)
        pending += [*node.all_input_nodes, *writes.get(base(node), [])]
    return needed


def _counts(numbers: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """How often each block ``[B, H, rows, columns]`` is listed."""
    columns = indices.shape[-1]
    used = torch.arange(columns, device=indices.device) < numbers[..., None]
    counts = torch.zeros(indices.shape, dtype=torch.int32, device=indices.device)
    return counts.scatter_add_(-1, indices.long().clamp(0, columns - 1), used.int())


def _refuse(call: fx.Node, why: str) -> NoReturn:
    detail = f"node {dialect.describe(call)}: a BlockMask {why}"
    raise Unsupported(Refusal(Reason.MASK_FROM_OUTSIDE, detail))
