"""Autocast rules: what an operator reads is cast as scaled_dot_product_attention casts it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_DEVICES = {"cpu": "CPU", "cuda": "CUDA"}


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which attention reads ``x`` here: its own outside of autocast.

    Autocast leaves float64, integers and tensors of other devices alone.
    """
    device = x.device.type
    eligible = x.is_floating_point() and x.dtype != torch.float64 and device in _DEVICES
    if eligible and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def register_autocast(lib: torch.library.Library, name: str, *arguments: str) -> None:
    """Cast ``arguments`` of ``nsa::name`` to the dtype of autocast, and nothing else (lse, slopes).

    ``torch.library.register_autocast`` casts every floating tensor, and a log-sum-exp in half
    precision is no normaliser.
    """
    op = getattr(torch.ops.nsa, name).default
    names = [argument.name for argument in op._schema.arguments]
    unknown = set(arguments) - set(names)
    if unknown:
        raise ValueError(f"nsa::{name} has no arguments {sorted(unknown)}, only {names}")
    for device, suffix in _DEVICES.items():
        key = f"Autocast{suffix}"
        lib.impl(name, _rule(op, names, set(arguments), key, device), key)


def _rule(op: Any, names: list[str], read: set[str], key: str, device: str) -> Any:
    outside = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def rule(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False))
        for name, value in (*given.items(), *kwargs.items()):
            if name in read and value is not None and value.device.type == device:
                target = kwargs if name in kwargs else given
                target[name] = value.to(autocast_dtype(value))
        with torch._C._ExcludeDispatchKeyGuard(outside):
            return op(*given.values(), **kwargs)

    return rule
