"""Every reason code is earned by some graph, and says which node or value earned it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import nsa_compile
from nsa_compile import backend
from nsa_compile.passes.reasons import Reason

OPTIONS = {"dense_len": 0, "window": 16, "select_block": 16, "query_tile": 16, "inner": "eager"}
T = 40
Q = torch.randn(2, 4, T, 16)


def sdpa(q: torch.Tensor, **given: Any) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, q, q, **{"is_causal": True, **given})


def scores(q: torch.Tensor) -> torch.Tensor:
    return q @ q.transpose(-1, -2) / 4


def masked(q: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, q, q, attn_mask=keep)


def windowed(q: torch.Tensor) -> torch.Tensor:
    age = torch.arange(T)[:, None] - torch.arange(T)
    return masked(q, (age >= 0) & (age < 20))


def striped(q: torch.Tensor) -> torch.Tensor:
    i = torch.arange(q.shape[2])
    return masked(q, (i[:, None] - i) % 3 == 0)


def indexed(q: torch.Tensor) -> torch.Tensor:
    """Each query keeps the keys whose score is above its mean: a mask of activations."""
    best = scores(q).detach()
    return masked(q, best > best.mean(dim=-1, keepdim=True))


def biased(q: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return (scores(q) + bias).softmax(dim=-1) @ q


def escaping(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weights = scores(q).softmax(dim=-1)
    return weights @ q, weights


def sharpened(q: torch.Tensor) -> torch.Tensor:
    """A softmax between two products, over scores that no rule takes apart."""
    return torch.softmax(torch.sin(scores(q)), dim=-1) @ q


def prefix_and_window(q: torch.Tensor) -> torch.Tensor:
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(q.shape[2])
    return masked(q, ((j <= i) & (j > i - 9)) | (j < 5))


CASES: dict[Reason, tuple[Callable[..., Any], tuple[torch.Tensor, ...], dict[str, Any], str]] = {
    Reason.MASK_NOT_UNDERSTOOD: (striped, (Q,), {}, "%"),
    Reason.MASK_FROM_OUTSIDE: (masked, (Q, torch.ones(T, T, dtype=torch.bool)), {}, "graph input"),
    Reason.DROPOUT: (lambda q: sdpa(q, dropout_p=0.25), (Q,), {}, "0.25"),
    Reason.EXCLUDED: (sdpa, (Q,), {"exclude": ["*"]}, ""),
    Reason.NOT_PREPARED: (sdpa, (Q,), {"merge": "gate"}, ""),
    Reason.UNSUPPORTED_SHAPE: (sdpa, (torch.randn(1, 1, T, 300),), {}, "300"),
    Reason.UNSUPPORTED_DTYPE: (sdpa, (Q.double(),), {}, "float64"),
    Reason.UNSUPPORTED_SCALE: (lambda q: sdpa(q, scale=-1.0), (Q,), {}, "-1.0"),
    Reason.DECODE_STEP: (
        lambda q: F.scaled_dot_product_attention(q[:, :, -1:], q, q), (Q,), {}, "kv_len",
    ),
    Reason.WEIGHTS_ESCAPE: (escaping, (Q,), {}, "%"),
    Reason.ALREADY_LOCAL: (windowed, (Q,), {"num_selected": 3}, "window(20)"),
    Reason.MODIFIER_NOT_SUPPORTED: (prefix_and_window, (Q,), {}, "prefix"),
    Reason.ADDITIVE_BIAS: (biased, (Q, torch.randn(4, T, T)), {}, "%"),
    Reason.DATA_DEPENDENT_MASK: (indexed, (Q,), {}, "%"),
    Reason.UNRECOGNISED_ATTENTION: (sharpened, (Q,), {}, "sin"),
    Reason.INSIDE_OPERATOR: (
        lambda q: torch.cond(q.sum() > 0, sdpa, torch.sin, (q,)), (Q,), {}, "%cond",
    ),
    Reason.SIZES_DO_NOT_FIT: (
        # Positions that do not start on a block: the window touches one more of them.
        lambda q: F.scaled_dot_product_attention(
            q[:, :, 3:], q, q,
            attn_mask=torch.arange(T) <= torch.arange(T - 3)[:, None] + 3,
        ),
        (Q,), {"num_selected": 3, "window": 17}, "num_selected=3",
    ),
}  # fmt: skip


@pytest.mark.parametrize("reason", CASES, ids=lambda reason: reason.code)
def test_a_graph_that_earns_it(reason: Reason) -> None:
    torch._dynamo.reset()
    function, inputs, options, named = CASES[reason]
    fast = torch.compile(function, backend="nsa", options={**OPTIONS, **options})
    fast(*inputs)
    (row,) = nsa_compile.report(fast).sites
    assert (row.decision, row.reason) == ("kept", reason.code), row.reason_text
    assert named in row.reason_text
    assert row.hint == reason.hint


def test_internal_error_names_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()

    def fail(*_: object) -> None:
        raise KeyError("q")

    monkeypatch.setattr(backend, "rewrite", fail)
    fast = torch.compile(sdpa, backend="nsa", options=OPTIONS)
    with pytest.warns(nsa_compile.ConversionWarning):
        fast(Q)
    (row,) = nsa_compile.report(fast).sites
    assert row.reason == Reason.INTERNAL_ERROR.code
    assert "KeyError" in row.reason_text


def test_every_reason_has_its_graph() -> None:
    assert {*CASES, Reason.INTERNAL_ERROR} == set(Reason)


@pytest.mark.parametrize("reason", Reason, ids=lambda reason: reason.code)
def test_a_reason_says_what_to_do(reason: Reason) -> None:
    assert reason.code == reason.name.lower()
    assert reason.hint
    assert reason.text.count("{detail}") <= 1
