"""Chunks, prefixes and documents: each spelling proven, near misses refused, constants exact."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from nsa_compile.passes.site import Mask
from tests.passes.test_masks import at, packed, padding_rows, refusal, run

Tensor = torch.Tensor
Program = Callable[[Tensor], Tensor]


def causal(q: Tensor) -> Tensor:
    return at(q)[1] <= at(q)[0]


def start(i: Tensor, c: int) -> Tensor:
    """First position of the chunk of i."""
    return torch.div(i, c, rounding_mode="floor") * c


CHUNKS: dict[str, tuple[Program, str]] = {
    "equal": (lambda q: (at(q)[0] // 4 == at(q)[1] // 4) & causal(q), "causal & chunk(4)"),
    "five": (lambda q: (at(q)[0] // 5 == at(q)[1] // 5) & causal(q), "causal & chunk(5)"),
    "both ways": (lambda q: at(q)[0] // 4 == at(q)[1] // 4, "chunk(4)"),
    "difference": (lambda q: (at(q)[0] // 4 - at(q)[1] // 4 == 0) & causal(q), "causal & chunk(4)"),
    "not earlier": (lambda q: (at(q)[1] // 4 >= at(q)[0] // 4) & causal(q), "causal & chunk(4)"),
    "from its start": (lambda q: (at(q)[1] >= start(at(q)[0], 4)) & causal(q), "causal & chunk(4)"),
    "by remainder": (
        lambda q: (at(q)[1] > at(q)[0] - at(q)[0] % 4 - 1) & causal(q),
        "causal & chunk(4)",
    ),
    "both ends": (
        lambda q: (at(q)[1] >= start(at(q)[0], 4)) & (at(q)[1] < start(at(q)[0], 4) + 4),
        "chunk(4)",
    ),
    "hidden": (
        lambda q: torch.where((at(q)[0] // 4 != at(q)[1] // 4) | ~causal(q), float("-inf"), 0.0),
        "causal & chunk(4)",
    ),
    "summed": (
        lambda q: (
            torch.zeros(12, 12).masked_fill(at(q)[0] // 4 != at(q)[1] // 4, -1e9)
            + torch.full((12, 12), float("-inf")).triu(1)
        ),
        "causal & chunk(4)",
    ),
    "shifted": (
        lambda q: ((at(q)[0] + 2) // 4 == at(q)[1] // 4) & (at(q)[1] <= at(q)[0] + 2),
        "causal(offset=2) & chunk(4)",
    ),
    "whole chunks on": (
        lambda q: (at(q)[0] // 4 + 1 == at(q)[1] // 4) & (at(q)[1] <= at(q)[0] + 4),
        "causal(offset=4) & chunk(4)",
    ),
    "windowed": (
        lambda q: (at(q)[0] // 4 == at(q)[1] // 4) & causal(q) & (at(q)[1] > at(q)[0] - 3),
        "causal & window(3) & chunk(4)",
    ),
}
CHUNK_MISSES: dict[str, Program] = {
    "two sizes": lambda q: (at(q)[0] // 4 == at(q)[1] // 5) & causal(q),
    "both sizes": lambda q: (
        (at(q)[0] // 4 == at(q)[1] // 4) & (at(q)[0] // 6 == at(q)[1] // 6) & causal(q)
    ),
    "other offset": lambda q: (at(q)[1] >= start(at(q)[0] + 2, 4)) & causal(q),
    "off by one": lambda q: (at(q)[1] > start(at(q)[0], 4)) & causal(q),
    "one end": lambda q: at(q)[1] >= start(at(q)[0], 4),
    "blocks of the past": lambda q: at(q)[1] // 4 <= at(q)[0] // 4,
    "different": lambda q: (at(q)[0] // 4 != at(q)[1] // 4) & causal(q),
    "or causal": lambda q: (at(q)[0] // 4 == at(q)[1] // 4) | causal(q),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", CHUNKS)
def test_chunks_are_proven(name: str, dynamic: bool) -> None:
    program, expected = CHUNKS[name]
    assert run(program, dynamic=dynamic and name != "summed").masks == [expected]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", CHUNK_MISSES)
def test_what_is_no_chunk_is_refused(name: str, dynamic: bool) -> None:
    assert run(CHUNK_MISSES[name], dynamic=dynamic).masks == ["mask_not_understood"]


@pytest.mark.parametrize("dynamic", [False, True])
def test_chunks_after_padding_on_the_left_are_ids(dynamic: bool) -> None:
    """Chunks that start where each sequence does: the ids are (j - padding) // c."""

    def mask(q: Tensor, p: Tensor) -> Tensor:
        p = padding_rows(q, p)
        left = (p.cumsum(-1) == 0).sum(-1)
        b = torch.arange(q.shape[0])[:, None, None, None]
        i = torch.arange(q.shape[2])[None, None, :, None]
        j = torch.arange(q.shape[2])[None, None, None, :]
        same = (j - left[b]) // 4 == (i - left[b]) // 4
        return same & (j <= i) & p[b, j].bool()

    p = (torch.arange(12) >= torch.tensor([[5], [0]])).long()
    checker = run(mask, p, dynamic=dynamic)
    assert checker.masks == ["causal & document & padding"]
    assert isinstance(checker.site.mask, Mask)
    assert checker.site.mask.segments_sorted


