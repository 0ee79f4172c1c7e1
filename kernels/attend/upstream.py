"""What the gradient kernels of an attention are told of the step behind it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from nsa_compile.kernels.attend.gate import Gate


class Upstream(NamedTuple):
    """What reaches an attention's backward, and where its gradients go.

    Behind a gate ``grad_out`` is that of the gated sum, and ``out`` and ``grad_lse`` are not read.
    ``added``: whether to dq, and whether to dk and dv, what they already hold is added. ``given``:
    delta is known.
    """

    grad_out: torch.Tensor
    grad_lse: torch.Tensor | None
    out: torch.Tensor
    gate: Gate | None = None
    added: tuple[bool, bool] = (False, False)
    given: bool = False
