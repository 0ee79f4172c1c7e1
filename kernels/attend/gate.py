"""The gate that weighs a branch's output, as the kernels of the branch are told of it.

    y_i = g_i o_i + ...,  so with e_i = dy_i:  dg_i = e_i.o_i,  ds_ij = g_i p_ij (e_i.v_j - dg_i)

Kernels take ``e`` and scale by row: nobody writes g e, and delta is the gate's own gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class Gate(NamedTuple):
    """The gate itself and delta, which is dg: float32 [B, Hq, Tq], dense, as lse is.

    A step of the key side waits for a gate in half precision: copies ahead have four bytes or more.
    """

    weight: torch.Tensor
    delta: torch.Tensor


class GatedSum(NamedTuple):
    """A sum of branches [B, Hq, Tq, Dv] that the attention of the last one completes.

    gates [B, Hq, Tq, 3] of any strides; ``out`` is written as the attention's own output lies.
    """

    gates: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor
    out: torch.Tensor

    @property
    def arguments(self) -> tuple[torch.Tensor | int, ...]:
        """What the kernel takes: every tensor and the strides of those that are read."""
        branches = (self.first, self.second)
        strides = (stride for x in branches for stride in x.stride()[:3])
        return self.gates, *self.gates.stride(), *branches, *strides, self.out


def arguments_of(gated: GatedSum | None, placeholder: torch.Tensor) -> tuple[Any, ...]:
    """A kernel's arguments; not read where there is no sum."""
    if gated is None:
        gated = GatedSum(placeholder, placeholder, placeholder, placeholder)
    return gated.arguments


def weights_of(gate: Gate | None, placeholder: torch.Tensor) -> torch.Tensor:
    """A kernel's pointer to the weights; not read where there is no gate."""
    return placeholder if gate is None else gate.weight
