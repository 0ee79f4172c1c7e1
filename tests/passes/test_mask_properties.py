"""Proven implies equal: random mask programs, each proof compared with the mask it stands for."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from nsa_compile.passes.site import Mask
from tests.passes.checking import check

Tensor = torch.Tensor
# (x [B, H, T, D], padding [B, S], T, S) -> a mask that broadcasts to [B, 1, T, S]
Program = Callable[[Tensor, Tensor, int, int], Tensor]


def rows(t: int) -> Tensor:
    return torch.arange(t)[:, None]


def columns(s: int) -> Tensor:
    return torch.arange(s)[None, :]


CAUSAL: list[Program] = [
    lambda x, p, t, s: rows(t) >= columns(s),
    lambda x, p, t, s: columns(s) <= rows(t),
    lambda x, p, t, s: ~(columns(s) > rows(t)),
    lambda x, p, t, s: columns(s) - rows(t) < 1,
    lambda x, p, t, s: torch.ones(t, s, dtype=torch.bool).tril(),
    lambda x, p, t, s: torch.tril(torch.ones(t, s)).to(torch.bool),
    lambda x, p, t, s: torch.tril(x.new_ones(t, s)) != 0,
    lambda x, p, t, s: ~torch.ones(t, s, dtype=torch.bool).triu(diagonal=1),
    lambda x, p, t, s: torch.triu(torch.full((t, s), float("-inf")), diagonal=1) == 0,
    lambda x, p, t, s: torch.where(rows(t) < columns(s), -3e38, 0.0) == 0,
    lambda x, p, t, s: torch.ones(t, dtype=torch.long).cumsum(0)[:, None] > columns(s),
    lambda x, p, t, s: torch.zeros(t, s).masked_fill(rows(t) < columns(s), 1.0) < 0.5,
    lambda x, p, t, s: (torch.arange(1, t + 1)[:, None] - torch.arange(s)) > 0,
    lambda x, p, t, s: torch.arange(s).expand(t, s) <= torch.arange(t).unsqueeze(-1),
    lambda x, p, t, s: torch.clamp(columns(s) - rows(t), min=0) == 0,
    lambda x, p, t, s: torch.minimum(rows(t) - columns(s), torch.zeros((), dtype=torch.long)) >= 0,
    lambda x, p, t, s: columns(s) <= rows(t) + (s - t),
    lambda x, p, t, s: torch.ones(t, s, dtype=torch.bool).tril(s - t),
    lambda x, p, t, s: torch.cat([rows(t) >= columns(s)[:, :3], rows(t) >= columns(s)[:, 3:]], 1),
]
WINDOW: list[Program] = [
    lambda x, p, t, s: columns(s) > rows(t) - 5,
    lambda x, p, t, s: rows(t) - columns(s) < 4,
    lambda x, p, t, s: torch.triu(torch.ones(t, s, dtype=torch.bool), diagonal=-3),
    lambda x, p, t, s: ~torch.tril(torch.ones(t, s, dtype=torch.bool), diagonal=-6),
    lambda x, p, t, s: (rows(t) - columns(s)).abs() < 4,
    lambda x, p, t, s: columns(s) >= torch.clamp(rows(t) - 3, min=0),
]
PADDING: list[Program] = [
    lambda x, p, t, s: p.bool()[:, None, None, :],
    lambda x, p, t, s: p[:, None, None].ne(0),
    lambda x, p, t, s: ~(p == 0).unsqueeze(1).unsqueeze(1),
    lambda x, p, t, s: (p > 0).view(p.shape[0], 1, 1, s),
    lambda x, p, t, s: p.to(torch.bool)[torch.arange(p.shape[0])[:, None, None, None], columns(s)],
    lambda x, p, t, s: p.bool()[:, None, None, :].expand(-1, 1, t, -1),
    lambda x, p, t, s: torch.logical_and(p[:, None, None, :], torch.ones(t, s)),
    lambda x, p, t, s: p.flip(-1).bool()[:, None, None, :],
]
OTHER: list[Program] = [
    lambda x, p, t, s: x.new_ones((), dtype=torch.bool),
    lambda x, p, t, s: columns(s) >= 0,
    lambda x, p, t, s: (torch.diff(torch.arange(t), prepend=torch.arange(1) - 1) == 1)[:, None],
    lambda x, p, t, s: (torch.diff(columns(s), dim=-1) != 1).cumsum(-1).sum() == 0,
    lambda x, p, t, s: rows(t) < columns(s),
    lambda x, p, t, s: rows(t) > columns(s),
    lambda x, p, t, s: p.bool()[:, None, :t, None] if t == s else rows(t) >= columns(s),
    lambda x, p, t, s: (rows(t) // 4) == (columns(s) // 4),
    lambda x, p, t, s: (rows(t) % 2) == (columns(s) % 2),
    lambda x, p, t, s: x[:, :1, :, :1] > 0,
    lambda x, p, t, s: columns(s) < 3,
    lambda x, p, t, s: rows(t) == columns(s),
    lambda x, p, t, s: p.bool()[:, None, None, :].roll(1, -1),
]


def assigned(
    region: Callable[[Tensor, Tensor], tuple[object, ...] | Tensor], value: float
) -> Program:
    """``tril`` with ``value`` written to a region of it."""

    def made(x: Tensor, p: Tensor, t: int, s: int) -> Tensor:
        mask = torch.ones(t, s).tril()
        mask[region(rows(t), columns(s))] = value
        return mask != 0

    return made


# Numbers on their way to a mask, 0 where a key is hidden: what models do arithmetic on.
NUMBERS: list[Program] = [
    lambda x, p, t, s: torch.ones(t, s).tril(),
    lambda x, p, t, s: torch.ones(t, s, dtype=torch.long).tril(),
    lambda x, p, t, s: torch.ones(t, s, dtype=torch.uint8).tril(),
    lambda x, p, t, s: torch.ones(t, s).triu(-2),
    lambda x, p, t, s: (rows(t) - columns(s) + 1).clamp(0, 1),
    lambda x, p, t, s: torch.sign(rows(t) - columns(s)) + 1,
    lambda x, p, t, s: F.relu(rows(t) - columns(s) + 1),
    lambda x, p, t, s: p[:, None, None],
    lambda x, p, t, s: p[:, None, None].float(),
    lambda x, p, t, s: p[:, None, None].to(torch.uint8),
    lambda x, p, t, s: 1 - p[:, None, None],
    lambda x, p, t, s: p[:, None, None] - 1,
    lambda x, p, t, s: p[:, None, :t, None] if t == s else p[:, None, None],
    lambda x, p, t, s: p[:, None, None].clamp(max=1),
    lambda x, p, t, s: p[:, None, None] == p[:, None, :1, None],
    lambda x, p, t, s: p.cumsum(-1)[:, None, None],
    lambda x, p, t, s: F.pad(torch.ones(t, s).tril(), (1, 0))[:, :-1],
    lambda x, p, t, s: F.pad(torch.ones(t, s).tril(), (0, 0, 1, -1), value=1.0),
    lambda x, p, t, s: torch.ones(t, s).triu().flip(0).flip(1),
    lambda x, p, t, s: torch.eye(t, s),
    lambda x, p, t, s: torch.div(columns(s), 4, rounding_mode="trunc") - (rows(t) >> 2),
    lambda x, p, t, s: torch.full((), 0.5),
]
ASSIGNED: list[Program] = [
    assigned(lambda i, j: (slice(None), slice(None, 3)), 1.0),
    assigned(lambda i, j: (slice(None, 3), slice(None, 3)), 1.0),
    assigned(lambda i, j: (..., slice(2, None)), 0.0),
    assigned(lambda i, j: (..., -1), 0.0),
    assigned(lambda i, j: (slice(None, -2),), 1.0),
    assigned(lambda i, j: (0,), 1.0),
    assigned(lambda i, j: i - j > 4, 0.0),
    assigned(lambda i, j: j > i, 2.0),
]
KINDS = (CAUSAL, CAUSAL, WINDOW, PADDING, OTHER, ASSIGNED)


def computed(random_: random.Random, a: Program, b: Program) -> Program:
    """Arithmetic on two tensors of numbers."""
    return random_.choice(
        [
            lambda x, p, t, s: a(x, p, t, s) * b(x, p, t, s),
            lambda x, p, t, s: a(x, p, t, s) + b(x, p, t, s),
            lambda x, p, t, s: a(x, p, t, s) - b(x, p, t, s) * 1,
            lambda x, p, t, s: torch.minimum(a(x, p, t, s).float(), b(x, p, t, s).float()),
            lambda x, p, t, s: torch.maximum(a(x, p, t, s).int(), b(x, p, t, s).int()),
            lambda x, p, t, s: torch.max(a(x, p, t, s).float(), b(x, p, t, s).float()),
            lambda x, p, t, s: a(x, p, t, s).int() & b(x, p, t, s).int(),
            lambda x, p, t, s: a(x, p, t, s).byte() | b(x, p, t, s).byte(),
            lambda x, p, t, s: a(x, p, t, s).long() ^ b(x, p, t, s).long(),
            lambda x, p, t, s: a(x, p, t, s).float().masked_fill(b(x, p, t, s) == 0, 0.0),
            lambda x, p, t, s: torch.where(a(x, p, t, s).bool(), b(x, p, t, s).float(), 0.0),
            lambda x, p, t, s: (~a(x, p, t, s).int()) * b(x, p, t, s).int(),
            lambda x, p, t, s: a(x, p, t, s).float() / 2 + b(x, p, t, s).float() / 2,
            lambda x, p, t, s: torch.logical_and(a(x, p, t, s), b(x, p, t, s)).float(),
        ]
    )


def hiding(random_: random.Random, a: Program) -> Program:
    """Numbers made a mask."""
    low = torch.finfo(torch.float32).min
    return random_.choice(
        [
            lambda x, p, t, s: a(x, p, t, s).bool(),
            lambda x, p, t, s: a(x, p, t, s) > 0,
            lambda x, p, t, s: a(x, p, t, s) >= 1,
            lambda x, p, t, s: a(x, p, t, s) == 1,
            lambda x, p, t, s: a(x, p, t, s) > 0.5,
            lambda x, p, t, s: (1.0 - a(x, p, t, s).float()) * -1e9,
            lambda x, p, t, s: (1.0 - a(x, p, t, s).float()) * low,
            lambda x, p, t, s: (1.0 - a(x, p, t, s).float()) * float("-inf"),
            lambda x, p, t, s: ((1 - a(x, p, t, s).float()) * low + low).clamp(min=low) * 0.0,
            lambda x, p, t, s: a(x, p, t, s).float().log(),
            lambda x, p, t, s: torch.nan_to_num((a(x, p, t, s) == 0).float() * float("-inf")),
            lambda x, p, t, s: torch.nan_to_num(
                (a(x, p, t, s) == 0).float() * float("-inf"), neginf=-1e9
            ),
            lambda x, p, t, s: _refilled(1.0 - a(x, p, t, s).float(), low),
            lambda x, p, t, s: (
                a(x, p, t, s)
                .float()
                .masked_fill(a(x, p, t, s) == 0, -1e9)
                .masked_fill(a(x, p, t, s) == 1, 0.0)
            ),
            lambda x, p, t, s: torch.maximum(a(x, p, t, s).float().log(), torch.full((), -1e9)),
        ]
    )


def _refilled(inverted: Tensor, low: float) -> Tensor:
    return inverted.masked_fill(inverted.to(torch.bool), low)


def combine(random_: random.Random, a: Program, b: Program) -> Program:
    """Two programs joined by one of the ways in which models join masks."""
    return random_.choice(
        [
            lambda x, p, t, s: a(x, p, t, s) & b(x, p, t, s),
            lambda x, p, t, s: a(x, p, t, s) * b(x, p, t, s),
            lambda x, p, t, s: torch.logical_and(a(x, p, t, s), b(x, p, t, s)),
            lambda x, p, t, s: torch.where(a(x, p, t, s), b(x, p, t, s), False),
            lambda x, p, t, s: ~(~a(x, p, t, s) | ~b(x, p, t, s)),
            lambda x, p, t, s: (a(x, p, t, s) & b(x, p, t, s)).masked_fill(~a(x, p, t, s), False),
            lambda x, p, t, s: (a(x, p, t, s).float() + b(x, p, t, s).float()) > 1.5,
            lambda x, p, t, s: a(x, p, t, s) | b(x, p, t, s),
            lambda x, p, t, s: a(x, p, t, s) ^ b(x, p, t, s),
        ]
    )


def finish(random_: random.Random, a: Program) -> Program:
    """The mask as SDPA gets it: boolean or additive, expanded or not."""
    return random_.choice(
        [
            a,
            a,
            lambda x, p, t, s: a(x, p, t, s).expand(x.shape[0], 1, t, s),
            lambda x, p, t, s: torch.where(a(x, p, t, s), 0.0, torch.finfo(torch.float32).min),
            lambda x, p, t, s: torch.zeros(t, s).masked_fill(~a(x, p, t, s), float("-inf")),
            lambda x, p, t, s: (1.0 - a(x, p, t, s).float()) * -1e9,
            lambda x, p, t, s: a(x, p, t, s).contiguous().clone(),
        ]
    )


def program(seed: int) -> Program:
    random_ = random.Random(seed)
    if seed % 2:
        numbers = random_.choice(NUMBERS)
        for _ in range(random_.randrange(3)):
            numbers = computed(random_, numbers, random_.choice(NUMBERS))
        return hiding(random_, numbers)
    made = random_.choice(random_.choice(KINDS))
    for _ in range(random_.randrange(3)):
        made = combine(random_, made, random_.choice(random_.choice(KINDS)))
    return finish(random_, made)


def attention(made: Program) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def f(x: Tensor, y: Tensor, padding: Tensor) -> Tensor:
        batch, t, s = x.shape[0], x.shape[1], y.shape[1]
        torch._check(y.shape[0] == batch)
        torch._check(padding.shape[0] == batch)
        torch._check(padding.shape[1] == s)
        q = x.view(batch, t, 2, 8).transpose(1, 2)
        k = y.view(batch, s, 2, 8).transpose(1, 2)
        mask = made(q, padding, t, s)
        mask = mask if mask.dim() > 1 else mask.expand(t, s)
        return F.scaled_dot_product_attention(q, k, k, attn_mask=mask)

    return f


def inputs(
    t: int, s: int | None = None, batch: int = 2, most: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, T, 16], y [B, S, 16], padding [B, S] of 0 to ``most``.

    Without ``s`` y is x: one length for both.
    """
    x = torch.randn(batch, t, 16)
    y = x if s is None else torch.randn(batch, s, 16)
    generator = torch.Generator().manual_seed(t * 64 + y.shape[1])
    return x, y, torch.randint(0, most + 1, (batch, y.shape[1]), generator=generator)


