"""Masks built by assignment, padding, flips and functions of numbers, and their near misses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from tests.passes.test_masks import at, padding_rows, run

Tensor = torch.Tensor
MIN = torch.finfo(torch.float32).min
INF = float("inf")


def tril(q: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(q.shape[2], q.shape[2], dtype=dtype).tril()


def assigned(q: Tensor, *writes: tuple[object, float]) -> Tensor:
    mask = tril(q)
    for region, value in writes:
        mask[region] = value
    return mask.bool()


def refilled(mask: Tensor) -> Tensor:
    """The subsequent mask of older torch."""
    return mask.float().masked_fill(mask == 0, -INF).masked_fill(mask == 1, 0.0)


def padded(q: Tensor, value: bool) -> Tensor:
    """One more query and key in front."""
    t = q.shape[2] - 1
    return F.pad(torch.ones(t, t, dtype=torch.bool).tril(), (1, 0, 1, 0), value=value)


COLUMNS = (slice(None), slice(None, 3))
PROVEN: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "log": (lambda q: tril(q).log(), "causal"),
    "refilled": (lambda q: refilled(tril(q)), "causal"),
    "flipped": (lambda q: tril(q, torch.bool).T.flip(0).flip(1), "causal"),
    "index_select": (lambda q: tril(q).index_select(0, torch.arange(q.shape[2])) > 0, "causal"),
    "sign": (lambda q: torch.sign(at(q)[0] - at(q)[1]) >= 0, "causal"),
    "relu": (lambda q: F.relu(at(q)[1] - at(q)[0]) == 0, "causal"),
    "steps": (lambda q: (at(q)[0] - at(q)[1] + 1).clamp(0, 1).bool(), "causal"),
    "infinity times 0": (
        lambda q: torch.nan_to_num((at(q)[1] > at(q)[0]) * -INF, neginf=-INF), "causal",
    ),
    "largest": (lambda q: torch.max((1 - tril(q)) * MIN * 2, torch.tensor(MIN)), "causal"),
    "shifted bits": (lambda q: (at(q)[0] >> 2) == (at(q)[1] >> 2), "chunk(4)"),
    "rounded to 0": (
        lambda q: torch.div(at(q)[0], 4, rounding_mode="trunc") == at(q)[1] // 4, "chunk(4)",
    ),
    "prefix": (lambda q: assigned(q, (COLUMNS, 1.0)), "causal & prefix(3)"),
    "prefix by its corner": (
        lambda q: assigned(q, ((slice(3), slice(3)), 1.0)), "causal & prefix(3)",
    ),
    "written by a mask": (
        lambda q: assigned(q, (at(q)[0] - at(q)[1] > 3, 0.0)), "causal & window(4)",
    ),
    "written back": (lambda q: assigned(q, (COLUMNS, 1.0), (at(q)[1] > at(q)[0], 0.0)), "causal"),
    "nothing written": (lambda q: assigned(q, (slice(0, 0), 1.0)), "causal"),
}  # fmt: skip
MISSES: dict[str, Callable[[Tensor], Tensor]] = {
    "0 times infinity": lambda q: (at(q)[1] > at(q)[0]) * -INF,
    "infinity becomes 0": lambda q: (1 - tril(q)).log().nan_to_num(neginf=0.0) - 1.0,
    "largest of no number": lambda q: torch.maximum((1 - tril(q)) * -INF, torch.zeros(())),
    "overflow times 0": lambda q: ((2 - tril(q)) * MIN).masked_fill(at(q)[1] <= at(q)[0], 0.0) * 0,
    "log of 2": lambda q: (tril(q) + 1).log(),
    "reward": lambda q: tril(q).log().neg(),
    "one row": lambda q: assigned(q, (0, 1.0)),
    "one column": lambda q: assigned(q, ((..., 0), 0.0)),
    "last column": lambda q: assigned(q, ((..., -1), 1.0)),
    "every second": lambda q: assigned(q, ((slice(None), slice(None, None, 2)), 1.0)),
    "one element": lambda q: assigned(q, ((5, 2), 0.0)),
    "first row of padding": lambda q: padded(q, True),
    "flipped once": lambda q: tril(q, torch.bool).flip(0),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", PROVEN)
def test_proven(name: str, dynamic: bool) -> None:
    mask, expected = PROVEN[name]
    assert run(mask, dynamic=dynamic).masks == [expected]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", MISSES)
def test_refused(name: str, dynamic: bool) -> None:
    assert run(MISSES[name], dynamic=dynamic).masks == ["mask_not_understood"]


@pytest.mark.parametrize("dynamic", [False, True])
def test_what_both_ids_say_of_the_query_is_said_of_the_key(dynamic: bool) -> None:
    """0 is no document."""

    def mask(q: Tensor, ids: Tensor) -> Tensor:
        ids = padding_rows(q, ids)
        query, key = ids[:, None, :, None], ids[:, None, None]
        return (query == key) & (query > 0) & (key > 0)

    ids = torch.randint(0, 3, (2, 12))
    assert run(mask, ids, dynamic=dynamic).masks == ["document & padding"]


def test_an_assignment_after_its_use_does_not_count() -> None:
    def f(q: Tensor) -> Tensor:
        mask = tril(q)
        used = mask > 0
        mask[:, :3] = 1.0
        return used

    assert run(f).masks == ["causal"]


def test_an_unknown_number_added_to_all_scores_is_no_mask() -> None:
    """finfo.min would make all scores equal."""
    assert run(lambda q, x: x.expand(12, 12), torch.tensor(MIN), dynamic=False).masks == [
        "additive_bias"
    ]
