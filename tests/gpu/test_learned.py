"""What is learned, on the GPU: every compression, prepared models and selectors equal the CPU's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nsa_compile
from nsa_compile import functional
from nsa_compile.nn import NSAParameters
from nsa_compile.passes import merges
from nsa_compile.passes.config import NSAConfig
from nsa_compile.passes.config_checks import COMPRESSIONS, SELECTORS
from nsa_compile.passes.selectors import choose

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# 16 blocks of 64 hold every key of 700, so that rounding cannot choose other ones.
SIZES: dict[str, Any] = {"merge": "gate", "num_selected": 16, "window": 100, "dense_len": 0}
WIDTH, LENGTH = 64, 700
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}


@pytest.fixture(autouse=True)
def _exact() -> None:
    torch._dynamo.reset()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)


def relative(found: Tensor, exact: Tensor) -> float:
    """Root mean square of the error over that of ``exact``."""
    difference = found.double().cpu() - exact
    return float(difference.detach().norm() / exact.detach().norm())


def gated(own: NSAParameters, given: list[Tensor], valid: Tensor | None, causal: bool) -> Tensor:
    hidden, q, k, v = given
    learned = own(hidden, k, v, valid)
    return merges.gated(q, k, v, learned, own.config, valid, None, 32**-0.5, causal, 0)


def results(own: NSAParameters, given: list[Tensor], weights: Tensor, **how: Any) -> list[Tensor]:
    """Output, then the gradients of inputs and parameters."""
    out = gated(own, given, **how)
    wanted = [*given, *own.parameters()]
    loss = (out * weights.to(out)).sum()
    return [out, *torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)]


def compare(dtype: torch.dtype, q_heads: int, how: dict[str, Any], **options: Any) -> None:
    sizes = {"width": WIDTH, "q_heads": q_heads, "kv_heads": 2, "head_dim": 32}
    own = NSAParameters({**SIZES, **options}, **sizes)
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    shapes = [(2, LENGTH, WIDTH), *((2, heads, LENGTH, 32) for heads in (q_heads, 2, 2))]
    here = [torch.randn(shape).to(dtype).cuda().requires_grad_() for shape in shapes]
    there = [x.detach().double().cpu().requires_grad_() for x in here]
    weights = torch.randn(2, q_heads, LENGTH, 32)
    valid = how["valid"]
    own = own.to(dtype)
    exact = results(copy.deepcopy(own).double(), there, weights.double(), **how)
    on_gpu = {**how, "valid": None if valid is None else valid.cuda()}
    found = results(own.cuda(), here, weights.cuda(), **on_gpu)
    for number, (mine, true) in enumerate(zip(found, exact, strict=True)):
        if true.abs().max() < 1e-9:  # What is added to all keys alike changes no softmax.
            continue
        assert relative(mine, true) < LIMITS[dtype] * (1 if number == 0 else 2), number


PADDING = torch.arange(LENGTH).expand(2, -1) >= torch.tensor([[0], [150]])
PLAIN = {"valid": None, "causal": True}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", COMPRESSIONS)
def test_compressions(kind: str, padded: bool) -> None:
    how = {"valid": PADDING if padded else None, "causal": True}
    compare(torch.float32, 4, how, compression=kind, num_mem_kv=2 * padded, compress_expand=1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [1, 2, 4, 7, 16])
def test_half_precision(dtype: torch.dtype, group: int) -> None:
    compare(dtype, 2 * group, PLAIN, compression="weighted")


@pytest.mark.parametrize(
    "options",
    [{"num_mem_kv": 3, "causal": False}, {"num_selected": 0}, {"query_tile": 16}, {"window": 1}],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:num_selected=0")
def test_switches(options: dict[str, Any]) -> None:
    options = dict(options)
    how = {"valid": None, "causal": options.pop("causal", True)}
    compare(torch.float32, 4, how, **options)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split([WIDTH, WIDTH // 2, WIDTH // 2], -1)
        q, k, v = (y.unflatten(2, (-1, 16)).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2))


class GPT(nn.Module):
    """Token ids [B, T] -> logits [B, T, 32]."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(32, WIDTH), nn.Linear(WIDTH, 32)
        self.layers = nn.ModuleList(Attention() for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


@pytest.mark.parametrize("kind", ["mean", "mlp"])
def test_a_prepared_model_compiled_with_inductor(kind: str) -> None:
    model = nsa_compile.prepare(GPT(), {**SIZES, "compression": kind, "compress_expand": 1.0})
    exact = torch.compile(copy.deepcopy(model), backend="nsa", options={"inner": "aot_eager"})
    fast = torch.compile(copy.deepcopy(model).cuda(), backend="nsa")
    ids = torch.randint(0, 32, (2, LENGTH))
    outs = [fast(ids.cuda()), exact(ids)]
    for out in outs:
        out.square().mean().backward()
    assert relative(*outs) < 1e-4
    for compiled in (fast, exact):
        assert {row.decision for row in nsa_compile.report(compiled).sites} == {"converted"}
    for (name, mine), true in zip(fast.named_parameters(), exact.parameters(), strict=True):
        if true.grad is not None and true.grad.abs().max() > 1e-7:
            assert relative(mine.grad, true.grad) < 1e-3, name


def test_a_prepared_model_trains_in_bfloat16() -> None:
    model = nsa_compile.prepare(GPT().cuda(), {**SIZES, "num_selected": 6, "compression": "mlp"})
    fast = torch.compile(model, backend="nsa")
    optimizer = torch.optim.AdamW(fast.parameters(), lr=3e-3)
    ids = torch.randint(0, 32, (2, LENGTH // 4), device="cuda").repeat(1, 4)
    losses = []
    for _ in range(20):
        with torch.autocast("cuda", torch.bfloat16):
            logits = fast(ids)
        loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("selector", [name for name in SELECTORS if name != "nsa"])
def test_selectors_choose_what_they_choose_on_the_cpu(selector: str, causal: bool) -> None:
    config = NSAConfig(selector=selector, num_selected=4, query_tile=16, dense_len=0)
    q, k = torch.randn(2, 4, LENGTH, 32), torch.randn(2, 2, LENGTH, 32)
    here = choose(q, k, None, config, 32**-0.5, causal, 0)
    there = choose(q.cuda(), k.cuda(), None, config, 32**-0.5, causal, 0).cpu()
    # Sums in another order may change places of equals.
    assert (here == there).double().mean() > (0.98 if selector == "topk" else 1 - 1e-12)


def test_blocks_of_a_mask() -> None:
    mask = torch.rand(2, 1, 300, 500) < 0.01
    here = functional.blocks_from_mask(mask, 64)
    assert torch.equal(functional.blocks_from_mask(mask.cuda(), 64).cpu(), here)
