"""Recognise tensors by value: buffers, and parts of a graph that read nothing but constants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from nsa_compile.passes import dialect
from nsa_compile.passes.masks.affine import Affine
from nsa_compile.passes.masks.conditions import FALSE, TRUE, ge
from nsa_compile.passes.masks.logic import all_of
from nsa_compile.passes.masks.values import Value, choose
from nsa_compile.passes.masks.views import Index

# The causal buffer of a 16,384-token model; past it a proof by value costs real time.
_MOST_ELEMENTS = 2**28


@dataclass(frozen=True)
class Pattern:
    """A tensor whose every element follows from its index.

    Along ``dims`` the element is ``start + step * index`` (one dim, ``step`` given), or ``inside``
    where ``low <= difference <= high`` and ``outside`` elsewhere; the difference is the index (one
    dim) or column - row (two dims). No dims is a fill with ``inside``.
    """

    dims: tuple[int, ...] = ()
    inside: Value = TRUE
    outside: Value = FALSE
    low: int | None = None
    high: int | None = None
    start: int = 0
    step: int | None = None

    def element(self, index: Index) -> Value:
        at = [index[d] for d in self.dims]
        if not at:
            return self.inside
        if self.step is not None:
            return at[0].times(self.step) + self.start
        difference = at[0] if len(at) == 1 else at[1] - at[0]
        bounds = [] if self.low is None else [ge(difference - self.low)]
        if self.high is not None:
            bounds.append(ge(-difference + self.high))
        return choose(all_of(bounds), self.inside, self.outside)


def recognise(tensor: torch.Tensor) -> Pattern | None:
    """The pattern that ``tensor`` follows exactly, every element compared, or None."""
    if tensor.is_meta or tensor.numel() == 0 or tensor.numel() > _MOST_ELEMENTS:
        return None
    if tensor.is_complex() or tensor.is_sparse or tensor.is_quantized:
        return None
    tensor = tensor.detach()
    dims = tuple(d for d in range(tensor.dim()) if tensor.shape[d] > 1)
    core = tensor.reshape([tensor.shape[d] for d in dims])
    for position in reversed(range(len(dims))):
        first = core.narrow(position, 0, 1)
        if torch.equal(core, first.expand_as(core)):
            core, dims = first.squeeze(position), dims[:position] + dims[position + 1 :]
    if not dims:
        return Pattern(inside=_value(core))
    if len(dims) == 1:
        return _steps(core, dims) or _run(core, core, dims, shift=0)
    return _band(core, dims) if len(dims) == 2 else None


def _steps(core: torch.Tensor, dims: tuple[int, ...]) -> Pattern | None:
    """``start + step * index`` with integers."""
    if core.dtype == torch.bool:
        return None
    start, second = _value(core[0]), _value(core[1])
    if not isinstance(start, Affine) or not isinstance(second, Affine):
        return None
    step = second.const - start.const
    steps = torch.arange(len(core), device=core.device, dtype=torch.int64) * step + start.const
    if not torch.equal(core.to(torch.float64), steps.to(torch.float64)):
        return None
    return Pattern(dims, start=start.const, step=step)


def _band(core: torch.Tensor, dims: tuple[int, ...]) -> Pattern | None:
    """A matrix whose elements depend on column - row only, inside and outside one band."""
    rows, columns = core.shape
    # profile[d + rows - 1] is the element on diagonal d = column - row.
    profile = torch.cat([core[1:, 0].flip(0), core[0]])
    if not torch.equal(core, profile.unfold(0, columns, 1).flip(0)):
        return None
    return _run(profile, core, dims, shift=rows - 1)


def _run(
    profile: torch.Tensor, core: torch.Tensor, dims: tuple[int, ...], shift: int
) -> Pattern | None:
    """``profile`` as one run of a value inside another."""
    for inside in (profile[0], profile[-1], profile[len(profile) // 2]):
        run = torch.nonzero(profile == inside).flatten()
        first, last = int(run[0]), int(run[-1])
        others = torch.cat([profile[:first], profile[last + 1 :]])
        if last - first + 1 != len(run) or not bool((others == others[0]).all()):
            continue
        return Pattern(
            dims,
            inside=_value(inside),
            outside=_value(others[0]),
            low=None if first == 0 else first - shift,
            high=None if last == len(profile) - 1 else last - shift,
        )
    return None


def _value(element: torch.Tensor) -> Value:
    number = element.item()
    if isinstance(number, bool):
        return TRUE if number else FALSE
    if isinstance(number, float):
        return Affine(int(number)) if number.is_integer() else number
    return Affine(int(number))


class Patterns:
    """Patterns of a graph's constants: given tensors, and what can be evaluated from them."""

    def __init__(self, gm: fx.GraphModule, values: Mapping[fx.Node, torch.Tensor]) -> None:
        self.values = values
        self._given: dict[fx.Node, Pattern | None] = {}
        self._evaluated: dict[fx.Node, Pattern | None] = {}
        self._closed: dict[fx.Node, bool] = {}
        self.read: set[fx.Node] = set()

    def given(self, node: fx.Node) -> Pattern | None:
        """The pattern of a placeholder or attribute whose tensor the caller gave."""
        tensor = self.values.get(node)
        if tensor is None or isinstance(tensor, torch.nn.Parameter):
            return None
        if node not in self._given:
            shape = dialect.shape(node)
            known = shape is None or tuple(tensor.shape) == shape
            with _disable_current_modes():
                self._given[node] = recognise(tensor) if known else None
        if self._given[node] is not None:
            self.read.add(node)
        return self._given[node]

    def evaluated(self, node: fx.Node) -> Pattern | None:
        """The pattern of a node that reads no graph input and no run-time size, by computing it."""
        if node not in self._evaluated:
            self._evaluated[node] = self._evaluate(node)
        return self._evaluated[node]

    def _evaluate(self, node: fx.Node) -> Pattern | None:
        needed = self._ancestors(node)
        if needed is None:
            return None
        computed: dict[fx.Node, Any] = {}
        try:
            with _disable_current_modes(), torch.no_grad(), _Deterministic():
                for each in needed:
                    computed[each] = _run_node(each, computed, self.values)
                result = computed[node]
                found = recognise(result) if isinstance(result, torch.Tensor) else None
        except Exception:  # whatever a model's operator raises: then it is not proven
            return None
        if found is not None:
            self.read.update(n for n in needed if n in self.values)
        return found

    def _ancestors(self, node: fx.Node) -> list[fx.Node] | None:
        """``node`` and what it reads in graph order, None when that is no constant."""
        found: dict[fx.Node, None] = {}
        stack = [node]
        while stack:
            each = stack.pop()
            if each in found:
                continue
            if not self._is_constant_step(each):
                return None
            found[each] = None
            stack.extend(each.all_input_nodes)
        return sorted(found)

    def _is_constant_step(self, node: fx.Node) -> bool:
        if node not in self._closed:
            self._closed[node] = self._check(node)
        return self._closed[node]

    def _check(self, node: fx.Node) -> bool:
        if node.op in ("placeholder", "get_attr"):
            tensor = self.values.get(node)
            return not (tensor is None or tensor.is_meta or isinstance(tensor, torch.nn.Parameter))
        if node.op not in ("call_function", "call_method") or dialect.written(node):
            return False
        if any(dialect.written(user) for user in node.users):
            return False
        shape = dialect.shape(node)
        if shape is None:
            return True
        total = 1
        for extent in shape:
            if not isinstance(extent, int):
                return False
            total *= extent
        return total <= _MOST_ELEMENTS


class _Deterministic(TorchDispatchMode):
    """Refuses random operators: their value now says nothing about their value at run time."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise ValueError(f"{func} is random")
        return func(*args, **(kwargs or {}))


def _run_node(
    node: fx.Node, computed: Mapping[fx.Node, Any], values: Mapping[fx.Node, torch.Tensor]
) -> Any:
    if node in values:
        return values[node].detach().cpu()
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: computed[n])
    args, kwargs = _on_cpu(args), _on_cpu(kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    with torch.device("cpu"):
        return node.target(*args, **kwargs)


def _on_cpu(argument: Any) -> Any:
    """``argument`` with every device replaced by the CPU."""
    if isinstance(argument, torch.device):
        return torch.device("cpu")
    if isinstance(argument, dict):
        return {
            name: torch.device("cpu") if name == "device" else _on_cpu(value)
            for name, value in argument.items()
        }
    if isinstance(argument, (list, tuple)) and not isinstance(argument, torch.Size):
        return type(argument)(_on_cpu(a) for a in argument)
    return argument