@pytest.mark.parametrize("seed", range(24))
def test_proven_implies_equal_with_run_time_lengths(seed: int) -> None:
    """One capture, several lengths: the proof must hold for all of them."""
    calls = [inputs(12), inputs(9, most=1), inputs(4, most=1), inputs(30, batch=3, most=1)]
    if seed % 3 == 0:
        calls = [inputs(12, 17), inputs(5, 6, most=1), inputs(6, 19, most=1), inputs(11, 7)]
    check(attention(program(seed)), *calls, dynamic=True)


@pytest.mark.parametrize("seed", range(100, 112))
def test_proven_implies_equal_with_fixed_lengths(seed: int) -> None:
    shape = random.Random(seed).choice([(12, 12), (7, 7), (1, 1), (2, 2), (9, 14), (14, 9)])
    check(attention(program(seed)), inputs(*shape), inputs(*shape, most=1), dynamic=False)


@pytest.mark.parametrize("number", range(len(CAUSAL)))
def test_every_causal_spelling_is_proven(number: int) -> None:
    checker = check(attention(CAUSAL[number]), inputs(12), inputs(9), dynamic=True)
    assert checker.masks == ["causal"]
    assert checker.checked == 2
    assert check(attention(CAUSAL[number]), inputs(12), dynamic=False).masks == ["causal"]


@pytest.mark.parametrize("number", range(len(WINDOW)))
def test_every_window_spelling_is_proven(number: int) -> None:
    def both(x: Tensor, p: Tensor, t: int, s: int) -> Tensor:
        return WINDOW[number](x, p, t, s) & (rows(t) >= columns(s))

    checker = check(attention(both), inputs(12), inputs(9), dynamic=True)
    assert isinstance(checker.site.mask, Mask)
    assert checker.site.mask.causal
    assert checker.site.mask.window == (5, 4, 4, 6, 4, 4)[number]


@pytest.mark.parametrize("number", range(len(PADDING)))
def test_every_padding_spelling_is_proven(number: int) -> None:
    checker = check(attention(PADDING[number]), inputs(12), inputs(9), dynamic=True)
    assert checker.masks == ["padding"]
    assert checker.checked == 2
