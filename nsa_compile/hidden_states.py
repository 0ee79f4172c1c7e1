"""Which arguments of which modules are hidden states: read off the captured graph."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

import nsa_compile.kernels.library  # noqa: F401
from nsa_compile.passes import dialect
from nsa_compile.passes.marks import erase_marks, marks_of
from nsa_compile.passes.site import AttentionSite

# They run all that they hold, so nothing may be added to them.
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class Input:
    """An argument that may be hidden states.

    Attributes:
        shape: its shape.
        where: its position and its keyword in the call, None where it has none.
    """

    def __init__(self, value: Tensor, position: int | None, keyword: str | None) -> None:
        self.shape, self.where = tuple(value.shape), (position, keyword)

    def layout(self, site: AttentionSite) -> bool | None:
        """Whether the sequence comes first; None: these are no hidden states of ``site``."""
        *rows, _ = self.shape
        batch, length = int(site.batch), int(site.q_len)
        if rows == [length, batch] and batch != length:
            return True
        return False if rows in ([batch, length], [batch * length], [1, batch * length]) else None


def watch(model: nn.Module) -> None:
    """Let every module of ``model`` that may attend mark its floating-point arguments."""
    for path, module in model.named_modules():
        if isinstance(module, _CONTAINERS):
            continue
        if next(module.children(), None) is not None or not type(module).__module__.startswith(
            "torch.nn."
        ):
            module.register_forward_pre_hook(_watcher(path, _names(module)), with_kwargs=True)


def _watcher(path: str, names: list[str]) -> Any:
    def mark(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [(names[i] if i < len(names) else "", x) for i, x in enumerate(args)]
        for name, x in (*given, *kwargs.items()):
            if isinstance(x, Tensor) and x.is_floating_point() and x.ndim in (2, 3):
                position = names.index(name) if name in names else -1
                torch.ops.nsa.site(x, [], f"{path}:{position}:{name}", False)

    return mark


def watched(gm: fx.GraphModule) -> dict[str, list[Input]]:
    """What the modules were given whose calls ``gm`` holds, by their paths; takes the marks out."""
    seen: dict[str, list[Input]] = {}
    for node in marks_of(gm):
        value, _, text, _ = node.args
        path, position, name = str(text).rsplit(":", 2)
        where = (None if position == "-1" else int(position), name or None)
        shown = dialect.value(value)
        seen.setdefault(path, []).append(Input(shown, *where))
    erase_marks(gm)
    return seen


def _names(module: nn.Module) -> list[str]:
    """Positional parameters of the module's forward."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(module.forward).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind in kinds]


def hidden_states(
    site: AttentionSite, inputs: Mapping[str, list[Input]]
) -> tuple[str, Input, bool] | None:
    """The innermost module around ``site`` that is given its hidden states; sequence first?"""
    path = site.module
    while True:
        for candidate in inputs.get(path, ()):
            layout = candidate.layout(site)
            if layout is not None:
                return path, candidate, layout
        if not path:
            return None
        path = path.rpartition(".")[0]
