"""nsa::refine_blocks: of the blocks a cheap scorer proposed, those with the highest exact logits.

Candidates and result are int32 [B, Hkv, NT * m] and [B, Hkv, NT * n], laid out as select_blocks
returns them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nsa_compile.kernels import geometry
from nsa_compile.kernels.autocast import register_autocast
from nsa_compile.kernels.autograd import not_differentiable
from nsa_compile.kernels.launchers import launchers
from nsa_compile.kernels.modifiers import Modifiers
from nsa_compile.kernels.refine import cpu
from nsa_compile.kernels.visibility import Visibility

_lib = torch.library.Library("nsa", "FRAGMENT")
_lib.define(
    "refine_blocks(Tensor q, Tensor k, Tensor candidates, Tensor? valid, Tensor? ranges, "
    "Tensor? query_segments, Tensor? key_segments, Tensor? slopes, Tensor? positions, "
    "float scale, float softcap, bool causal, SymInt offset, int? window, int query_tile, "
    "int block, int num_selected, int init_blocks, int local_window, int dense_len) -> Tensor"
)


@torch.library.register_fake("nsa::refine_blocks", lib=_lib)
def _fake(
    q: Tensor, k: Tensor, candidates: Tensor, valid: Tensor | None, ranges: Tensor | None,
    query_segments: Tensor | None, key_segments: Tensor | None, slopes: Tensor | None,
    positions: Tensor | None, scale: float, softcap: float, causal: bool, offset: int,
    window: int | None, query_tile: int, block: int, num_selected: int, init_blocks: int,
    local_window: int, dense_len: int,
) -> Tensor:  # fmt: skip
    slots = geometry.num_tiles(q.shape[2], query_tile) * num_selected
    return q.new_empty((k.shape[0], k.shape[1], slots), dtype=torch.int32)


def _dispatch(implementation: Any) -> Any:
    """The op's kernel around ``implementation``, with the dense switch."""

    def kernel(
        q: Tensor, k: Tensor, candidates: Tensor, valid: Tensor | None, ranges: Tensor | None,
        query_segments: Tensor | None, key_segments: Tensor | None, slopes: Tensor | None,
        positions: Tensor | None, scale: float, softcap: float, causal: bool, offset: int,
        window: int | None, query_tile: int, block: int, num_selected: int, init_blocks: int,
        local_window: int, dense_len: int,
    ) -> Tensor:  # fmt: skip
        tiles = geometry.num_tiles(q.shape[2], query_tile)
        if q.numel() == 0:
            return q.new_empty((*k.shape[:2], tiles * num_selected), dtype=torch.int32)
        proposed = candidates.reshape(*candidates.shape[:2], tiles, -1)
        if k.shape[2] <= dense_len or proposed.shape[3] <= num_selected:
            missing = max(0, num_selected - proposed.shape[3])
            kept = torch.nn.functional.pad(proposed[..., :num_selected], (0, missing), value=-1)
            return kept.flatten(2).clone()
        chosen: Tensor = implementation()(
            q, k, proposed, Visibility(valid, ranges, query_segments, key_segments),
            Modifiers(slopes, positions, softcap), scale, causal, offset, window, query_tile,
            block, num_selected, init_blocks, local_window,
        )  # fmt: skip
        return chosen.flatten(2)

    return kernel


_lib.impl("refine_blocks", _dispatch(lambda: cpu.refine_blocks), "CPU")
_lib.impl("refine_blocks", _dispatch(lambda: launchers("refine").refine_blocks), "CUDA")

not_differentiable(_lib, "refine_blocks")
register_autocast(_lib, "refine_blocks", "q", "k")


@register_flop_formula(torch.ops.nsa.refine_blocks)
def _flops(
    q_shape: Any, k_shape: Any, candidates_shape: Any, valid: Any, ranges: Any,
    query_segments: Any, key_segments: Any, slopes: Any, positions: Any, scale: float,
    softcap: float, causal: bool, offset: int, window: int | None, query_tile: int, block: int,
    *args: Any, out_shape: Any = None, dense_len: int | None = None, **kwargs: Any,
) -> int:  # fmt: skip
    """One logit for each query and key of its candidates."""
    batch, q_heads, q_len, dim = q_shape
    if k_shape[2] <= (args[-1] if dense_len is None else dense_len):
        return 0
    listed = candidates_shape[2] // max(1, geometry.num_tiles(q_len, query_tile))
    return int(2 * batch * q_heads * q_len * min(k_shape[2], listed * block) * dim)
