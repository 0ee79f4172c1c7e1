"""nsa::select_blocks: the blocks of keys that each tile of queries reads.

The result is int32 [B, Hkv, NT * n], the n slots of tile after tile: torch compiles separately for
sizes 0 and 1, so a dimension NT would cost short sequences a compilation of their own.

``lse`` float32 [B, Hq, Tq], of scorer "mean" alone: what nsa::compressed_attention returned for the
same queries, compressed keys and mask. It saves a pass and changes nothing. Where a window, ranges,
ALiBi or a softcap enter the scores it is not read: the softmax of the scores is then another one.

``importance`` says how scorer "mean" carries probabilities over to blocks: "overlap" or
"interpolate", ``nsa_compile.kernels.geometry.fold_weights``.
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
from nsa_compile.kernels.select import cpu
from nsa_compile.kernels.visibility import Visibility

_lib = torch.library.Library("nsa", "FRAGMENT")
_lib.define(
    "select_blocks(Tensor q, Tensor k, Tensor summary, Tensor? valid, Tensor? ranges, "
    "Tensor? query_segments, Tensor? key_segments, Tensor? slopes, Tensor? positions, str scorer, "
    "float scale, float softcap, bool causal, SymInt offset, int? window, int query_tile, "
    "int block, int num_selected, int init_blocks, int local_window, int compress_block, "
    "int compress_stride, int dense_len, Tensor? lse=None, str importance='overlap') -> Tensor"
)


@torch.library.register_fake("nsa::select_blocks", lib=_lib)
def _fake(
    q: Tensor, k: Tensor, summary: Tensor, valid: Tensor | None, ranges: Tensor | None,
    query_segments: Tensor | None, key_segments: Tensor | None, slopes: Tensor | None,
    positions: Tensor | None, scorer: str, scale: float, softcap: float, causal: bool, offset: int,
    window: int | None, query_tile: int, block: int, num_selected: int, init_blocks: int,
    local_window: int, compress_block: int, compress_stride: int, dense_len: int,
    lse: Tensor | None = None, importance: str = "overlap",
) -> Tensor:  # fmt: skip
    slots = geometry.num_tiles(q.shape[2], query_tile) * num_selected
    return q.new_empty((k.shape[0], k.shape[1], slots), dtype=torch.int32)


def _dispatch(implementation: Any) -> Any:
    """The op's kernel around ``implementation``: the dense switch and the budget check."""

    def kernel(
        q: Tensor, k: Tensor, summary: Tensor, valid: Tensor | None, ranges: Tensor | None,
        query_segments: Tensor | None, key_segments: Tensor | None, slopes: Tensor | None,
        positions: Tensor | None, scorer: str, scale: float, softcap: float, causal: bool,
        offset: int, window: int | None, query_tile: int, block: int, num_selected: int,
        init_blocks: int, local_window: int, compress_block: int, compress_stride: int,
        dense_len: int, lse: Tensor | None = None, importance: str = "overlap",
    ) -> Tensor:  # fmt: skip
        if k.shape[2] <= dense_len or q.numel() == 0:
            slots = geometry.num_tiles(q.shape[2], query_tile) * num_selected
            return q.new_full((k.shape[0], k.shape[1], slots), -1, dtype=torch.int32)
        geometry.check_budget(
            num_selected, query_tile, q.shape[2], k.shape[2], offset, causal, window, init_blocks,
            local_window, block,
        )  # fmt: skip
        if scorer == "mean":
            count = geometry.num_compressed(k.shape[2], compress_block, compress_stride)
            summary = summary[:, :, :count]
        blocks: Tensor = implementation()(
            q, k, summary, Visibility(valid, ranges, query_segments, key_segments),
            Modifiers(slopes, positions, softcap), scorer, scale, causal, offset, window,
            query_tile, block, num_selected, init_blocks, local_window, compress_block,
            compress_stride, lse, importance,
        )  # fmt: skip
        return blocks.flatten(2)

    return kernel


_lib.impl("select_blocks", _dispatch(lambda: cpu.select_blocks), "CPU")
_lib.impl("select_blocks", _dispatch(lambda: launchers("select").select_blocks), "CUDA")

not_differentiable(_lib, "select_blocks")
register_autocast(_lib, "select_blocks", "q", "k", "summary")


# Arguments between the scorer and dense_len.
_SIZES_TO_DENSE_LEN = 12


@register_flop_formula(torch.ops.nsa.select_blocks)
def _flops(
    q_shape: Any, k_shape: Any, summary_shape: Any, valid: Any, ranges: Any, query_segments: Any,
    key_segments: Any, slopes: Any, positions: Any, scorer: str, *args: Any, out_shape: Any = None,
    **kwargs: Any,
) -> int:  # fmt: skip
    """One logit for each query and key on r channels, or for each query and compressed block."""
    dense_len = kwargs["dense_len"] if "dense_len" in kwargs else args[_SIZES_TO_DENSE_LEN]
    batch, q_heads, q_len, dim = q_shape
    if k_shape[2] <= dense_len:
        return 0
    if scorer == "channels":
        return 2 * batch * q_heads * q_len * k_shape[2] * summary_shape[2]
    return 2 * batch * q_heads * q_len * summary_shape[2] * dim
