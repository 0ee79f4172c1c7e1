"""The paper's path of three gated branches, whole and in stages."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from nsa_compile import functional
from nsa_compile.bench.settings import Settings
from nsa_compile.passes.selected import gated_choice


class GatedPath:
    """``merge="gate"`` at token granularity; the gates are one more input, with a gradient."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.config = settings, settings.config("gate")

    def sparse(self) -> GatedPath:
        """Itself: there is no length up to which it is dense."""
        return self

    def is_dense(self, length: int) -> bool:
        return False

    def inputs(self, qkv: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        q = qkv[0]
        return *qkv, torch.rand(*q.shape[:3], 3, dtype=q.dtype, device=q.device)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
        return functional.nsa_attention(q, k, v, gates=gates, config=self.config)

    def stages(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Tensor
    ) -> dict[str, Callable[[], object]]:
        """Each branch on its own; what reads the results of others is given them."""
        s, config, ops = self.settings, self.config, torch.ops.nsa
        scale = s.dim**-0.5
        pooling = (s.compress_block, s.compress_stride)

        def compress() -> tuple[Tensor, ...]:
            return tuple(ops.compress(x, None, *pooling) for x in (k, v))

        def compressed(k_cmp: Tensor, v_cmp: Tensor) -> tuple[Tensor, Tensor]:
            out, lse = ops.compressed_attention(
                q, k_cmp, v_cmp, None, None, scale, True, 0, *pooling
            )
            return out, lse

        def select(k_cmp: Tensor, lse: Tensor) -> Tensor:
            return gated_choice(q, k, k_cmp, lse, config, None, None, (scale, True, 0))

        def selected(blocks: Tensor) -> Tensor:
            tiling = (config.query_tile, config.select_block)
            out: Tensor = ops.selected_attention(
                q, k, v, blocks, *(None,) * 6, scale, 0.0, True, 0, None, *tiling, 0
            )[0]
            return out

        def window(o_cmp: Tensor, o_slc: Tensor) -> Tensor:
            """The window and the sum, which is one operator, and for CUDA one kernel."""
            tiling = (s.window, config.query_tile, config.select_block)
            branches = (None, None, o_cmp, None, None, o_slc)
            out: Tensor = ops.gated_attention(
                gates, q, k, v, *branches, None, None, scale, True, 0, *pooling, *tiling, False
            )[0]
            return out

        pooled = compress()
        o_cmp, lse = compressed(*pooled)
        blocks = select(pooled[0], lse)
        o_slc = selected(blocks)
        return {
            "compress": compress,
            "compressed": functools.partial(compressed, *pooled),
            "select": functools.partial(select, pooled[0], lse),
            "selected": functools.partial(selected, blocks),
            "window and sum": functools.partial(window, o_cmp, o_slc),
        }
