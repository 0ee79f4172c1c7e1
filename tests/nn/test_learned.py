"""Gates, compressions and memory against references in float64, forward and backward."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nsa_compile.nn import NSAParameters
from nsa_compile.passes import merges
from nsa_compile.passes.config import COMPRESSIONS
from tests.nn import learned_reference

SIZES: dict[str, Any] = {
    "merge": "gate", "compress_block": 8, "compress_stride": 4, "select_block": 8,
    "num_selected": 4, "window": 10, "query_tile": 1,
}  # fmt: skip


def made(q_heads: int = 4, kv_heads: int = 2, **options: Any) -> NSAParameters:
    """Parameters in float64 that are not at their beginning."""
    torch.manual_seed(0)
    sizes = {"width": 12, "q_heads": q_heads, "kv_heads": kv_heads, "head_dim": 8}
    own = NSAParameters({**SIZES, **options}, **sizes).double()
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return own


def inputs(own: NSAParameters, length: int, batch: int = 2) -> list[Tensor]:
    torch.manual_seed(length)
    shapes = [(batch, length, 12)] + [
        (batch, heads, length, 8) for heads in (own.q_heads, own.kv_heads, own.kv_heads)
    ]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def run(own: NSAParameters, given: list[Tensor], causal: bool, valid: Tensor | None) -> Tensor:
    hidden, q, k, v = given
    learned = own(hidden, k, v, valid)
    return merges.gated(q, k, v, learned, own.config, valid, None, 8**-0.5, causal, 0)


def compare(own: NSAParameters, length: int, causal: bool = True, padded: bool = False) -> None:
    given = inputs(own, length)
    valid = None
    if padded:
        valid = torch.arange(length).expand(2, -1) >= torch.tensor([[0], [length // 3]])
    out = run(own, given, causal, valid)
    exact = learned_reference.attention(own, *given, causal=causal, valid=valid)
    grads = learned_reference.assert_equal_with_gradients(own, given, out, exact)
    if length > 8 and not padded:
        assert all(grad.abs().max() > 0 for grad in grads)


@pytest.mark.parametrize("length", [1, 4, 31, 32])
@pytest.mark.parametrize("kind", COMPRESSIONS)
def test_compressions_equal_their_references(kind: str, length: int) -> None:
    compare(made(compression=kind, num_mem_kv=length % 2 * 2), length)


@pytest.mark.parametrize("kind", COMPRESSIONS)
def test_padding_never_enters(kind: str) -> None:
    compare(made(compression=kind), 33, padded=True)


@pytest.mark.parametrize(
    "options",
    [
        {"num_mem_kv": 3, "causal": False},
        {"compression": "mlp", "compress_expand": 0.5},
        {"kv_heads": 4},
        {"q_heads": 3, "kv_heads": 1, "compression": "linear"},
        {"select_block": 16, "num_selected": 5, "query_tile": 16},
        {"compress_stride": 8, "compression": "conv"},
        {"compress_stride": 2, "compression": "attention"},
        {"compress_block": 5, "compress_stride": 2, "compression": "linear"},
        {"compress_stride": 6, "compression": "mlp", "num_mem_kv": 1},
        {"compress_block": 7, "compress_stride": 3},
    ],
    ids=str,
)
def test_switches_equal_their_references(options: dict[str, Any]) -> None:
    options = dict(options)
    compare(causal=options.pop("causal", True), own=made(**options), length=47)


def test_no_selected_branch_is_warned_about() -> None:
    with pytest.warns(UserWarning, match="num_selected=0 leaves out the selected branch"):
        own = made(num_selected=0, compression="weighted")
    compare(own, 37)


def test_a_longer_sequence() -> None:
    compare(made(compression="mlp", num_mem_kv=1, compress_expand=0.1), 120)


@pytest.mark.parametrize("kind", [kind for kind in COMPRESSIONS if kind != "mlp"])
def test_training_starts_from_the_mean_and_the_window(kind: str) -> None:
    own = NSAParameters(
        {**SIZES, "compression": kind}, width=12, q_heads=2, kv_heads=2, head_dim=8
    ).double()
    hidden, _, k, v = inputs(own, 30)
    learned = own(hidden, k, v, None)
    mean = torch.ops.nsa.compress(k, None, 8, 4)
    torch.testing.assert_close(learned.k_cmp[:, :, : mean.shape[2]], mean)
    expected = torch.sigmoid(torch.tensor([-2.0, -2.0, 2.0], dtype=torch.float64))
    torch.testing.assert_close(learned.gates, expected.expand_as(learned.gates))


class Last(nn.Module):
    """The last token of the block, scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, blocks: Tensor) -> Tensor:
        return blocks[..., -1, :] * self.factor


def test_a_module_compresses_and_a_module_gates() -> None:
    own = NSAParameters(
        {**SIZES, "compression": Last(), "gate": nn.Sequential(nn.Linear(12, 6), nn.Tanh())},
        width=12, q_heads=2, kv_heads=2, head_dim=8,
    ).double()  # fmt: skip
    hidden, _, k, v = inputs(own, 21)
    learned = own(hidden, k, v, None)
    torch.testing.assert_close(learned.v_cmp[:, :, :4], v[:, :, 7:20:4])
    logits = own.gate(hidden).view(2, 21, 2, 3).transpose(1, 2)
    torch.testing.assert_close(learned.gates, logits.sigmoid())
    assert own.names == (
        "gate.0.weight", "gate.0.bias", "compress_k.module.factor", "compress_v.module.factor",
    )  # fmt: skip


def test_a_module_of_the_wrong_shape_is_refused() -> None:
    for options, text in (
        ({"compression": nn.Identity()}, r"got \[2, 2, 7, 8, 8\]"),
        ({"gate": nn.Identity()}, r"to \[B, Tq, 6\], got \[2, 21, 12\]"),
    ):
        own = NSAParameters({**SIZES, **options}, width=12, q_heads=2, kv_heads=2, head_dim=8)
        hidden, _, k, v = inputs(own.double(), 21)
        with pytest.raises(ValueError, match=text):
            own(hidden, k, v, None)


def chosen(*args: Any, **given: Any) -> Any:
    """Some selector."""


def test_equal_modules_share_a_template_and_others_do_not() -> None:
    one = made(compression="mlp")
    assert made(compression="mlp").template == one.template == copy.deepcopy(one).template
    other = made(compression="mlp", window=11).template
    assert len({one.template, other, made(compression="conv").template}) == 3
    selectors = [made(selector=each).template for each in ("local", chosen, lambda *x, **y: x, len)]
    assert len(set(selectors)) == 4
    last, again = Last(), Last()
    assert made(compression=last).template == made(compression=last).template
    assert made(compression=last).template != made(compression=again).template


def test_gradcheck() -> None:
    own = made(compression="attention", num_mem_kv=1, num_selected=6)
    given = inputs(own, 13, batch=1)

    def out(*tensors: Tensor) -> Tensor:
        return run(own, list(tensors), True, None)

    assert torch.autograd.gradcheck(out, given, nondet_tol=1e-9, fast_mode=True)
