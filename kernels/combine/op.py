"""nsa::combine: the gated sum of the three branches of Native Sparse Attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nsa_compile.kernels.autograd import once_differentiable
from nsa_compile.kernels.combine import cpu
from nsa_compile.kernels.launchers import launchers
from nsa_compile.kernels.layout import empty_token_major

_BRANCHES = "Tensor gates, Tensor compressed, Tensor selected, Tensor window"
_lib = torch.library.Library("nsa", "FRAGMENT")
_lib.define(f"combine({_BRANCHES}) -> Tensor")
_lib.define(f"combine_backward(Tensor grad, {_BRANCHES}) -> (Tensor, Tensor, Tensor, Tensor)")
_lib.impl("combine", cpu.combine, "CPU")
_lib.impl("combine_backward", cpu.combine_backward, "CPU")


@torch.library.impl(_lib, "combine", "CUDA")
def _cuda(*args: Tensor) -> Any:
    return launchers("combine").combine(*args)


@torch.library.impl(_lib, "combine_backward", "CUDA")
def _backward_cuda(*args: Tensor) -> Any:
    return launchers("combine").combine_backward(*args)


@torch.library.register_fake("nsa::combine", lib=_lib)
def _fake(gates: Tensor, compressed: Tensor, selected: Tensor, window: Tensor) -> Tensor:
    return empty_token_major(compressed, *compressed.shape)


@torch.library.register_fake("nsa::combine_backward", lib=_lib)
def _backward_fake(
    grad: Tensor, gates: Tensor, compressed: Tensor, selected: Tensor, window: Tensor
) -> tuple[Tensor, ...]:
    branches = (empty_token_major(x, *x.shape) for x in (compressed, selected, window))
    return gates.new_empty(gates.shape), *branches


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> Any:
    return torch.ops.nsa.combine_backward(grad, *ctx.saved_tensors)


torch.library.register_autograd("nsa::combine", _backward, setup_context=_setup_context, lib=_lib)

once_differentiable(_lib, "combine_backward")


@register_flop_formula(torch.ops.nsa.combine)
def _flops(gates_shape: Any, branch_shape: Any, *args: Any, **kwargs: Any) -> int:
    """A multiply-add for each element of the three branches."""
    return 6 * int(torch.Size(branch_shape).numel())


@register_flop_formula(torch.ops.nsa.combine_backward)
def _backward_flops(grad_shape: Any, *args: Any, **kwargs: Any) -> int:
    """For each element of the three branches a product, and a multiply-add for its gate."""
    return 9 * int(torch.Size(grad_shape).numel())