PREFIXES: dict[str, tuple[Program, str]] = {
    "or": (lambda q: causal(q) | (at(q)[1] < 4), "causal & prefix(4)"),
    "or equal": (lambda q: causal(q) | (at(q)[1] <= 4), "causal & prefix(5)"),
    "square": (lambda q: causal(q) | ((at(q)[1] < 4) & (at(q)[0] < 4)), "causal & prefix(4)"),
    "wide": (lambda q: causal(q) | ((at(q)[1] < 4) & (at(q)[0] < 6)), "causal & prefix(4)"),
    "maximum": (
        lambda q: at(q)[1] <= torch.maximum(at(q)[0], torch.tensor(3)),
        "causal & prefix(4)",
    ),
    "where": (lambda q: torch.where(at(q)[1] < 4, True, causal(q)), "causal & prefix(4)"),
    "hidden": (lambda q: ~((at(q)[1] > at(q)[0]) & (at(q)[1] >= 4)), "causal & prefix(4)"),
    "additive": (
        lambda q: torch.full((12, 12), -1e9).masked_fill(causal(q) | (at(q)[1] < 4), 0.0),
        "causal & prefix(4)",
    ),
    "window": (
        lambda q: (causal(q) & (at(q)[1] > at(q)[0] - 3)) | (at(q)[1] < 2),
        "causal & window(3) & prefix(2)",
    ),
    "chunk": (
        lambda q: (causal(q) | (at(q)[1] < 2)) & (at(q)[0] // 4 == at(q)[1] // 4),
        "causal & chunk(4) & prefix(2)",
    ),
}
PREFIX_MISSES: dict[str, Program] = {
    "queries": lambda q: causal(q) | (at(q)[0] < 4),
    "suffix": lambda q: causal(q) | (at(q)[1] >= 8),
    "small square": lambda q: causal(q) | ((at(q)[1] < 4) & (at(q)[0] < 2)),
    "and": lambda q: (at(q)[1] > at(q)[0]) & (at(q)[1] < 4),
    "two steps": lambda q: causal(q) | ((at(q)[1] < 8) & (at(q)[0] > 5)),
    "window outside": lambda q: (causal(q) | (at(q)[1] < 4)) & (at(q)[1] > at(q)[0] - 3),
    "one key": lambda q: causal(q) | (at(q)[1] == 4),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", PREFIXES)
def test_prefixes_are_proven(name: str, dynamic: bool) -> None:
    program, expected = PREFIXES[name]
    assert run(program, dynamic=dynamic and name != "additive").masks == [expected]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", PREFIX_MISSES)
def test_what_is_no_prefix_is_refused(name: str, dynamic: bool) -> None:
    assert run(PREFIX_MISSES[name], dynamic=dynamic).masks == ["mask_not_understood"]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("shape", [(2,), (2, 1), (1,), ()])
def test_a_prefix_for_each_sequence(shape: tuple[int, ...], dynamic: bool) -> None:
    def mask(q: Tensor, n: Tensor) -> Tensor:
        if shape[:1] == (2,):
            torch._check(n.shape[0] == q.shape[0])
        return causal(q) | (at(q)[1] < n.reshape(-1, 1, 1, 1))

    checker = run(mask, torch.randint(1, 12, shape), dynamic=dynamic)
    assert checker.masks[0].startswith("causal & prefix(")


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_computed_prefix(dynamic: bool) -> None:
    """Whatever computes it, the prefix is a tensor of the graph."""

    def counted(q: Tensor, kinds: Tensor) -> Tensor:
        prefix = (padding_rows(q, kinds) == 0).sum(-1, keepdim=True)
        return (causal(q) | (at(q)[1] < prefix[:, None])).unsqueeze(1)

    kinds = (torch.arange(12) >= torch.tensor([[5], [7]])).long()
    assert run(counted, kinds, dynamic=dynamic).masks == ["causal & prefix(prefix)"]


def test_a_size_as_prefix() -> None:
    def mask(q: Tensor, image: Tensor) -> Tensor:
        return causal(q) | (at(q)[1] < image.shape[1])

    assert run(mask, torch.zeros(3, 2, 8)).masks[0].startswith("causal & prefix(")
    assert run(mask, torch.zeros(3, 5, 8), dynamic=False).masks == ["causal & prefix(5)"]


def test_padding_hides_keys_of_the_prefix_only_if_it_says_so() -> None:
    def both(q: Tensor, p: Tensor) -> Tensor:
        return (causal(q) | (at(q)[1] < 4)) & padding_rows(q, p).bool()[:, None, None, :]

    def beside(q: Tensor, p: Tensor) -> Tensor:
        return (causal(q) & padding_rows(q, p).bool()[:, None, None, :]) | (at(q)[1] < 4)

    p = torch.randint(0, 2, (2, 12))
    assert run(both, p).masks == ["causal & prefix(4) & padding"]
    assert run(beside, p).masks == ["mask_not_understood"]


def test_marked_tokens_are_no_prefix() -> None:
    """Nothing says that the marked tokens come first."""

    def mask(q: Tensor, kinds: Tensor) -> Tensor:
        return causal(q) | (padding_rows(q, kinds) == 0)[:, None, None, :]

    checker = run(mask, torch.randint(0, 2, (2, 12)))
    assert checker.masks == ["mask_not_understood"]


def same(rows: Tensor, columns: Tensor | None = None) -> Tensor:
    columns = rows if columns is None else columns
    return rows[:, None, :, None] == columns[:, None, None, :]


DOCUMENTS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], bool]] = {
    "ids": (lambda q, p: same(p), False),
    "difference": (lambda q, p: p[:, None, :, None] - p[:, None, None, :] == 0, False),
    "not other": (lambda q, p: ~(p[:, None, :, None] != p[:, None, None, :]), False),
    "counted ends": (lambda q, p: same((p == 0).cumsum(-1)), True),
    "counted bytes": (lambda q, p: same(p.bool().cumsum(1)), True),
    "counted numbers": (lambda q, p: same(p.cumsum(-1)), False),
    "counted and scaled": (lambda q, p: same(3 * (p == 0).cumsum(-1) + 1), True),
    "counted down": (lambda q, p: same(-(p == 0).cumsum(-1)), True),
    "blocks": (lambda q, p: same((torch.arange(p.shape[1]) + p[:, :1]) // 4), True),
    "pair": (lambda q, p: same(p, p.flip(-1)), False),
    "neighbours": (lambda q, p: p[:, None, :, None] == p[:, None, None, :] + 1, False),
    "first row": (lambda q, p: same(p[:1]), False),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_are_proven(name: str, dynamic: bool) -> None:
    program, in_order = DOCUMENTS[name]
    ids = torch.randint(0, 3, (2, 12))
    checker = run(lambda q, p: program(q, padding_rows(q, p)) & causal(q), ids, dynamic=dynamic)
    assert checker.masks == ["causal & document"]
    assert isinstance(checker.site.mask, Mask)
    assert checker.site.mask.segments_sorted is in_order


DOCUMENT_MISSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ordered": lambda q, p: p[:, None, :, None] >= p[:, None, None, :],
    "other": lambda q, p: ~same(p),
    "or causal": lambda q, p: same(p) | causal(q),
    "two kinds of ids": lambda q, p: same(p // 2) & same(p % 2),
    "fractions": lambda q, p: same(p * 0.5),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", DOCUMENT_MISSES)
def test_what_is_no_document_is_refused(name: str, dynamic: bool) -> None:
    program = DOCUMENT_MISSES[name]
    ids = torch.randint(0, 3, (2, 12))
    checker = run(lambda q, p: program(q, padding_rows(q, p)), ids, dynamic=dynamic)
    assert checker.masks == ["mask_not_understood"]


def test_documents_with_padding_window_and_penalty() -> None:
    def mask(q: Tensor, p: Tensor) -> Tensor:
        p = padding_rows(q, p)
        near = causal(q) & (at(q)[1] > at(q)[0] - 5)
        keep = same(p) & (p != 0)[:, None, None, :] & near
        return torch.where(keep, 0.0, torch.finfo(torch.float32).min)

    ids = torch.tensor([[1] * 5 + [2] * 7, [1] * 3 + [2] * 4 + [0] * 5])
    assert run(mask, ids).masks == ["causal & window(5) & document & padding"]


def test_a_finite_penalty_hides_nothing_from_a_query_without_document() -> None:
    def mask(q: Tensor, p: Tensor) -> Tensor:
        return torch.where(same(p, p + 1), 0.0, -1e9)

    assert run(mask, torch.randint(0, 3, (2, 12)), dynamic=False).masks == ["mask_not_understood"]


def positions() -> Tensor:
    """Four documents and three, one of them without its beginning."""
    return torch.tensor(
        [[0, 1, 2, 3, 4, 0, 1, 2, 0, 0, 1, 2], [3, 4, 5, 0, 1, 2, 3, 4, 5, 9, 0, 1]]
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_packed_sequences_by_position(dynamic: bool) -> None:
    checker = run(lambda q, p: packed(q, padding_rows(q, p)), positions(), dynamic=dynamic)
    assert checker.masks == ["causal & document"]
    assert isinstance(checker.site.mask, Mask)
    assert checker.site.mask.segments_sorted


def by_position(q: Tensor, position: Tensor, break_: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Whether query and key share a run of positions, and both of their positions."""
    step = torch.diff(position, prepend=position[:, :1] - 1, dim=-1)
    ids = (step != break_).cumsum(-1)
    return same(ids), position[:, None, :, None], position[:, None, None, :]


@pytest.mark.parametrize("dynamic", [False, True])
def test_positions_that_restart_count_like_indices_within_a_document(dynamic: bool) -> None:
    def mask(q: Tensor, p: Tensor) -> Tensor:
        one, i, j = by_position(q, padding_rows(q, p))
        return one & (j <= i) & (j > i - 3)

    assert run(mask, positions(), dynamic=dynamic).masks == ["causal & window(3) & document"]


RESTARTING_MISSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "no document": lambda q, p: by_position(q, p)[1] >= by_position(q, p)[2],
    "other steps": lambda q, p: (
        by_position(q, p, break_=2)[0] & (by_position(q, p)[1] >= by_position(q, p)[2])
    ),
    "other positions": lambda q, p: (
        by_position(q, p)[0] & (by_position(q, p % 3)[1] >= by_position(q, p % 3)[2])
    ),
    "doubled": lambda q, p: (
        by_position(q, p)[0] & (2 * by_position(q, p)[1] >= by_position(q, p)[2])
    ),
    "chunks of positions": lambda q, p: (
        by_position(q, p)[0] & (by_position(q, p)[1] // 2 == by_position(q, p)[2] // 2)
    ),
}


@pytest.mark.parametrize("name", RESTARTING_MISSES)
def test_positions_are_not_taken_for_indices_elsewhere(name: str) -> None:
    checker = run(lambda q, p: RESTARTING_MISSES[name](q, padding_rows(q, p)), positions())
    assert checker.masks == ["mask_not_understood"]


def test_ids_that_are_overwritten_before_their_use_are_refused() -> None:
    def mask(q: Tensor, p: Tensor) -> Tensor:
        ids = p.roll(1, 1)
        keep = same(ids) & causal(q)
        ids.zero_()
        return keep

    checker = run(mask, torch.randint(0, 3, (2, 12)), dynamic=False)
    assert checker.masks == ["mask_not_understood"]
    assert "in place" in refusal(checker).detail
