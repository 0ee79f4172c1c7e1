"""Which keys and blocks a query position sees, as tensors, for the PyTorch kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_compile.kernels.geometry import Tiling, num_compressed


def sees(positions: Tensor, keys: Tensor, tiling: Tiling) -> Tensor:
    """bool: which of ``keys`` each position sees, both broadcast against each other."""
    mask = keys < tiling.kv_len
    if tiling.causal:
        mask = mask & (keys <= positions)
    if tiling.window is not None and tiling.causal:
        mask = mask & (keys > positions - tiling.window)
    elif tiling.window is not None:
        mask = mask & ((positions - keys).abs() < tiling.window)
    return mask


def visible_blocks(tiling: Tiling, tiles: range, valid: Tensor | None) -> Tensor:
    """bool [B or 1, len(tiles), Ns]: some query of the tile sees some valid key of the block."""
    ranges = [tiling.visible_keys(tiling.positions(t, t + 1)) for t in tiles]
    low, high = torch.tensor(ranges, dtype=torch.int64).view(-1, 2).T[..., None]
    start = torch.arange(tiling.blocks) * tiling.block
    low, high = torch.maximum(low, start), torch.minimum(high, start + tiling.block)
    if valid is None:
        return (low < high)[None]
    before = torch.nn.functional.pad(valid.cumsum(dim=1), (1, 0))
    return before[:, torch.maximum(low, high)] > before[:, low]


def holds_valid_key(valid: Tensor, block: int, stride: int) -> Tensor:
    """bool [B, Nc]: the compressed block ``[c * stride, c * stride + block)`` holds a valid key."""
    start = torch.arange(num_compressed(valid.shape[1], block, stride)) * stride
    before = torch.nn.functional.pad(valid.cumsum(dim=1), (1, 0))
    return before[:, start + block] > before[:, start]
