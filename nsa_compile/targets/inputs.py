"""--inputs: names, dtypes and shapes of a model's inputs, with dimensions that stay symbolic.

``"input_ids=int64[B,T], scale=float32[]"`` makes keyword arguments, ``"float32[2,T=4096,64]"``
positional ones. A dimension is a number, or a name with or without a size: a name makes it symbolic
in the captured graph. ``T`` and ``B`` take their sizes from ``--seq-len`` and ``--batch``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from nsa_compile.targets.target import DEFAULT_LENGTH, MOST_ELEMENTS, Request, TargetError

_EXPECTED = "expected name=dtype[size,...], such as input_ids=int64[1,T]"
_INPUT = re.compile(r"\s*(?:([A-Za-z_]\w*)\s*=\s*)?([A-Za-z]\w*)\s*\[([^\[\]]*)\]\s*(?:,|;|$)")
_DIMENSION = re.compile(r"(?:([A-Za-z_]\w*)\s*=\s*)?(\d+)|([A-Za-z_]\w*)")
_DTYPES = {
    name: getattr(torch, name)
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8",
                 "uint8", "bool")
}  # fmt: skip
# A symbolic dimension of one element would be taken for a constant.
_FROM_REQUEST = {"T": ("seq_len", DEFAULT_LENGTH), "B": ("batch", 2)}


@dataclass(frozen=True)
class _Input:
    name: str
    dtype: torch.dtype
    dimensions: tuple[tuple[str, int | None], ...]  # name or "", size or None


def example_inputs(request: Request) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword inputs on the meta device, as ``request.inputs`` describes them.

    Raises:
        TargetError: the text is not understood, or a named dimension has no size.
    """
    inputs = _parse(request.inputs or "")
    sizes = _sizes(inputs, request)
    tensors = [(each.name, _tensor(each, sizes)) for each in inputs]
    positional = tuple(tensor for name, tensor in tensors if not name)
    if any(name for name, _ in tensors[: len(positional)]):
        raise TargetError("--inputs: inputs without a name come before those with one")
    return positional, {name: tensor for name, tensor in tensors if name}


def _parse(text: str) -> list[_Input]:
    inputs: list[_Input] = []
    at = 0
    while at < len(text) or not inputs:
        found = _INPUT.match(text, at)
        if found is None:
            raise TargetError(f"--inputs: {_EXPECTED}, got {text[at:].strip()!r}")
        name, dtype, shape = found.groups()
        if dtype not in _DTYPES:
            raise TargetError(f"--inputs: expected a dtype of {', '.join(_DTYPES)}, got {dtype!r}")
        if name and any(each.name == name for each in inputs):
            raise TargetError(f"--inputs: {name!r} is given twice")
        inputs.append(_Input(name or "", _DTYPES[dtype], _shape(shape)))
        at = found.end()
    return inputs


def _shape(text: str) -> tuple[tuple[str, int | None], ...]:
    dimensions: list[tuple[str, int | None]] = []
    for part in text.split(",") if text.strip() else []:
        found = _DIMENSION.fullmatch(part.strip())
        if found is None:
            raise TargetError(
                f"--inputs: expected sizes such as 4096, T or T=4096, got {part.strip()!r}"
            )
        name, size, bare = found.groups()
        dimensions.append((bare or name or "", int(size) if size and len(size) < 19 else None))
        if size and not 0 < (dimensions[-1][1] or 0):
            raise TargetError(f"--inputs: expected a size from 1 up, got {part.strip()!r}")
    return tuple(dimensions)


def _sizes(inputs: list[_Input], request: Request) -> dict[str, int]:
    """The size of every named dimension."""
    sizes: dict[str, int] = {}
    named = [dim for each in inputs for dim in each.dimensions if dim[0]]
    for name, size in named:
        if size is not None and sizes.setdefault(name, size) != size:
            raise TargetError(f"--inputs: {name} is {sizes[name]} and {size}")
    for name, (field, default) in _FROM_REQUEST.items():
        given = getattr(request, field)
        if given is not None and (name in sizes or name not in dict(named)):
            flag = f"--{field.replace('_', '-')}"
            raise TargetError(f"{flag} has no effect: --inputs leaves no size of {name} open")
        if name in dict(named):
            sizes.setdefault(name, given or default)
    missing = [name for name, _ in named if name not in sizes]
    if missing:
        raise TargetError(f"--inputs: {missing[0]} has no size; write {missing[0]}=1024")
    return sizes


def _tensor(given: _Input, sizes: dict[str, int]) -> torch.Tensor:
    shape = [size or sizes[name] for name, size in given.dimensions]
    elements = 1
    for size in shape:
        elements *= size
    if elements > MOST_ELEMENTS:
        raise TargetError(f"--inputs: expected at most 2**40 elements in an input, got {shape}")
    tensor = torch.zeros(shape, dtype=given.dtype, device="meta")
    for dimension, (name, _) in enumerate(given.dimensions):
        if name:
            torch._dynamo.maybe_mark_dynamic(tensor, dimension)
    return tensor
