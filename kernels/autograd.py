"""Autograd rules of operators that have no gradient: integer results, and gradients themselves."""

from __future__ import annotations

from typing import Any

import torch


def not_differentiable(lib: torch.library.Library, name: str) -> None:
    """Run ``nsa::name`` below autograd: its result is integers, there is nothing to record."""
    op = getattr(torch.ops.nsa, name).default

    def below_autograd(*args: Any, **kwargs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args, **kwargs)

    lib.impl(name, below_autograd, "Autograd")


def once_differentiable(lib: torch.library.Library, name: str) -> None:
    """Make differentiating the gradient ``nsa::name`` an error instead of a silent zero."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"nsa::{name} is itself a gradient and has none (no double backward)")

    torch.library.register_autograd(f"nsa::{name}", backward, lib=lib)
