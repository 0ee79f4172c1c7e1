"""DistributedDataParallel: a graph is converted as a whole before torch cuts it into buckets.

torch cuts a graph where its parameters fill a bucket, and gives the parts to the backend. A cut
through a layer would part attention from its mask, or from the mark of its learned parameters.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import fx

Compiled = Callable[..., Any]
Compile = Callable[[fx.GraphModule, Sequence[Any]], Compiled]
_cut: ContextVar[Callable[[fx.GraphModule, Sequence[Any], Compile], Compiled] | None] = ContextVar(
    "nsa_compile_cut", default=None
)


def compile_parts(
    gm: fx.GraphModule, example_inputs: Sequence[Any], compile_part: Compile
) -> Compiled:
    """``gm`` compiled by ``compile_part``: bucket by bucket where it is about to be cut."""
    cut = _cut.get()
    # A graph that was put together from a copy has lost what the cut asks for.
    placeholders = gm.graph.find_nodes(op="placeholder")
    if cut is None or not all(hasattr(node, "_dynamo_source") for node in placeholders):
        return compile_part(gm, example_inputs)
    return cut(gm, example_inputs, compile_part)


def convert_before_the_cut(backend: Compiled) -> None:
    """Give ``backend`` whole graphs; torch has no hook between its trace and the cut."""
    if not torch.distributed.is_available():
        return
    from torch._dynamo.backends.distributed import DDPOptimizer

    torchs = DDPOptimizer.compile_fn

    @functools.wraps(torchs)
    def compile_fn(self: Any, gm: Any, example_inputs: Any, **given: Any) -> Any:
        if not _is(self.backend_compile_fn, backend):
            return torchs(self, gm, example_inputs, **given)

        def cut(whole: fx.GraphModule, inputs: Sequence[Any], compile_part: Compile) -> Compiled:
            optimizer = copy.copy(self)
            optimizer.backend_compile_fn = lambda part, args, **_: compile_part(part, args)
            compiled: Compiled = torchs(optimizer, whole, inputs, **given)
            return compiled

        before = _cut.set(cut)
        try:
            return self.backend_compile_fn(gm, example_inputs, **given)
        finally:
            _cut.reset(before)

    DDPOptimizer.compile_fn = compile_fn


def _is(callback: Any, backend: Compiled) -> bool:
    """Whether ``callback`` is what torch.compile made of ``backend``."""
    while hasattr(callback, "_torchdynamo_orig_backend"):
        callback = callback._torchdynamo_orig_backend
    return getattr(callback, "compiler_fn", callback) is backend
