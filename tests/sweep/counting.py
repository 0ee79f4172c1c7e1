"""Count the attention that a run computes, from the operators it executes and nothing else.

Independent of the compiler's matcher: the profiler sees the operators of eager and of compiled
code alike. Attention is an SDPA operator (unless both its lengths are below the query length: that
mixes what one position has), or a softmax over the last dimension of a tensor whose last two sizes
are at least the query length (a model may add a prompt, sinks and further keys).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.profiler import ProfilerActivity, profile

from tests.sweep.tiny import VOCABULARY

_FUSED = ("aten::scaled_dot_product_attention", "aten::_native_multi_head_attention")
_SOFTMAX = ("aten::softmax", "aten::_softmax", "aten::_safe_softmax")
_CONVERTED = "nsa::selected_attention"


@dataclass(frozen=True)
class Executed:
    """Attention operators of one run: dense ones, ours, and softmaxes over some other matrix."""

    dense: int
    converted: int
    other: tuple[tuple[int, ...], ...] = ()


def count(run: Callable[[], Any], q_len: int) -> tuple[Any, Executed]:
    """The result of ``run()`` and the attention over ``q_len`` queries that it executed."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        result = run()
    dense = converted = 0
    other = []
    for event in recorded.events():
        if event.name == _CONVERTED and not _inside(event, (_CONVERTED,)):
            converted += 1
        elif event.name in _FUSED + _SOFTMAX and not _inside(event, _FUSED + _SOFTMAX + ("nsa::",)):
            shapes = [tuple(each) for each in event.input_shapes or ()]
            shape = shapes[0] if shapes else ()
            if _is_attention(event.name, shapes, q_len):
                dense += 1
            elif len(shape) >= 3:
                other.append(shape)
    return result, Executed(dense, converted, tuple(sorted(set(other))))


def _is_attention(name: str, shapes: list[tuple[int, ...]], q_len: int) -> bool:
    if name in _FUSED:
        lengths = [shape[-2] for shape in shapes[:2] if len(shape) >= 2]
        return not lengths or max(lengths) >= q_len
    shape = shapes[0] if shapes else ()
    return len(shape) >= 2 and q_len <= shape[-2] <= shape[-1] != VOCABULARY


def _inside(event: Any, names: tuple[str, ...]) -> bool:
    """Whether ``event`` runs within another whose name starts with one of ``names``."""
    parent = event.cpu_parent
    while parent is not None:
        if parent.name.startswith(names):
            return True
        parent = parent.cpu_parent
    return False
