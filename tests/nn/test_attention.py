"""NativeSparseAttention against the branches written out, at odd lengths and for every switch."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nsa_compile
from nsa_compile import NativeSparseAttention, NSAConfigError
from tests.nn import learned_reference

SIZES: dict[str, Any] = {
    "sliding_window_size": 5, "compress_block_size": 8, "compress_block_sliding_stride": 4,
    "selection_block_size": 8, "num_selected_blocks": 2,
}  # fmt: skip
LENGTHS = (1, 4, 31, 32, 120)


def made(**options: Any) -> NativeSparseAttention:
    """A layer in float64, 4 heads of 6 on width 24, that is not at its beginning."""
    torch.manual_seed(0)
    layer = NativeSparseAttention(24, 6, 4, **{**SIZES, **options}).double()
    with torch.no_grad():
        for parameter in layer.nsa.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return layer


def tokens(length: int, batch: int = 2) -> Tensor:
    torch.manual_seed(length)
    return torch.randn(batch, length, 24, dtype=torch.float64)


def rotated(x: Tensor) -> Tensor:
    """[B, H, T, D] by complex numbers: channel i and i + D/2 are one."""
    half = x.shape[-1] // 2
    speed = torch.tensor([10000 ** -(i / half) for i in range(half)], dtype=torch.float64)
    angle = torch.arange(x.shape[2])[:, None] * speed
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * angle)
    return torch.cat((turned.real, turned.imag), -1)


def exact(layer: NativeSparseAttention, x: Tensor, valid: Tensor | None = None) -> Tensor:
    if isinstance(layer.norm, nn.RMSNorm):
        eps = torch.finfo(x.dtype).eps
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * layer.norm.weight
    batch, length, _ = x.shape
    kv = layer.kv_heads
    q, k, v = (
        part.view(batch, length, -1, 6).transpose(1, 2)
        for part in (x @ layer.to_qkv.weight.T).split([24, 6 * kv, 6 * kv], -1)
    )
    if layer.rotary_base is not None:
        q, k = rotated(q), rotated(k)
    out = learned_reference.attention(layer.nsa, x, q, k, v, causal=layer.causal, valid=valid)
    return out.transpose(1, 2).reshape(batch, length, 24) @ layer.to_out.weight.T


def compare(layer: NativeSparseAttention, x: Tensor, valid: Tensor | None = None) -> None:
    out, wanted = layer(x, valid=valid), exact(layer, x, valid)
    assert out.shape == x.shape
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-6)
    grads, true = (
        torch.autograd.grad(y.square().sum(), list(layer.parameters()), materialize_grads=True)
        for y in (out, wanted)
    )
    for (name, _), grad, other in zip(layer.named_parameters(), grads, true, strict=True):
        torch.testing.assert_close(
            grad, other, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"d {name}: {text}"
        )


@pytest.mark.filterwarnings("ignore:num_selected=0")
@pytest.mark.parametrize("selected", [0, 2])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_odd_lengths(length: int, causal: bool, selected: int) -> None:
    compare(made(causal=causal, num_selected_blocks=selected), tokens(length))


@pytest.mark.parametrize(
    "options",
    [
        {"kv_heads": 2},
        {"kv_heads": 1, "causal": True, "compress_block_sliding_stride": None},
        {"compress_block_size": 5, "compress_block_sliding_stride": 2, "causal": True},
        {"norm": False, "rotary": False},
        {"num_compressed_mem_kv": 0, "compress_mlp_expand_factor": 0.5},
        {"num_compressed_mem_kv": 3, "compress_mlp": "attention", "causal": True},
        {"compress_mlp": "mean", "selection_block_size": 16, "num_selected_blocks": 1},
        {"use_diff_topk": True, "kv_heads": 2, "causal": True},
        {"use_diff_topk": True, "query_heads_share_selected_kv": False, "kv_heads": 1},
        {"use_diff_topk": True, "selection_block_size": 4, "interpolated_importance_score": True},
    ],
    ids=str,
)
def test_switches(options: dict[str, Any]) -> None:
    compare(made(**options), tokens(47))


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("interpolated", [False, True])
@pytest.mark.parametrize("block", [8, 4, 2])
def test_small_blocks(block: int, interpolated: bool, share: bool) -> None:
    layer = made(
        kv_heads=2, causal=True, selection_block_size=block, query_heads_share_selected_kv=share,
        interpolated_importance_score=interpolated,
    )  # fmt: skip
    for length in LENGTHS[:-1]:
        compare(layer, tokens(length))


def test_padding() -> None:
    layer, x = made(causal=True, kv_heads=2), tokens(33)
    valid = torch.arange(33).expand(2, -1) >= torch.tensor([[0], [11]])
    compare(layer, x, valid)


class Middle(nn.Module):
    def forward(self, blocks: Tensor) -> Tensor:
        return blocks[..., 4, :]


def test_modules_compress_and_gate() -> None:
    gate = nn.Sequential(nn.Linear(24, 5), nn.SiLU(), nn.Linear(5, 12)).double()
    layer = made(compress_mlp=Middle(), strategy_combine_mlp=gate)
    x = tokens(32)
    assert layer(x).shape == x.shape
    assert "nsa.gate.0.weight" in layer.state_dict()
    layer(x).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kv_heads": 2, "num_selected_blocks": 1, "use_diff_topk": True},
        {"kv_heads": 1, "selection_block_size": 2, "query_heads_share_selected_kv": False},
    ],
    ids=str,
)
def test_decoding_with_a_cache_is_the_same(options: dict[str, Any]) -> None:
    layer, x = made(causal=True, **options), tokens(37)
    out, cache, at = [], None, 0
    for count in (9, *[1] * 20, 8):
        y, cache = layer(x[:, at : at + count], cache=cache, return_cache=True)
        out.append(y)
        at += count
    torch.testing.assert_close(torch.cat(out, 1), layer(x))


def test_packed_sequences_do_not_mix() -> None:
    layer, x = made(causal=True, num_selected_blocks=5), tokens(40)  # all blocks are read
    whole = layer(x, cu_seqlens=torch.tensor([0, 24, 40]))
    torch.testing.assert_close(whole[:, :24], layer(x[:, :24]))
    torch.testing.assert_close(whole[:, 24:], layer(x[:, 24:]))


@pytest.mark.parametrize("backend", ["aot_eager", "nsa"])
def test_compiled(backend: str) -> None:
    torch._dynamo.reset()
    layer = made(causal=True, kv_heads=2)
    options = {"options": {"inner": "aot_eager"}} if backend == "nsa" else {}
    fast = torch.compile(layer, backend=backend, dynamic=True, **options)
    for length in (40, 31, 4):
        torch.testing.assert_close(fast(tokens(length)), layer(tokens(length)))


def test_it_trains_in_half_precision() -> None:
    torch._dynamo.reset()
    layer = made(causal=True).float()
    fast = torch.compile(layer, backend="aot_eager")
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    x, losses = tokens(40).float(), []
    for _ in range(5):
        with torch.autocast("cpu", torch.bfloat16):
            out = fast(x)
        assert out.dtype == torch.bfloat16
        loss = (out.float() - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_a_model_that_has_it_beside_its_own_attention_is_prepared() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = NativeSparseAttention(16, 8, 2, causal=True, **SIZES)
            self.second = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return x + self.second(x, x, x, need_weights=False)[0]

    model, x = Model(), torch.randn(2, 40, 16)
    keys = list(model.state_dict())
    nsa_compile.prepare(model, {"merge": "gate", "window": 8}, example_inputs=x)
    added = [key for key in model.state_dict() if key not in keys]
    assert added == ["second.nsa.gate.weight", "second.nsa.gate.bias"]
    with pytest.raises(ValueError, match=r"call nsa_compile.unprepare\(model\) first"):
        nsa_compile.prepare(model, example_inputs=x)
    fast = torch.compile(model, backend="nsa", options={"inner": "eager"})
    assert fast(x).shape == x.shape
    (row,) = nsa_compile.report(fast).sites
    assert (row.module, row.decision) == ("second", "converted")
    nsa_compile.unprepare(model)
    assert list(model.state_dict()) == keys


def test_copies_and_dtypes() -> None:
    layer, x = made(), tokens(20)
    twin = copy.deepcopy(layer)
    torch.testing.assert_close(twin(x), layer(x))
    assert twin.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"compress_block_sliding_stride": 9},
         "compress_block_size=8 and compress_block_sliding_stride=9"),
        ({"compress_mlp": "mean", "compress_mlp_expand_factor": 2.0},
         "compress_mlp_expand_factor=2.0 .* got compress_mlp='mean'"),
        ({"kv_heads": 3}, "heads=4 and kv_heads=3"),
        ({"dim_head": 7}, "rotary=True .* dim_head=7"),
        ({"num_selected_blocks": -1}, "num_selected_blocks must be at least 0, got -1"),
        ({"num_selected_blocks": True}, "num_selected_blocks must be an integer, got True"),
        ({"dim": 0}, "dim must be a positive integer, got 0"),
        ({"sliding_window_size": 0}, "sliding_window_size must be at least 1"),
    ],
    ids=str,
)  # fmt: skip
def test_options_that_do_not_go_together_are_named(options: dict[str, Any], text: str) -> None:
    with pytest.raises(NSAConfigError, match=text):
        NativeSparseAttention(**{"dim": 24, "dim_head": 6, "heads": 4, **SIZES, **options})


def test_calls_that_do_not_go_together_are_refused() -> None:
    layer, x = made(), tokens(8)
    with pytest.raises(ValueError, match="return_cache=True needs causal=True"):
        layer(x, return_cache=True)
    valid = torch.ones(2, 8, dtype=torch.bool)
    with pytest.raises(ValueError, match="return_cache=True and valid do not go together"):
        made(causal=True)(x, valid=valid, return_cache=True)
    with pytest.raises(ValueError, match=r"x must be \[B, T, C\] with C=24, got \[8, 24\]"):
        layer(x[0])
    with pytest.raises(ValueError, match="valid must be bool"):
        layer(x, valid=valid[:, :5])


def test_gradcheck() -> None:
    layer = made(causal=True, kv_heads=2, compress_mlp="attention")
    x = tokens(13, batch=1).requires_grad_()
    assert math.isfinite(layer(x).sum().item())
    assert torch.autograd.gradcheck(layer, (x,), nondet_tol=1e-9, fast_mode=True)
