"""ALiBi told from the mask, in the spellings of models; near misses and other biases refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from nsa_compile.passes import dialect
from nsa_compile.passes.masks import Geometry, Prover
from nsa_compile.passes.masks.alibi import Alibi
from nsa_compile.passes.masks.prove import Proof
from nsa_compile.passes.site import Mask
from tests.passes.checking import buffers
from tests.passes.test_masks import at, run

Tensor = torch.Tensor
HEADS = 4


def slopes() -> Tensor:
    base = torch.full((), 0.25, dtype=torch.float32)
    return torch.pow(base, torch.arange(1, 1 + HEADS, dtype=torch.int32))


def two_halves() -> Tensor:
    """Slopes of a number of heads that is no power of 2."""
    base = torch.arange(1, 9).float() * 0.5
    powers = 1.0 / torch.pow(2, base).view(1, 8, 1, 1)
    return torch.concat([powers[:, 1::2], powers[:, ::2]], dim=1)[:, :HEADS]


def hidden(q: Tensor) -> Tensor:
    return at(q)[1] > at(q)[0]


def sequence(q: Tensor) -> Tensor:
    return torch.arange(q.shape[2])


def bloom(q: Tensor, p: Tensor) -> Tensor:
    torch._check(p.shape[0] == q.shape[0])
    torch._check(p.shape[1] == q.shape[2])
    position = ((p.cumsum(dim=-1) - 1) * p)[:, None, :]
    bias = (slopes()[..., None] * position).reshape(p.shape[0] * HEADS, 1, p.shape[1])
    keep = ~hidden(q)[None, None] & p.bool()[:, None, None, :]
    mask = torch.where(keep, 0.0, torch.finfo(torch.float32).min)
    return bias.view(p.shape[0], HEADS, 1, -1) + mask


Program = Callable[..., Tensor]
INF = float("-inf")
# What is added to the scores, the mask, and factor of the slopes, positions given.
ALIBI: dict[str, tuple[Program, str, float, bool]] = {
    "keys": (
        lambda q, p: (slopes()[:, None, None] * sequence(q)).masked_fill(hidden(q), INF),
        "causal", 1.0, False,
    ),
    "bloom": (bloom, "causal & padding", 1.0, True),
    "from the end": (
        lambda q, p: torch.where(
            hidden(q),
            torch.finfo(torch.float32).min,
            (torch.arange(1 - q.shape[2], 1).view(1, 1, 1, -1) * two_halves()).squeeze(0),
        ),
        "causal", 1.0, False,
    ),
    "distance": (
        lambda q, p: (-slopes().view(1, -1, 1, 1) * (at(q)[0] - at(q)[1])).masked_fill(
            hidden(q), INF),
        "causal", -1.0, False,
    ),
    "absolute distance": (
        lambda q, p: (-slopes()[:, None, None] * (at(q)[0] - at(q)[1]).abs()).masked_fill(
            hidden(q), INF),
        "causal", -1.0, False,
    ),
    "negative slopes": (
        lambda q, p: (at(q)[0] - at(q)[1]) * slopes().neg()[:, None, None] + hidden(q) * -1e9,
        "causal", -1.0, False,
    ),
    "doubled": (
        lambda q, p: (slopes()[:, None, None] * sequence(q) * 2).masked_fill(hidden(q), INF),
        "causal", 2.0, False,
    ),
    "divided": (
        lambda q, p: (slopes()[:, None, None] * sequence(q) / 8).masked_fill(hidden(q), INF),
        "causal", 0.125, False,
    ),
    "squares": (lambda q, p: slopes()[:, None, None] * (sequence(q) ** 2), "full", 1.0, True),
    "both ways": (lambda q, p: slopes()[:, None, None] * sequence(q), "full", 1.0, False),
    "window": (
        lambda q, p: (slopes()[:, None, None] * sequence(q)).masked_fill(
            hidden(q) | (at(q)[1] < at(q)[0] - 3), INF),
        "causal & window(4)", 1.0, False,
    ),
    "repeated": (
        lambda q, p: (slopes()[:, None, None] * sequence(q)).repeat(q.shape[0], 1, 1)
        .view(-1, HEADS, 1, q.shape[2]).masked_fill(hidden(q), INF),
        "causal", 1.0, False,
    ),
}  # fmt: skip
BIASES: dict[str, Program] = {
    "distance both ways": lambda q, p: -slopes()[:, None, None] * (at(q)[0] - at(q)[1]).abs(),
    "by bucket": lambda q, p: slopes()[:, None, None] * ((at(q)[0] - at(q)[1]) // 2),
    "two distances": lambda q, p: torch.where(
        at(q)[1] < 6, slopes()[:, None, None] * sequence(q), slopes()[:, None, None] * 5
    ),
    "of a table": lambda q, p: torch.arange(HEADS * 12 * 12).view(HEADS, 12, 12) * 0.5,
    "two biases": lambda q, p: (
        slopes()[:, None, None] * sequence(q) + two_halves()[0] * sequence(q)
    ),
    "half of the keys": lambda q, p: torch.where(
        at(q)[1] < 6, slopes()[:, None, None] * sequence(q), 0.0
    ),
    "small penalty": lambda q, p: slopes()[:, None, None] * sequence(q) + hidden(q) * -1e3,
    "rounded": lambda q, p: (slopes()[:, None, None].bfloat16() * sequence(q)).float(),
}


def prove(program: Program, *, dynamic: bool) -> tuple[Proof, float]:
    """The proof of SDPA under ``program``, and how far the bias that it names is from the real."""
    found: list[Proof] = []
    difference = [0.0]

    def backend(gm: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        (node,) = (n for n in gm.graph.nodes if "scaled_dot" in str(n.target))
        prover = Prover(gm, buffers(gm, inputs))
        shape = dialect.shape(node.args[0])
        assert shape is not None
        geometry = Geometry(shape[0], shape[1], shape[2], shape[2])
        proof = prover.proof(geometry, node.kwargs["attn_mask"], False, node)
        found.append(proof)

        def execute(*args: object) -> object:
            interpreter = fx.Interpreter(gm, garbage_collect_values=False)
            result = interpreter.run(*args)
            if proof.alibi is not None:
                difference[0] = compare(
                    proof.alibi, interpreter.env, interpreter.env[node.kwargs["attn_mask"]]
                )
            return result

        return execute

    def f(x: Tensor, p: Tensor) -> Tensor:
        q = x.view(x.shape[0], x.shape[1], HEADS, 8).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q, attn_mask=program(q, p))

    torch._dynamo.reset()
    x, p = torch.randn(2, 12, 32), torch.ones(2, 12, dtype=torch.long)
    p[0, :3] = 0
    if dynamic:
        for tensor in (x, p):
            torch._dynamo.mark_dynamic(tensor, 1)
    torch.compile(f, backend=backend, fullgraph=True)(x, p)
    return found[0], difference[0]


def compare(alibi: Alibi, env: dict[fx.Node, Tensor], real: Tensor) -> float:
    """How far ``alibi`` is from the bias in ``real``, up to one number a row."""
    t = real.shape[-1]
    position = torch.arange(t).float() if alibi.positions is None else env[alibi.positions].float()
    bias = alibi.factor * env[alibi.slopes].reshape(1, -1, 1, 1) * position.reshape(-1, 1, 1, t)
    real = real[None] if real.dim() == 3 else real
    shown = real > -1e4
    rest = torch.where(shown, real - bias, torch.nan)
    spread = rest - torch.nan_to_num(rest, -torch.inf).amax(-1, keepdim=True)
    return float(torch.nan_to_num(spread, 0.0).abs().max())


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", ALIBI)
def test_alibi_is_told_from_the_mask(name: str, dynamic: bool) -> None:
    program, mask, factor, positions = ALIBI[name]
    proof, difference = prove(program, dynamic=dynamic)
    assert isinstance(proof.mask, Mask), proof.mask
    assert proof.mask.describe() == mask
    assert proof.alibi is not None
    assert proof.alibi.factor == factor
    assert (proof.alibi.positions is not None) is positions
    assert difference < 1e-4


@pytest.mark.parametrize("name", BIASES)
def test_other_biases_are_refused(name: str) -> None:
    proof, _ = prove(BIASES[name], dynamic=False)
    assert not isinstance(proof.mask, Mask)
    assert proof.mask.code in ("additive_bias", "mask_not_understood")


@pytest.mark.parametrize(
    "name", ["distance both ways", "of a table", "half of the keys", "rounded"]
)
def test_a_bias_by_head_is_called_a_bias(name: str) -> None:
    proof, _ = prove(BIASES[name], dynamic=False)
    assert not isinstance(proof.mask, Mask)
    assert proof.mask.code == "additive_bias"


def test_a_bias_that_is_the_same_for_a_row_is_none() -> None:
    def program(q: Tensor, p: Tensor) -> Tensor:
        return slopes()[:, None, None] * at(q)[0] + torch.zeros(12, 12)

    proof, _ = prove(program, dynamic=False)
    assert proof == Proof(Mask(causal=False))


def test_masks_from_outside_and_from_activations_have_reasons_of_their_own() -> None:
    ready = torch.ones(2, 1, 12, 12, dtype=torch.bool)
    assert run(lambda q, m: m, ready, dynamic=False).masks == ["mask_from_outside"]
    additive = torch.zeros(2, 1, 12, 12)
    assert run(lambda q, m: m, additive, dynamic=False).masks == ["mask_from_outside"]
    columns = torch.zeros(2, 1, 1, 12)
    assert run(lambda q, m: m, columns, dynamic=False).masks == ["mask_from_outside"]
    assert run(lambda q, m: m, columns.bool(), dynamic=False).masks == ["padding"]

    def chosen(q: Tensor) -> Tensor:
        scores = (q @ q.transpose(-1, -2)).sum(1, keepdim=True)
        best = scores.topk(4, dim=-1).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)

    assert run(chosen, dynamic=False).masks == ["data_dependent_mask"]
