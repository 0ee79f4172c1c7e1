"""nsa::channels: the channels of each kv head that carry the product of queries and keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nsa_compile.kernels.autocast import register_autocast
from nsa_compile.kernels.autograd import not_differentiable
from nsa_compile.kernels.launchers import launchers
from nsa_compile.kernels.score import cpu

_lib = torch.library.Library("nsa", "FRAGMENT")
_lib.define(
    "channels(Tensor q, Tensor k, Tensor? valid, int num_channels, int dense_len) -> Tensor"
)


def _without_statistic(k: Tensor, num_channels: int, dense_len: int) -> Tensor | None:
    """The result where nothing has to be measured: none is read, or all channels are."""
    batch, kv_heads, kv_len, dim = k.shape
    shape = batch, kv_heads, min(num_channels, dim)
    if kv_len <= dense_len:
        return k.new_zeros(shape, dtype=torch.int32)
    if num_channels < dim:
        return None
    return torch.arange(dim, dtype=torch.int32, device=k.device).expand(shape).contiguous()


@torch.library.impl(_lib, "channels", "CPU")
def _cpu(q: Tensor, k: Tensor, valid: Tensor | None, num_channels: int, dense_len: int) -> Tensor:
    known = _without_statistic(k, num_channels, dense_len)
    return cpu.channels(q, k, valid, num_channels) if known is None else known


@torch.library.impl(_lib, "channels", "CUDA")
def _cuda(q: Tensor, k: Tensor, valid: Tensor | None, num_channels: int, dense_len: int) -> Tensor:
    known = _without_statistic(k, num_channels, dense_len)
    return launchers("score").channels(q, k, valid, num_channels) if known is None else known


@torch.library.register_fake("nsa::channels", lib=_lib)
def _fake(q: Tensor, k: Tensor, valid: Tensor | None, num_channels: int, dense_len: int) -> Tensor:
    shape = (k.shape[0], k.shape[1], min(num_channels, k.shape[3]))
    return k.new_empty(shape, dtype=torch.int32)


not_differentiable(_lib, "channels")
register_autocast(_lib, "channels", "q", "k")


@register_flop_formula(torch.ops.nsa.channels)
def _flops(q_shape: Any, k_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """A square and a sum for each query entry, twice that for each key entry."""
    batch, q_heads, q_len, dim = q_shape
    _, kv_heads, kv_len, _ = k_shape
    return 2 * batch * dim * (q_heads * q_len + 2 * kv_heads * kv_len)
