"""nsa_compile.functional: results, defaults and what it says about wrong inputs."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from nsa_compile import functional
from nsa_compile.passes.config import NSAConfig

B, HQ, HKV, T, D, DV = 2, 4, 2, 200, 16, 24
SMALL = {"block": 16, "query_tile": 16, "num_selected": 5, "local_window": 20}


def tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(B, HQ, T, D), torch.randn(B, HKV, T, D), torch.randn(B, HKV, T, DV)


@pytest.mark.parametrize(
    "config",
    [
        None,
        {"dense_len": 0},
        {"dense_len": 0, "scorer": "mean"},
        NSAConfig(dense_len=0, query_tile=1),
        {"dense_len": 0, "query_tile": 128},
    ],
)
def test_budget_beyond_the_sequence_is_sdpa(config: Any) -> None:
    q, k, v = tensors()
    out = functional.nsa_attention(q, k, v, config=config)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, expected)


def test_whole_path_is_its_parts() -> None:
    q, k, v = tensors()
    valid = torch.rand(B, T) < 0.8
    sizes = {"select_block": 16, "query_tile": 16, "num_selected": 5, "window": 20, "candidates": 5}
    whole = functional.nsa_attention(
        q, k, v, config={"dense_len": 0, **sizes}, valid=valid, window=90, scale=0.2
    )
    blocks = functional.select_blocks(q, k, valid=valid, window=90, scale=0.2, **SMALL)
    assert blocks.dtype == torch.int32
    assert blocks.shape == (B, HKV, 13, 5)
    parts, lse = functional.selected_attention(
        q, k, v, blocks, block=16, query_tile=16, valid=valid, window=90, scale=0.2, return_lse=True
    )
    assert lse.shape == (B, HQ, T)
    torch.testing.assert_close(whole, parts)


@pytest.mark.parametrize("dense_len", [0, 8192])
def test_terms_and_modifiers_reach_attention(dense_len: int) -> None:
    q, k, v = tensors()
    segments = (torch.arange(T, dtype=torch.int32) // 70)[None]
    positions = torch.arange(T)[None] * 2.0
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    ranges = torch.stack((torch.arange(T) - 40, torch.arange(T) + 1), dim=1)[None].int()
    out = functional.nsa_attention(
        q, k, v, config={"dense_len": dense_len}, ranges=ranges, query_segments=segments,
        key_segments=segments, slopes=slopes, positions=positions, softcap=2.0, scale=0.2,
    )  # fmt: skip
    logits = 2 * torch.tanh(0.2 * q @ k.repeat_interleave(2, 1).transpose(-1, -2) / 2)
    logits = logits + slopes[:, None, None] * (positions[:, None] - positions[..., None])
    apart = torch.arange(T)[:, None] - torch.arange(T)
    hidden = (apart < 0) | (apart > 40) | (segments[0][:, None] != segments[0])
    expected = logits.masked_fill(hidden, -torch.inf).softmax(-1) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(out, expected)


def test_gradients_reach_q_k_v() -> None:
    inputs = [x.requires_grad_() for x in tensors()]
    sizes = {"dense_len": 0, "select_block": 16, "query_tile": 16, "num_selected": 5, "window": 20}
    functional.nsa_attention(*inputs, config=sizes).sum().backward()
    assert all(x.grad is not None and x.grad.any() for x in inputs)


def test_compressed_keys_may_be_given() -> None:
    q, k, _ = tensors()
    k_cmp = functional.compress(k, block=32, stride=16)
    assert k_cmp.shape == (B, HKV, (T - 32) // 16 + 1, D)
    mine = functional.select_blocks(q, k, scorer="mean", k_cmp=k_cmp, **SMALL)
    assert torch.equal(mine, functional.select_blocks(q, k, scorer="mean", **SMALL))


@pytest.mark.parametrize("scorer", ["channels", "mean"])
def test_ranges_keep_a_tile_to_its_chunk(scorer: str) -> None:
    """Chunks of 64 keys: a tile of 16 queries chooses among the four blocks of its own chunk."""
    q, k, _ = tensors()
    low = torch.arange(T, dtype=torch.int32) // 64 * 64
    ranges = torch.stack((low, low + 64), dim=-1)[None]
    blocks = functional.select_blocks(q, k, ranges=ranges, scorer=scorer, **SMALL)
    chunk = torch.arange(blocks.shape[2]) // 4
    assert ((blocks // 4 == chunk[:, None]) | (blocks < 0)).all()
    assert torch.equal((blocks >= 0).sum(-1)[0, 0], torch.arange(blocks.shape[2]) % 4 + 1)


def test_steep_slopes_choose_the_nearest_blocks() -> None:
    q, k, _ = tensors()
    steep = torch.full((HQ,), 1.0)
    blocks = functional.select_blocks(q, k, slopes=steep, init_blocks=0, **SMALL)
    tile = torch.arange(blocks.shape[2])
    nearest = (tile[:, None] - torch.arange(4, -1, -1)).to(torch.int32)
    assert torch.equal(blocks[:, :, 4:], nearest[4:].expand_as(blocks[:, :, 4:]))


def test_the_order_of_64_bit_indices_does_not_matter() -> None:
    q, k, v = tensors()
    blocks = functional.select_blocks(q, k, **SMALL)
    expected = functional.selected_attention(q, k, v, blocks, block=16, query_tile=16)
    flipped = blocks.flip(-1).long()
    got = functional.selected_attention(q, k, v, flipped, block=16, query_tile=16)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("sizes", [(0, 40, 40), (2, 0, 40), (2, 40, 0), (2, 0, 0)], ids=str)
def test_nothing_to_attend_to_or_from(sizes: tuple[int, int, int]) -> None:
    batch, q_len, kv_len = sizes
    q, k, v = (
        torch.randn(batch, heads, length, D, requires_grad=True)
        for heads, length in ((HQ, q_len), (HKV, kv_len), (HKV, kv_len))
    )
    small = {"select_block": 16, "num_selected": 3, "window": 8, "query_tile": 1}
    gated = {"merge": "gate", "compress_block": 8, "compress_stride": 4, **small}
    blocks = functional.select_blocks(q, k, **SMALL)
    assert blocks.shape == (batch, HKV, -(-q_len // 16), 5)
    outs = [
        functional.selected_attention(q, k, v, blocks, block=16, query_tile=16),
        functional.sliding_window_attention(q, k, v, window=9),
        functional.nsa_attention(q, k, v, config={"dense_len": 0, **small}),
        functional.nsa_attention(q, k, v, gates=torch.sigmoid(q[..., :3]), config=gated),
    ]
    for out in outs:
        assert out.shape == q.shape
        assert not out.any()
        out.sum().backward()
    assert all(x.grad is not None and not x.grad.any() for x in (q, k, v))


@pytest.mark.parametrize("config", [None, NSAConfig(dense_len=0)])
def test_the_whole_path_compiles_whole(config: Any) -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return functional.nsa_attention(q, k, v, config=config)

    whole = torch.compile(attend, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(whole(*tensors()), attend(*tensors()))


q, k, v = tensors()
blocks = torch.zeros(B, HKV, 13, 5, dtype=torch.int32)
WRONG = {
    "k must be [B, Hkv, Tk, D], got [2, 4, 64]": lambda: functional.select_blocks(
        q, torch.zeros(2, 4, 64)
    ),
    "q must be [B, Hq, Tq, D], got [4, 200, 16]": lambda: functional.select_blocks(q[0], k),
    "v must be [B, Hkv, Tk, Dv] with [2, 2, 200] of k, got [2, 4, 200, 24]": lambda: (
        functional.nsa_attention(q, k, v.repeat(1, 2, 1, 1))
    ),
    "k must be [B, Hkv, Tk, D] with B=2 and D=16 of q, got [2, 2, 200, 8]": lambda: (
        functional.select_blocks(q, k[..., :8])
    ),
    "Hq must be a multiple of Hkv, got Hq=3 and Hkv=2": lambda: functional.select_blocks(
        q[:, :3], k
    ),
    "got k in torch.float16 and q in torch.float32": lambda: functional.select_blocks(q, k.half()),
    "valid must be bool [B, Tk] = [2, 200], got torch.float32 [2, 200]": lambda: (
        functional.select_blocks(q, k, valid=torch.ones(2, 200))
    ),
    "valid must be bool [B, T] = [2, 200], got torch.bool [2, 100]": lambda: functional.compress(
        k, block=8, stride=4, valid=torch.ones(2, 100, dtype=torch.bool)
    ),
    "x must be [B, H, T, D], got [2, 200, 16]": lambda: functional.compress(
        k[0], block=8, stride=4
    ),
    "scorer must be 'channels' or 'mean', got 'max'": lambda: functional.select_blocks(
        q, k, scorer="max"
    ),
    "k_cmp must be [B, Hkv, Nc, D] = [2, 2, 11, 16] in torch.float32": lambda: (
        functional.select_blocks(q, k, scorer="mean", k_cmp=k)
    ),
    "ranges must be int32 [B or 1, Tq, 2] = [2, 200, 2], got torch.int64 [2, 200, 2]": lambda: (
        functional.select_blocks(q, k, ranges=torch.zeros(2, 200, 2, dtype=torch.int64))
    ),
    "query_segments and key_segments go together": lambda: functional.select_blocks(
        q, k, query_segments=torch.zeros(2, 200, dtype=torch.int32)
    ),
    "positions are those of ALiBi and need slopes": lambda: functional.select_blocks(
        q, k, positions=torch.zeros(1, 200)
    ),
    "slopes must be float32 [Hq] = [4], got torch.float32 [2]": lambda: functional.select_blocks(
        q, k, slopes=torch.zeros(2)
    ),
    "softcap must be 0 (none) or more, got -1.0": lambda: functional.select_blocks(
        q, k, softcap=-1.0
    ),
    "query_tile must be a positive integer, got 0": lambda: functional.select_blocks(
        q, k, query_tile=0
    ),
    "window must be a positive integer, got 0": lambda: functional.nsa_attention(q, k, v, window=0),
    "num_selected=2 cannot hold the 4 blocks of 64": lambda: functional.select_blocks(
        q, k, num_selected=2
    ),
    "[2, 2, 7, n], or with Hq=4 for Hkv, got [2, 2, 13, 5]": lambda: functional.selected_attention(
        q, k, v, blocks, block=16, query_tile=32
    ),
    "block_indices must be int32 or int64, got torch.float32": lambda: (
        functional.selected_attention(q, k, v, blocks.float(), block=16, query_tile=16)
    ),
    "window must be a positive integer, got -1": lambda: functional.sliding_window_attention(
        q, k, v, window=-1
    ),
    "merge='gate' needs gates [B, Hq, Tq, 3] = [2, 4, 200, 3]": lambda: functional.nsa_attention(
        q, k, v, config={"merge": "gate"}
    ),
    "gates must be floating [B, Hq, Tq, 3] = [2, 4, 200, 3], got torch.float32 [2, 4, 200]": (
        lambda: functional.nsa_attention(q, k, v, gates=q[..., 0], config={"merge": "gate"})
    ),
    "gates belong to merge='gate', got gates with merge='softmax'": lambda: (
        functional.nsa_attention(q, k, v, gates=q[..., :3])
    ),
    "merge='gate' does not take slopes: compressed keys have no position": lambda: (
        functional.nsa_attention(
            q, k, v, gates=q[..., :3], config={"merge": "gate"}, slopes=torch.ones(HQ)
        )
    ),
    "unknown option 'windw'; did you mean 'window'?": lambda: functional.nsa_attention(
        q, k, v, config={"windw": 3}
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_inputs_are_named(message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        WRONG[message]()
