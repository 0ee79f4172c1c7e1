"""Runs a converted graph while what its mask proofs took for granted holds, else the dense one."""

from __future__ import annotations

import hashlib
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils.weak import WeakTensorKeyDictionary

from nsa_compile.compilations import CompiledGraph
from nsa_compile.passes.lower import Blocks

Compiled = Callable[..., Any]
# Looks at the arguments of a call; returns what does not hold, or None.
Condition = Callable[[Sequence[Any]], "str | None"]


class ConversionWarning(UserWarning):
    """A graph was compiled without conversion because nsa_compile itself failed on it."""


class Unchanged:
    """A mask proven from a buffer's values holds only for those values.

    A tensor is looked at once, and again when its version counter moved; that is no device work.
    Models that are built alike share compiled code: each brings a buffer of its own.
    """

    def __init__(self, position: int, tensor: torch.Tensor) -> None:
        self.position = position
        self.proven = _digest(tensor)
        self.seen = WeakTensorKeyDictionary()
        self.seen[tensor] = (_version(tensor), True)

    def __call__(self, args: Sequence[Any]) -> str | None:
        if self._holds(args[self.position]):
            return None
        return f"a mask buffer (graph input {self.position}) changed"

    def _holds(self, tensor: torch.Tensor) -> bool:
        version = _version(tensor)
        known, equal = self.seen.get(tensor, (None, False))
        if version is None or known == version:
            return version is not None and bool(equal)
        equal = _digest(tensor) == self.proven
        self.seen[tensor] = (version, equal)
        return equal


class Binary:
    """A padding mask that the model does arithmetic on was proven for 0 and 1.

    Reads the mask, which on a GPU waits for the work queued before.
    """

    def __init__(self, position: int) -> None:
        self.position = position

    def __call__(self, args: Sequence[Any]) -> str | None:
        mask = args[self.position]
        if bool(((mask == 0) | (mask == 1)).all()):
            return None
        return f"a padding mask (graph input {self.position}) holds more than 0 and 1"


class Agreement:
    """The mask of flex_attention was proven from mask_mod: the BlockMask has to say the same.

    Evaluates mask_mod once for each new BlockMask, as much work as making it was; after that it
    compares identities and version counters.
    """

    def __init__(self, blocks: Blocks, position: Mapping[fx.Node, int]) -> None:
        self.blocks = blocks
        self.positions = {node: position[node] for node in blocks.inputs()}
        self.known: list[_Version] = []

    def __call__(self, args: Sequence[Any]) -> str | None:
        tensors = [args[at] for at in self.positions.values()]
        if self.known and all(map(_Version.is_of, self.known, tensors)):
            return None
        if self.blocks.agree({node: args[at] for node, at in self.positions.items()}):
            self.known = [_Version(tensor) for tensor in tensors]
            return None
        at = ", ".join(map(str, self.positions.values()))
        return f"a BlockMask (graph inputs {at}) lists other blocks than its mask_mod shows"


class _Version:
    """A tensor's identity and version, without keeping the tensor alive."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = weakref.ref(tensor)
        self.version = _version(tensor)

    def is_of(self, tensor: torch.Tensor) -> bool:
        known = self.version is not None and self.version == _version(tensor)
        return known and self.tensor() is tensor


def _digest(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Equal for tensors of equal values."""
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return tuple(tensor.shape), tensor.dtype, hashlib.sha256(values.numpy()).digest()


def _version(tensor: torch.Tensor) -> int | None:
    """The version counter; None for a tensor of inference mode, which has none."""
    return None if tensor.is_inference() else tensor._version


class GuardedCallable:
    """Runs ``converted`` while all ``conditions`` hold, else the dense graph, compiled when needed.

    Attributes:
        conditions: what the mask proofs took for granted.
        entry: where the report notes that the dense graph ran.
    """

    def __init__(
        self,
        converted: Compiled,
        compile_dense: Callable[[], Compiled],
        conditions: Sequence[Condition],
        entry: CompiledGraph,
    ) -> None:
        self.converted = converted
        self.compile_dense = compile_dense
        self.dense: Compiled | None = None
        self.conditions = conditions
        self.entry = entry

    def __call__(self, *args: Any) -> Any:
        for condition in self.conditions:
            why = condition(args)
            if why is not None:
                return self._dense(why)(*args)
        return self.converted(*args)

    def _dense(self, why: str) -> Compiled:
        """The dense graph; the first time this is warned about and noted in the report."""
        if self.dense is None:
            text = f"{why}: graph {self.entry.compile_id} of {self.entry.model} runs dense"
            self.entry.failures.append(text)
            warnings.warn(f"nsa_compile: {text}", ConversionWarning, stacklevel=2)
            self.dense = self.compile_dense()
        return self.dense
