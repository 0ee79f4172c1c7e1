"""Inputs of the operator tests: one attention site with its sizes, and tensors for it."""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nsa_compile.kernels.attend.reference import visible
from tests.kernels import terms


@dataclass(frozen=True)
class Site:
    """Sizes, mask and NSA sizes of one attention; small blocks so that short inputs have many."""

    batch: int = 2
    kv_heads: int = 2
    group: int = 2
    q_len: int = 111
    kv_len: int | None = None
    dim: int = 32
    value_dim: int | None = None
    causal: bool = True
    offset: int = 0
    window: int | None = None
    padding: str = "none"
    query_tile: int = 16
    block: int = 16
    num_selected: int = 5
    init_blocks: int = 1
    local_window: int = 20
    compress_block: int = 8
    compress_stride: int = 4
    channels: int = 8
    scale: float = 0.3
    ranges: str = "none"
    segments: str = "none"
    slopes: bool = False
    positions: bool = False
    softcap: float = 0.0
    importance: str = "overlap"

    @property
    def keys(self) -> int:
        return self.q_len if self.kv_len is None else self.kv_len

    @property
    def tiles(self) -> int:
        return -(-self.q_len // self.query_tile)

    @property
    def blocks(self) -> int:
        return -(-self.keys // self.block)

    @property
    def mask(self) -> tuple[Any, ...]:
        """Scale, causal, offset, window: what every operator takes in this order."""
        return self.scale, self.causal, self.offset, self.window

    @property
    def logits(self) -> tuple[Any, ...]:
        """Scale, softcap, causal, offset, window."""
        return self.scale, self.softcap, self.causal, self.offset, self.window

    @property
    def attention(self) -> tuple[Any, ...]:
        """What selected_attention takes behind block_indices, up to block."""
        return *self.terms(), *self.logits, self.query_tile, self.block

    def but(self, **changes: Any) -> Site:
        return dataclasses.replace(self, **changes)

    def tensors(
        self, dtype: torch.dtype = torch.float64, seed: int = 0, requires_grad: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v as views of [B, T, H, D], the layout models produce."""
        rng = torch.Generator().manual_seed(seed)

        def view(heads: int, length: int, dim: int) -> Tensor:
            x = torch.randn(self.batch, length, heads, dim, generator=rng, dtype=torch.float64)
            return x.to(dtype).transpose(1, 2).requires_grad_(requires_grad)

        q_heads = self.kv_heads * self.group
        value_dim = self.dim if self.value_dim is None else self.value_dim
        return (
            view(q_heads, self.q_len, self.dim),
            view(self.kv_heads, self.keys, self.dim),
            view(self.kv_heads, self.keys, value_dim),
        )

    def valid(self) -> Tensor | None:
        """bool [B, Tk]: the last entry of the batch is padded to a bit more than half."""
        if self.padding == "none":
            return None
        valid = torch.ones(self.batch, self.keys, dtype=torch.bool)
        if self.padding == "scattered":
            rng = torch.Generator().manual_seed(1)
            return torch.rand(self.batch, self.keys, generator=rng) < 0.6
        short = self.keys // 2 - 3
        if self.padding == "left":
            valid[-1, : max(short, 0)] = False
        elif self.padding == "right":
            valid[-1, self.keys - max(short, 0) :] = False
        elif self.padding == "nothing valid":
            valid[-1] = False
        return valid

    def terms(self) -> tuple[Tensor | None, ...]:
        """valid, ranges, query and key segments, slopes, positions: as operators take them."""
        return terms.tensors(self, self.kv_heads * self.group, self.keys, self.valid())

    def random_blocks(self, seed: int = 0) -> Tensor:
        """int32 [B, Hkv, NT, n]: any blocks, ascending, with some empty slots at the end."""
        rng = torch.Generator().manual_seed(seed)
        rows = []
        for _ in range(self.batch * self.kv_heads * self.tiles):
            order = torch.randperm(self.blocks, generator=rng)
            count = int(torch.randint(0, self.num_selected + 1, (1,), generator=rng))
            chosen = order[: min(count, self.blocks)].sort().values
            rows.append([*chosen.tolist(), *[-1] * (self.num_selected - len(chosen))])
        shape = (self.batch, self.kv_heads, self.tiles, self.num_selected)
        return torch.tensor(rows, dtype=torch.int32).view(shape)

    def all_blocks(self) -> Tensor:
        """int32 [B, Hkv, NT, Ns]: the budget that covers every key."""
        shape = (self.batch, self.kv_heads, self.tiles, self.blocks)
        return torch.arange(self.blocks, dtype=torch.int32).expand(shape)

    def site_mask(self) -> Tensor:
        """The site's own mask, bool [B or 1, 1, Tq, Tk]."""
        mask = visible(self.q_len, self.keys, self.causal, self.offset, self.window, self.valid())
        return mask[:, None] if mask.ndim == 3 else mask[None, None]


# Every mask the operators know, at lengths where Tq != Tk, blocks are cut and rows see nothing.
MASKS = {
    "causal": Site(),
    "full": Site(causal=False),
    "causal, window": Site(window=37),
    "window of one": Site(window=1),
    "two-sided window": Site(causal=False, window=23),
    "offset": Site(q_len=50, kv_len=111, offset=61),
    "negative offset": Site(q_len=111, kv_len=60, offset=-20),
    "more queries than keys": Site(q_len=130, kv_len=70),
    "odd offset": Site(q_len=63, kv_len=100, offset=7),
    "left padding": Site(padding="left"),
    "right padding": Site(padding="right"),
    "scattered padding, window": Site(padding="scattered", window=9),
    "full, right padding": Site(causal=False, padding="right"),
    "nothing valid": Site(padding="nothing valid"),
}

# What may stand beside the mask: ranges, segments, ALiBi, a cap, and how they meet the rest.
TERMS = {
    "chunks": Site(ranges="chunks"),
    "chunks, offset": Site(ranges="chunks", q_len=50, kv_len=111, offset=61),
    "prefix": Site(ranges="prefix", causal=False),
    "prefix, padding": Site(ranges="prefix", causal=False, padding="left"),
    "random ranges": Site(ranges="random"),
    "random ranges, full, padding": Site(ranges="random", causal=False, padding="scattered"),
    "random ranges, window": Site(ranges="random", window=37),
    "documents": Site(segments="documents"),
    "mixed segments, padding": Site(segments="mixed", causal=False, padding="right"),
    "segments and ranges": Site(segments="mixed", ranges="random", window=37),
    "segments, offset": Site(segments="documents", q_len=50, kv_len=111, offset=61),
    "alibi": Site(slopes=True),
    "alibi, positions, padding": Site(slopes=True, positions=True, padding="left"),
    "alibi, full, window": Site(slopes=True, causal=False, window=37),
    "alibi, negative offset": Site(slopes=True, positions=True, offset=-20),
    "alibi, G=3": Site(slopes=True, group=3, batch=1),
    "cap": Site(softcap=1.5),
    "cap, padding": Site(softcap=1.5, padding="scattered", window=37),
    "cap, alibi, padding": Site(softcap=1.5, slopes=True, padding="scattered"),
    "everything": Site(
        softcap=1.5, slopes=True, positions=True, ranges="chunks", segments="documents",
        padding="left", q_len=140, query_tile=8, num_selected=6,
    ),
    "tile 1, everything": Site(
        softcap=2.0, slopes=True, ranges="random", segments="mixed", q_len=63, query_tile=1,
    ),
}  # fmt: skip

SIZES = {
    **{f"T={length}": Site(q_len=length) for length in (1, 31, 63, 507)},
    **{f"G={group}": Site(batch=1, q_len=70, group=group) for group in (1, 2, 3, 4, 7, 8)},
    **{
        f"D={dim}, Dv={value_dim}": Site(batch=1, q_len=70, dim=dim, value_dim=value_dim)
        for dim, value_dim in ((32, 64), (64, 32), (80, 80), (128, 96), (256, 256))
    },
    "tile 1": Site(q_len=63, query_tile=1),
    "tile 64": Site(q_len=250, query_tile=64, num_selected=8),
    "tile 32, block 8": Site(q_len=75, query_tile=32, block=8, num_selected=9),
    "block 64": Site(q_len=300, block=64, query_tile=64, num_selected=3, local_window=30),
}


@contextmanager
def poisoned() -> Any:
    """Memory that torch.empty returns holds NaN (the largest integer), so a gap in it shows."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of ``expected``."""
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm().clamp(min=1e-30))
