"""A target for real: its model with weights, inputs with values, sizes that stay symbolic."""

from __future__ import annotations

import inspect
import io
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.passes import move_to_device_pass
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from nsa_compile.dynamo_text import describe
from nsa_compile.targets.kinds import load
from nsa_compile.targets.target import Request, Target, TargetError


def load_real(request: Request) -> Target:
    """The target that ``request`` names, built with its weights.

    Raises:
        TargetError: as :func:`load` does, or there are no weights.
    """
    with _watching() as loaded:
        target = load(replace(request, weights=True))
    if not loaded():
        target.notes.append(
            f"{target.name} drew random numbers and loaded no state_dict: if its weights are "
            "random, what is measured says nothing about a trained model"
        )
    meta = [name for name, tensor in _weights(target) if tensor.is_meta]
    if meta:
        raise TargetError(
            f"{request.target}: {len(meta)} weights are on the meta device ({meta[0]}, ...) and "
            "have no values; build the model with its weights"
        )
    target.model.train(request.train)
    if request.device is not None:
        _move(target, request.device)
    return target


def _move(target: Target, device: str) -> None:
    """Put the model and the inputs that have values on ``device``."""
    try:
        if target.program is not None:
            target.program = move_to_device_pass(target.program, device)
            target.args, target.kwargs = target.program.example_inputs or ((), {})
        else:
            target.model.to(device)
    except Exception as error:  # out of memory, above all
        raise TargetError(f"{target.name} cannot go to {device}: {describe(error)}") from error


@contextmanager
def _watching() -> Iterator[Callable[[], bool]]:
    """Tells whether the weights were read from somewhere, as far as one can see."""
    before, load_state_dict = torch.get_rng_state(), nn.Module.load_state_dict
    calls: list[None] = []

    def noted(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return load_state_dict(*args, **kwargs)

    nn.Module.load_state_dict = noted
    try:
        yield lambda: bool(calls) or torch.equal(before, torch.get_rng_state())
    finally:
        nn.Module.load_state_dict = load_state_dict


def has_values(target: Target) -> bool:
    """Whether the target came with inputs that hold values."""
    leaves = tree_leaves((target.args, target.kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return bool(tensors) and not any(tensor.is_meta for tensor in tensors)


def exported(target: Target) -> ExportedProgram:
    """``target`` as an exported program: its own, or made by ``torch.export``.

    Sizes that ``--inputs`` names stay symbolic. Only the shapes of inputs matter.

    Raises:
        TargetError: ``torch.export`` cannot capture the model.
    """
    if target.program is not None:
        return target.program
    args, kwargs = tree_map_only(Tensor, _like(target), (target.args, target.kwargs))
    try:
        with redirect_stderr(io.StringIO()):  # where torch prints the graph that it cannot finish
            return torch.export.export(
                target.model, args, kwargs, dynamic_shapes=_symbolic(target), strict=False
            )
    except Exception as error:
        raise TargetError(
            f"torch.export cannot capture {target.name}: {describe(error)[:400]}; export it "
            "yourself and pass the .pt2 file"
        ) from error


def read_batch(path: Path) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs from a file of ``torch.save``: a tensor, a tuple of arguments or a dict by name.

    Raises:
        TargetError: no such file, or it holds something else.
    """
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise TargetError(f"--data {path}: no such file") from None
    except Exception as error:
        raise TargetError(
            f"--data {path}: expected a file of torch.save with tensors: {describe(error)[:200]}"
        ) from error
    if isinstance(held, Tensor):
        return (held,), {}
    if isinstance(held, dict) and all(isinstance(key, str) for key in held):
        return (), held
    if isinstance(held, (tuple, list)):
        return tuple(held), {}
    raise TargetError(
        f"--data {path}: expected a tensor, a tuple of arguments or a dict by name, got "
        f"{type(held).__name__}"
    )


def device_of(target: Target) -> torch.device:
    """Where the weights are."""
    return next((tensor.device for _, tensor in _weights(target)), torch.device("cpu"))


def _weights(target: Target) -> Iterator[tuple[str, Tensor]]:
    """Parameters, then buffers, by name."""
    held: Any = target.model if target.program is None else target.program
    return itertools.chain(held.named_parameters(), held.named_buffers())


def _like(target: Target) -> Any:
    device = device_of(target)

    def real(tensor: Tensor) -> Tensor:
        return torch.zeros_like(tensor, device=device) if tensor.is_meta else tensor.to(device)

    return real


def _symbolic(target: Target) -> Any:
    """Which sizes stay symbolic, as ``torch.export`` is told; None is none."""
    args, kwargs = tree_map(_sizes, (target.args, target.kwargs))
    if not any(dim is Dim.AUTO for dim in tree_leaves((args, kwargs))):
        return None
    if not kwargs:
        return tuple(args)
    names = list(inspect.signature(target.model.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _sizes(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return None
    named = getattr(value, "_dynamo_weak_dynamic_indices", ())
    return {at: Dim.AUTO if at in named else Dim.STATIC for at in range(value.dim())}
