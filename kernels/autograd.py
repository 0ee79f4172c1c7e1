"""Autograd rules: of attention, of integer results, and of gradients themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


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


def differentiable_attention(lib: torch.library.Library, name: str, terms: int) -> None:
    """Let ``nsa::name_backward`` differentiate the attention ``nsa::name`` in q, k and v.

    Both come as (out, lse): either gradient may be missing. Of the arguments behind q, k and v the
    first ``terms`` are tensors or None, the others are sizes; the backward takes ``(grad_out,
    grad_lse, q, k, v, out, lse, *terms, *sizes)``.
    """
    gradient = getattr(torch.ops.nsa, f"{name}_backward")

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        qkv, rest = inputs[:3], inputs[3:]
        ctx.sizes = rest[terms:]
        ctx.save_for_backward(*qkv, *output, *rest[:terms])
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:
        saved = ctx.saved_tensors
        rest = (None,) * (terms + len(ctx.sizes))
        if grad_out is None and grad_lse is None:
            return None, None, None, *rest
        if grad_out is None:
            grad_out = torch.zeros_like(saved[3])
        return *gradient(grad_out, grad_lse, *saved, *ctx.sizes), *rest

    torch.library.register_autograd(f"nsa::{name}", backward, setup_context=setup_context, lib=lib)
    once_differentiable(lib, f"{name}_backward")
