"""The gate that weighs a branch's output, as the gradient kernels of the branch are told of it.

    y_i = g_i o_i + ...,  so with e_i = dy_i:  dg_i = e_i.o_i,  ds_ij = g_i p_ij (e_i.v_j - dg_i)

Kernels take ``e`` and scale by row: nobody writes g e, and delta is the gate's own gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Gate(NamedTuple):
    """The gate itself and delta, which is dg: float32 [B, Hq, Tq], dense, as lse is.

    A step of the key side waits for a gate in half precision: copies ahead have four bytes or more.
    """

    weight: torch.Tensor
    delta: torch.Tensor


def weights_of(gate: Gate | None, placeholder: torch.Tensor) -> torch.Tensor:
    """A kernel's pointer to the weights; not read where there is no gate."""
    return placeholder if gate is None else gate.weight
