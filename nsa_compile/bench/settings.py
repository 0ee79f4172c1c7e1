"""What a benchmark measures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nsa_compile.passes.config import NSAConfig

CONVERSIONS = ("channels", "mean")  # by the scorer that chooses the blocks
PATHS = (*CONVERSIONS, "gate")  # "gate": the three branches of the NSA paper


@dataclass(frozen=True)
class Settings:
    """What is measured; sizes as in ``NSAConfig``.

    Args:
        heads: pairs of query and kv heads.
        lengths: tokens of the sequences, ascending; queries and keys are equally many.
        paths: those to measure, of ``PATHS``. "gate" has a query tile of 1 and is never dense.
        budget_ms: about how long one measurement may take, in milliseconds.
    """

    device: str
    dtype: str
    dim: int
    heads: tuple[tuple[int, int], ...]
    lengths: tuple[int, ...]
    paths: tuple[str, ...] = CONVERSIONS
    query_tile: int = 64
    block: int = 64
    num_selected: int = 16
    init_blocks: int = 1
    window: int = 512
    compress_block: int = 32
    compress_stride: int = 16
    score_channels: int | None = None
    candidates: int | None = None
    dense_len: int = 8192
    backward: bool = True
    budget_ms: float = 400.0

    def config(self, path: str) -> NSAConfig:
        """The configuration of a layer converted to ``path``, or built from it."""
        if path == "gate":
            chosen: dict[str, Any] = {"merge": "gate", "query_tile": 1}
        else:
            chosen = {"scorer": path, "query_tile": self.query_tile}
        return NSAConfig(
            **chosen, select_block=self.block,
            num_selected=self.num_selected, init_blocks=self.init_blocks, window=self.window,
            compress_block=self.compress_block, compress_stride=self.compress_stride,
            score_channels=self.score_channels, candidates=self.candidates,
            dense_len=self.dense_len,
        )  # fmt: skip
