"""Padding turned into numbers: proven for 0 and 1, and dense where it holds another."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import nsa_compile
from nsa_compile.passes.site import Mask
from tests.passes.test_masks import padding_rows, run

Tensor = torch.Tensor
MIN = torch.finfo(torch.float32).min
PADDING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "inverted": lambda q, p: (1.0 - p[:, None, None, :].float()) * -1e9,
    "subtracted": lambda q, p: (p[:, None, None, :] - 1) * 1e9,
    "finfo": lambda q, p: (1.0 - p[:, None, None, :]) * MIN,
    "unsqueezed": lambda q, p: ((1 - p) * -1e4).unsqueeze(1).unsqueeze(2),
    "forth and back": lambda q, p: (1.0 - p[:, None, None, :] * p.flip(-1)[:, None, None]) * -1e9,
}
# Causal too: what models do with the two, as numbers.
JOINED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "product": lambda tril, p: (1.0 - tril * p) * -1e4,
    "count": lambda tril, p: torch.where(tril + p == 2, 0.0, -1e9),
    "more than one": lambda tril, p: tril + p > 1,
    "minimum": lambda tril, p: torch.minimum(tril, p) > 0,
    "bits": lambda tril, p: (tril.to(torch.uint8) & p.to(torch.uint8)) != 0,
    "bits flipped": lambda tril, p: ((1 - tril.int()) | (p.int() ^ 1)) == 0,
    "clamped": lambda tril, p: ((1.0 - tril) * MIN + (1.0 - p) * MIN).clamp(min=MIN),
    "overflow": lambda tril, p: (1.0 - tril) * MIN + (1.0 - p) * MIN,
    "filled where filled": lambda tril, p: _filled(1.0 - tril.float() * p),
    "filled twice": lambda tril, p: (
        (tril * p).float().masked_fill(tril * p == 0, float("-inf")).masked_fill(tril * p == 1, 0.0)
    ),
}


def _filled(inverted: Tensor) -> Tensor:
    return inverted.masked_fill(inverted.to(torch.bool), MIN)


MISSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "computed": lambda q, p: (1.0 - p.float().sigmoid()[:, None, None, :]) * -1e9,
    "counted": lambda q, p: p.cumsum(-1)[:, None, None, :] * -1e9,
    "bonus on real keys": lambda q, p: p[:, None, None, :] * 1e9,
    "bonus": lambda q, p: (1.0 - p[:, None, None, :]) * -1e9 + 1.0,
    "small": lambda q, p: (1.0 - p[:, None, None, :]) * -100.0,
    "0 times infinity": lambda q, p: (1.0 - p[:, None, None, :]) * float("-inf"),
    "flipped bits": lambda q, p: (~p.long())[:, None, None, :] * 1e9,
    "taken back": lambda q, p: torch.where(p == 7, -1e9, 0.0)[:, None, None] * (1 - p[0, 0]),
    "fractions": lambda q, p: (0.5 - p[:, None, None, :]) * -1e9,
    "on queries": lambda q, p: (1.0 - p[:, None, :, None]) * -1e9,
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
@pytest.mark.parametrize("name", PADDING)
def test_padding_by_arithmetic(name: str, dtype: torch.dtype, dynamic: bool) -> None:
    p = torch.randint(0, 2, (2, 12)).to(dtype)
    checker = run(lambda q, p: PADDING[name](q, padding_rows(q, p)), p, dynamic=dynamic)
    assert checker.masks == ["padding"]
    assert isinstance(checker.site.mask, Mask)
    assert len(checker.site.mask.binary) == 1


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
@pytest.mark.parametrize("name", JOINED)
def test_causal_and_padding_as_numbers(name: str, dtype: torch.dtype) -> None:
    def mask(q: Tensor, p: Tensor) -> Tensor:
        t = q.shape[2]
        return JOINED[name](torch.ones(t, t, dtype=dtype).tril(), padding_rows(q, p)[:, None, None])

    p = torch.randint(0, 2, (2, 12)).to(dtype)
    assert run(mask, p).masks == ["causal & padding"]


@pytest.mark.parametrize("name", MISSES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_other_arithmetic_is_refused(name: str, dtype: torch.dtype) -> None:
    p = torch.randint(0, 2, (2, 12)).to(dtype)
    checker = run(lambda q, p: MISSES[name](q, padding_rows(q, p)), p)
    kept = ("mask_not_understood", "mask_from_outside", "data_dependent_mask", "additive_bias")
    assert checker.masks[0] in kept


def test_what_the_dtype_says_is_not_checked() -> None:
    p = torch.randint(0, 2, (2, 12)).bool()
    checker = run(lambda q, p: (1.0 - padding_rows(q, p)[:, None, None].float()) * -1e9, p)
    assert isinstance(checker.site.mask, Mask)
    assert checker.site.mask.binary == ()


def test_causal_with_padding_by_arithmetic() -> None:
    def mask(q: Tensor, p: Tensor) -> Tensor:
        hidden = torch.full((12, 12), MIN).triu(1)
        return hidden + (1.0 - padding_rows(q, p)[:, None, None, :]) * MIN

    p = (torch.arange(12) < torch.tensor([[9], [12]])).long()
    checker = run(mask, p, dynamic=False)
    assert checker.masks == ["causal & padding"]


@pytest.mark.parametrize("inner", ["aot_eager", "eager"])
def test_another_number_runs_dense_and_says_so(inner: str) -> None:
    def f(q: Tensor, p: Tensor) -> Tensor:
        mask = (1.0 - p[:, None, None, :]) * -1e9
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    torch._dynamo.reset()
    options = {
        "dense_len": 0, "select_block": 16, "query_tile": 16, "window": 16, "num_selected": 8,
        "inner": inner,
    }  # fmt: skip
    fast = torch.compile(f, backend="nsa", options=options)
    q, p = torch.randn(2, 4, 40, 8), torch.randint(0, 2, (2, 40))
    p[:, 0] = 1
    torch.testing.assert_close(fast(q, p), f(q, p))
    assert nsa_compile.report(fast).sites[0].decision == "converted"
    p[1, 7] = 2
    with pytest.warns(nsa_compile.ConversionWarning, match="more than 0 and 1"):
        torch.testing.assert_close(fast(q, p), f(q, p))
    assert nsa_compile.report(fast).failures
    p[1, 7] = 0
    torch.testing.assert_close(fast(q, p), f(q, p))
