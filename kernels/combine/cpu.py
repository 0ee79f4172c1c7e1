"""The gated sum of three branches in plain PyTorch, forward and backward."""

from __future__ import annotations

from torch import Tensor

from nsa_compile.kernels.layout import empty_token_major
from nsa_compile.kernels.precision import accumulator


def combine(gates: Tensor, compressed: Tensor, selected: Tensor, window: Tensor) -> Tensor:
    """``sum_c gates[..., c] * branch_c``, summed in float32 (float64 for float64)."""
    wide = accumulator(compressed.dtype)
    weights = gates.to(wide).unbind(-1)
    branches = (compressed, selected, window)
    total = sum(g[..., None] * x.to(wide) for g, x in zip(weights, branches, strict=True))
    out = empty_token_major(compressed, *compressed.shape)
    return out.copy_(total)


def combine_backward(
    grad: Tensor, gates: Tensor, compressed: Tensor, selected: Tensor, window: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of gates and of the three branches."""
    wide = accumulator(compressed.dtype)
    grad, dgates, branches = grad.to(wide), gates.new_empty(gates.shape), []
    for c, x in enumerate((compressed, selected, window)):
        dgates[..., c] = (grad * x.to(wide)).sum(-1)
        branch = empty_token_major(x, *x.shape)
        branches.append(branch.copy_(grad * gates[..., c, None].to(wide)))
    return dgates, *branches
