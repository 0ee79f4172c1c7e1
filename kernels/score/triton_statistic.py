"""Triton kernels that find the channels which carry the product of queries and keys.

    strength_c = E[q_c^2] Var[k_c],  E over the group's heads and queries, Var over the valid keys

Two deterministic stages: moments of a chunk of rows, then their sum, in which means and centred
squares combine by Chan's formula; the second also ranks the channels, so nothing is sorted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nsa_compile.kernels.triton_site import dense_rows, mask_pointer, mask_strides

STATISTIC_ROWS = 512  # rows of q or k behind one partial moment


@triton.jit
def _moments(
    x, valid, mean, spread, weight, heads, length, x_batch, x_head, x_row, valid_batch, valid_row,
    chunks, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, M: tl.constexpr,
    CENTRED: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Per chunk of rows: the sum of squares, or count, mean and centred sum of squares (Chan)."""
    pid = tl.program_id(0).to(tl.int64)
    pair = pid // chunks
    start = pid % chunks * ROWS
    column = tl.arange(0, DP)
    base = x + pair // heads * x_batch + pair % heads * x_head
    centre = tl.zeros([DP], tl.float32)
    total = tl.zeros([DP], tl.float32)
    count = tl.zeros([1], tl.float32)
    for step in range(0, ROWS // M):
        row = start + step * M + tl.arange(0, M)
        inside = row < length
        if PADDED:
            there = valid + pair // heads * valid_batch + row * valid_row
            inside = inside & (tl.load(there, mask=inside, other=0) != 0)
        mask = inside[:, None] & (column < D)[None, :]
        tile = tl.load(base + row[:, None] * x_row + column[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
        if CENTRED:
            here = tl.sum(inside.to(tl.float32), 0)
            average = tl.sum(tile, 0) / tl.maximum(here, 1.0)
            rest = tl.where(mask, tile - average[None, :], 0.0)
            both = count + here
            shift = average - centre
            total += tl.sum(rest * rest, 0) + shift * shift * (count * here / tl.maximum(both, 1.0))
            centre += shift * (here / tl.maximum(both, 1.0))
            count = both
        else:
            total += tl.sum(tile * tile, 0)
    tl.store(spread + pid * D + column, total, mask=column < D)
    if CENTRED:
        tl.store(mean + pid * D + column, centre, mask=column < D)
        tl.store(weight + pid + tl.arange(0, 1), count)


@triton.jit
def _combined(
    mean, spread, weight, pair, column, chunks, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr
):  # fmt: skip
    """Mean and variance of each channel over the chunks of one pair."""
    used = (column < D)[None, :]
    centre = tl.zeros([DP], tl.float32)
    count = tl.zeros([1], tl.float32)
    for step in range(0, (chunks + M - 1) // M):
        row = step * M + tl.arange(0, M)
        share = tl.load(weight + pair * chunks + row, mask=row < chunks, other=0.0)
        pointers = mean + (pair * chunks + row)[:, None] * D + column[None, :]
        centres = tl.load(pointers, mask=(row < chunks)[:, None] & used, other=0.0)
        centre += tl.sum(centres * share[:, None], 0)
        count += tl.sum(share, 0)
    centre = centre / tl.maximum(count, 1.0)
    total = tl.zeros([DP], tl.float32)
    for step in range(0, (chunks + M - 1) // M):
        row = step * M + tl.arange(0, M)
        share = tl.load(weight + pair * chunks + row, mask=row < chunks, other=0.0)
        inside = (row < chunks)[:, None] & used
        place = (pair * chunks + row)[:, None] * D + column[None, :]
        shift = tl.load(mean + place, mask=inside, other=0.0) - centre[None, :]
        total += tl.sum(
            tl.load(spread + place, mask=inside, other=0.0) + shift * shift * share[:, None], 0
        )
    return centre, total / tl.maximum(count, 1.0)


@triton.jit
def _key_moments(
    mean, spread, weight, means, deviations, chunks, D: tl.constexpr, DP: tl.constexpr,
    M: tl.constexpr,
):  # fmt: skip
    """Of one pair; a channel that is not finite somewhere gets neither mean nor deviation."""
    pair = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, DP)
    centre, variance = _combined(mean, spread, weight, pair, column, chunks, D, DP, M)
    finite = variance < float("inf")
    tl.store(means + pair * D + column, tl.where(finite, centre, 0.0), mask=column < D)
    tl.store(
        deviations + pair * D + column, tl.where(finite, tl.sqrt(variance), 0.0), mask=column < D
    )


@triton.jit
def _strongest(
    energy, mean, spread, weight, strength, chosen, q_chunks, k_chunks, r,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """The r channels with the largest energy times variance, ascending; ties to the lower index."""
    pair = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, DP)
    used = (column < D)[None, :]
    power = tl.zeros([DP], tl.float32)
    for step in range(0, (q_chunks * G + M - 1) // M):
        row = step * M + tl.arange(0, M)
        pointers = energy + (pair * G * q_chunks + row)[:, None] * D + column[None, :]
        power += tl.sum(tl.load(pointers, mask=(row < q_chunks * G)[:, None] & used, other=0.0), 0)
    _, variance = _combined(mean, spread, weight, pair, column, k_chunks, D, DP, M)
    own = power * variance
    tl.store(strength + pair * D + column, own, mask=column < D)
    tl.debug_barrier()
    rank = tl.zeros([DP], tl.int32)
    for step in range(0, (D + M - 1) // M):
        rival = step * M + tl.arange(0, M)
        other = tl.load(strength + pair * D + rival, mask=rival < D, other=-1.0)[:, None]
        ahead = (other > own[None, :]) | (
            (other == own[None, :]) & (rival[:, None] < column[None, :])
        )
        rank += tl.sum((ahead & (rival < D)[:, None]).to(tl.int32), 0)
    keep = (rank < r) & (column < D)
    place = tl.cumsum(keep.to(tl.int32), 0) - 1
    tl.store(chosen + pair * r + place, column, mask=keep & (place < r))


def channels(
    q: torch.Tensor, k: torch.Tensor, valid: torch.Tensor | None, num_channels: int
) -> torch.Tensor:
    """int32 [B, Hkv, r], ascending: the channels with the largest E[q_c^2] Var[k_c]."""
    q, k = dense_rows(q), dense_rows(k)
    batch, kv_heads, _, dim = k.shape
    chosen = torch.empty(batch, kv_heads, num_channels, dtype=torch.int32, device=q.device)
    if chosen.numel() == 0:
        return chosen
    energy, _, _, q_chunks = _partial_moments(q, None, centred=False)
    spread, mean, weight, k_chunks = _partial_moments(k, valid, centred=True)
    strength = torch.empty(batch * kv_heads, dim, dtype=torch.float32, device=q.device)
    _strongest[(batch * kv_heads,)](
        energy, mean, spread, weight, strength, chosen, q_chunks, k_chunks, num_channels,
        G=q.shape[1] // kv_heads, D=dim, DP=triton.next_power_of_2(dim), M=32, num_warps=8,
    )  # fmt: skip
    return chosen


def key_moments(k: torch.Tensor, valid: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [B, Hkv, D] each: mean and standard deviation over the valid keys."""
    k = dense_rows(k)
    batch, kv_heads, _, dim = k.shape
    means = torch.empty(batch, kv_heads, dim, dtype=torch.float32, device=k.device)
    deviations = torch.empty_like(means)
    spread, mean, weight, chunks = _partial_moments(k, valid, centred=True)
    _key_moments[(batch * kv_heads,)](
        mean, spread, weight, means, deviations, chunks, D=dim, DP=triton.next_power_of_2(dim),
        M=32, num_warps=8,
    )  # fmt: skip
    return means, deviations


def _partial_moments(
    x: torch.Tensor, valid: torch.Tensor | None, centred: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Sums of squares [B, H, chunks, D], means likewise, counts [B, H, chunks], and the chunks."""
    batch, heads, length, dim = x.shape
    chunks = triton.cdiv(length, STATISTIC_ROWS)
    spread = x.new_empty(batch, heads, chunks, dim, dtype=torch.float32)
    mean = torch.empty_like(spread) if centred else spread
    weight = x.new_empty(batch, heads, chunks, dtype=torch.float32) if centred else spread
    if spread.numel():
        _moments[(batch * heads * chunks,)](
            x, mask_pointer(valid, x), mean, spread, weight, heads, length, *x.stride()[:3],
            *mask_strides(valid), chunks, D=dim, DP=triton.next_power_of_2(dim),
            ROWS=STATISTIC_ROWS, M=64, CENTRED=centred, PADDED=valid is not None, num_warps=4,
        )  # fmt: skip
    return spread, mean, weight, chunks
