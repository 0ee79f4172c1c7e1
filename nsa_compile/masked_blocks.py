"""A boolean attention mask as the blocks of keys that each tile of queries reads."""

from __future__ import annotations

import torch
from torch import Tensor


def blocks_from_mask(
    mask: Tensor, block: int, *, query_tile: int = 1, kv_heads: int | None = None,
    num_selected: int | None = None,
) -> Tensor:  # fmt: skip
    """The blocks in which some query of a tile sees some key, for ``selected_attention``.

    ``selected_attention`` reads whole blocks: that equals the mask where its own terms (causality,
    window, ranges, padding) say the rest, or the mask is made of blocks.

    Args:
        mask: bool [Tq, Tk] or [B, H, Tq, Tk], True for a key that is seen; H is 1, Hkv or Hq.
        block: L, keys in a block.
        query_tile: R, queries that share one choice.
        kv_heads: Hkv; the heads of ``mask`` are divided among them, and a block that some head of
            a group sees is read by all. None: as many as ``mask`` has.
        num_selected: n; None is the most blocks that a tile sees, which is read on the host.

    Returns:
        int32 [B, Hkv, ceil(Tq / R), n], ascending, -1 at the end.

    Raises:
        ValueError: a wrong shape, dtype or size, or ``num_selected`` blocks do not hold a tile's
            (on the GPU and in compiled code an assertion on the device).
    """
    mask = _four_axes(mask, block, query_tile)
    heads = mask.shape[1]
    kv_heads = heads if kv_heads is None else kv_heads
    if heads == 1:
        mask = mask.expand(-1, kv_heads, -1, -1)
    elif kv_heads < 1 or heads % kv_heads:
        raise ValueError(
            f"the heads of mask must be a multiple of kv_heads, got {heads} and {kv_heads}"
        )
    else:
        mask = mask.unflatten(1, (kv_heads, -1)).any(2)
    below, beyond = -mask.shape[2] % query_tile, -mask.shape[3] % block
    mask = torch.nn.functional.pad(mask, (0, beyond, 0, below))
    seen = mask.unflatten(3, (-1, block)).any(4).unflatten(2, (-1, query_tile)).any(3)
    counts = seen.sum(-1)
    if num_selected is None:
        num_selected = max(1, int(counts.max())) if counts.numel() else 1
    else:
        _check_budget(counts, num_selected, f"a tile of {query_tile} queries sees more than")
    # Seen blocks first, each part in order.
    order = torch.sort(~seen, dim=-1, stable=True).indices[..., :num_selected]
    order = torch.nn.functional.pad(order, (0, num_selected - order.shape[-1]), value=-1)
    filled = torch.arange(num_selected, device=mask.device) < counts[..., None]
    return torch.where(filled, order, -1).to(torch.int32)


def _check_budget(counts: Tensor, num_selected: int, text: str) -> None:
    """On the host where that waits for nothing, else where ``counts`` are."""
    text = f"{text} num_selected={num_selected} blocks; raise it"
    fits = (counts <= num_selected).all()
    if torch.compiler.is_compiling() or counts.device.type != "cpu":
        torch._assert_async(fits, text)
    elif not fits:
        raise ValueError(text)


def _four_axes(mask: Tensor, block: int, query_tile: int) -> Tensor:
    for name, size in (("block", block), ("query_tile", query_tile)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be a positive integer, got {size!r}")
    if mask.dtype != torch.bool or mask.ndim not in (2, 4):
        raise ValueError(
            f"mask must be bool [Tq, Tk] or [B, H, Tq, Tk], got {mask.dtype} {list(mask.shape)}"
        )
    return mask if mask.ndim == 4 else mask[None, None]
