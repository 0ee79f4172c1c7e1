"""Build a model without its weights: parameters on meta, buffer values kept where cheap."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_map_only

from nsa_compile.dynamo_text import describe, needs_data
from nsa_compile.targets.target import Request

_CPU, _META = torch.device("cpu"), torch.device("meta")
# Values nobody can know before training, or that cost memory and time for nothing.
_WITHOUT_VALUE = {
    torch.empty, torch.empty_permuted, torch.empty_strided, torch.normal,
    torch.rand, torch.randn, torch.randint, torch.randperm,
}  # fmt: skip
_MOVES = {torch.Tensor.to, torch.Tensor.cuda, torch.Tensor.cpu}
BUDGET = 1 << 30  # bytes of real tensors that deterministic factories may make


@dataclass
class Skeleton:
    """What a builder returned, on the meta device.

    Attributes:
        result: the builder's return value.
        values: real values of buffers, by the ``id`` of the meta tensor that stands for them.
        notes: what the reader of a report should know about the build.
    """

    result: Any
    values: dict[int, torch.Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def build_skeleton(builder: Callable[[], Any]) -> Skeleton:
    """Call ``builder`` so that weights cost nothing, and move all it made to the meta device.

    Factories with a fixed result (``arange``, ``ones``, ``zeros``, ``full``, ``tensor``, ...) run
    for real, so the values of buffers such as a ``tril`` mask stay known; ``empty`` and random ones
    give meta tensors. A builder that mixes both in a way that has no answer is run again entirely
    on the meta device: then no value is known. One that reads values of its weights is run for
    real, with all the memory that this takes.

    Raises:
        Exception: what ``builder`` itself raised.
    """
    mode = _KnownValues()
    try:
        with mode, torch.no_grad():
            result = builder()
    except (RuntimeError, NotImplementedError, TypeError) as error:
        return _build_on_meta(builder, error)
    to_meta = _ToMeta()
    skeleton = Skeleton(to_meta.everything(result), to_meta.values)
    if mode.left_out:
        skeleton.notes.append(
            f"{mode.left_out} tensors beyond {BUDGET >> 20} MiB were built without values: masks "
            "read from such buffers are not proven here, but may be by torch.compile"
        )
    return skeleton


def made(builder: Callable[[], Any], request: Request) -> Skeleton:
    """:func:`build_skeleton`, or what ``builder`` returns as it is where weights are asked for."""
    return Skeleton(builder()) if request.weights else build_skeleton(builder)


def skeleton_of(model: nn.Module) -> Skeleton:
    """A copy of a model that is built, on the meta device; its tensors are not copied."""
    to_meta = _ToMeta()
    return Skeleton(copy.deepcopy(model, to_meta.stand_ins(model)), to_meta.values)


def _build_on_meta(builder: Callable[[], Any], first: Exception) -> Skeleton:
    try:
        with _META, torch.no_grad():
            result = builder()
    except Exception as second:
        if needs_data(first) or needs_data(second):
            return _build_for_real(builder)
        raise first from None
    note = f"buffer values are unknown: building with them failed ({describe(first)})"
    return Skeleton(_ToMeta().everything(result), notes=[note])


def _build_for_real(builder: Callable[[], Any]) -> Skeleton:
    with torch.no_grad():
        result = builder()
    to_meta = _ToMeta()
    note = "the model was built with its weights: building it reads values that meta tensors lack"
    return Skeleton(to_meta.everything(result), to_meta.values, [note])


class _KnownValues(TorchFunctionMode):
    """Sends tensors without a known value to the meta device, whatever device the code asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.remaining = BUDGET
        self.left_out = 0
        self.factories = frozenset(_device_constructors())

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in self.factories:
            return self._make(func, args, kwargs)
        if func in _MOVES:
            return _stay(func, args, kwargs)
        try:
            return func(*args, **kwargs)
        except (RuntimeError, NotImplementedError):
            if _writes(func, kwargs):
                raise  # a known tensor cannot take values that nobody knows
            mixed = (args, kwargs)
            args, kwargs = tree_map_only(torch.Tensor, lambda tensor: tensor.to(_META), mixed)
            return func(*args, **kwargs)

    def _make(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kwargs.pop("pin_memory", None)
        kwargs.pop("generator", None)
        of_meta = bool(args) and isinstance(args[0], torch.Tensor) and args[0].is_meta
        if func in _WITHOUT_VALUE or of_meta:
            return func(*args, **{**kwargs, "device": _META})
        size = func(*args, **{**kwargs, "device": _META})
        if isinstance(size, torch.Tensor) and size.layout is torch.strided:
            bytes_ = size.numel() * size.element_size()
            if bytes_ > self.remaining:
                self.left_out += 1
                return size
            self.remaining -= bytes_
        return func(*args, **{**kwargs, "device": _CPU})


def _writes(func: Callable[..., Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call changes one of its arguments: ``add_``, ``__iadd__``, ``__setitem__``."""
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name.startswith(("__i", "__set")) or "out" in kwargs


def _stay(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """A move keeps the tensor where it is; only a dtype change is done."""
    tensor: torch.Tensor = args[0]
    if func is not torch.Tensor.to:
        return tensor
    if len(args) > 1 and isinstance(args[1], torch.Tensor):
        dtype: torch.dtype | None = args[1].dtype
    else:
        dtype = torch._C._nn._parse_to(*args[1:], **kwargs)[1]
    return tensor if dtype is None else tensor.to(dtype)


class _ToMeta:
    """Moves tensors and modules to the meta device; shared tensors stay shared.

    Attributes:
        values: the real tensors of buffers and other plain tensors of modules, by the ``id`` of
            their meta tensor.
    """

    def __init__(self) -> None:
        self.values: dict[int, torch.Tensor] = {}
        self._moved: dict[int, torch.Tensor] = {}

    def everything(self, result: Any) -> Any:
        """``result`` with each module (in place) and each loose tensor on the meta device."""
        result = tree_map_only(nn.Module, self._module, result)
        return tree_map_only(torch.Tensor, self._tensor, result)

    def stand_ins(self, module: nn.Module) -> dict[int, Any]:
        """The meta tensors of all that ``module`` holds, by the ``id`` of the real one."""
        return {
            id(tensor): tensor if tensor.is_meta else self._remembered(tensor)
            for part in module.modules()
            for slots in (part._parameters, part._buffers, part.__dict__)
            for tensor in slots.values()
            if isinstance(tensor, torch.Tensor)
        }

    def _module(self, module: nn.Module) -> nn.Module:
        for part in module.modules():
            # Plain attributes too: Dynamo lifts them into graph inputs just like buffers.
            for slots in (part._parameters, part._buffers, part.__dict__):
                for name, tensor in list(slots.items()):
                    if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                        slots[name] = self._remembered(tensor)
        return module

    def _remembered(self, tensor: torch.Tensor) -> torch.Tensor:
        meta = self._tensor(tensor)
        if not isinstance(tensor, nn.Parameter):
            self.values[id(meta)] = tensor
        return meta

    def _tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_meta:
            return tensor
        if id(tensor) not in self._moved:
            meta = tensor.detach().to(_META)
            if isinstance(tensor, nn.Parameter):
                meta = nn.Parameter(meta, requires_grad=tensor.requires_grad)
            self._moved[id(tensor)] = meta
        return self._moved[id(tensor)]
