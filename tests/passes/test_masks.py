"""Masks proven, near misses refused, and refusals that name what stopped the proof."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nsa_compile.passes.reasons import Reason, Refusal
from nsa_compile.passes.site import Mask
from tests.passes.checking import Checker, check

Tensor = torch.Tensor
sdpa = F.scaled_dot_product_attention


def run(
    mask: Callable[..., Tensor | None],
    *extra: Tensor,
    t: int = 12,
    dynamic: bool = True,
    **kw: bool,
) -> Checker:
    """SDPA on [2, 4, T, 8] under ``mask(q, *extra)``; with ``dynamic``, T and B are symbols."""

    def f(x: Tensor, *extra: Tensor) -> Tensor:
        q = x.view(x.shape[0], x.shape[1], 4, 8).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask(q, *extra), **kw)

    x = torch.randn(2, 12, 32)
    if dynamic:
        for tensor in (x, *extra):
            for dim in range(min(tensor.dim(), 2)):
                if tensor.shape[dim] in (2, 12):
                    torch._dynamo.mark_dynamic(tensor, dim)
    return check(f, (x, *extra), dynamic=None if dynamic else False)


def refusal(checker: Checker) -> Refusal:
    assert isinstance(checker.site.mask, Refusal)
    return checker.site.mask


def at(q: Tensor) -> tuple[Tensor, Tensor]:
    t = q.shape[2]
    return torch.arange(t)[:, None], torch.arange(t)[None, :]


def test_an_integer_argument_may_be_negative() -> None:
    """A symbol that is no size has no sign: nothing may be concluded from it."""

    def f(x: Tensor, n: int) -> Tensor:
        q = x.view(2, 12, 4, 8).transpose(1, 2)
        mask = (torch.arange(12) + n + 12 > 0)[None]
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    x = torch.randn(2, 12, 32)
    torch._dynamo.reset()
    checker = check(f, (x, 5), (x, 7), (x, -3), (x, -4), dynamic=True)
    assert "full" not in checker.masks


@pytest.mark.parametrize("dynamic", [False, True])
def test_no_mask_is_full(dynamic: bool) -> None:
    assert run(lambda q: None, dynamic=dynamic).masks == ["full"]


@pytest.mark.parametrize("dynamic", [False, True])
def test_is_causal_flag(dynamic: bool) -> None:
    assert run(lambda q: None, dynamic=dynamic, is_causal=True).masks == ["causal"]


def test_is_causal_is_aligned_top_left() -> None:
    def f(q: Tensor, k: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, k, is_causal=True)

    mask = check(f, (torch.randn(1, 2, 5, 8), torch.randn(1, 2, 9, 8))).site.mask
    assert mask == Mask(causal=True, offset=0)


def test_offset_of_the_lower_right_corner() -> None:
    def f(q: Tensor, k: Tensor) -> Tensor:
        t, s = q.shape[2], k.shape[2]
        mask = torch.ones(t, s, dtype=torch.bool).tril(s - t)
        return F.scaled_dot_product_attention(q, k, k, attn_mask=mask)

    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 9, 8)
    assert check(f, (q, k)).masks == ["causal(offset=4)"]
    for tensor in (q, k):
        torch._dynamo.mark_dynamic(tensor, 2)
    site = check(f, (q, k)).site
    assert isinstance(site.mask, Mask)
    assert site.mask.offset is not None
    assert not isinstance(site.mask.offset, int)
    assert str(site.mask.offset.meta["example_value"].node.expr).count("-") == 1


# Each of these is one change away from a mask that is proven.
NEAR_MISSES: dict[str, Callable[[Tensor], Tensor]] = {
    "hides itself": lambda q: at(q)[0] < at(q)[1],
    "shows the future": lambda q: at(q)[1] >= at(q)[0],
    "causal or far": lambda q: (at(q)[1] <= at(q)[0]) | (at(q)[1] > at(q)[0] + 3),
    "dilated": lambda q: (at(q)[1] <= at(q)[0]) & ((at(q)[0] - at(q)[1]) % 2 == 0),
    "slope two": lambda q: 2 * at(q)[1] <= at(q)[0],
    "a sum": lambda q: at(q)[1] + at(q)[0] <= 10,
    "by head": lambda q: at(q)[1] <= at(q)[0] + torch.arange(4)[:, None, None],
    "by batch": lambda q: at(q)[1] <= at(q)[0] + torch.arange(q.shape[0])[:, None, None, None],
    "one key": lambda q: (at(q)[1] <= at(q)[0]) & (at(q)[1] != 3),
    "from activations": lambda q: q[:, :1, :, :1] > 0,
    "first keys only": lambda q: (at(q)[1] <= at(q)[0]) & (at(q)[1] < 3),
    "rows": lambda q: (at(q)[1] <= at(q)[0]) & (at(q)[0] > 3),
    "rolled": lambda q: (at(q)[1] <= at(q)[0]).roll(1, -1),
    "xor": lambda q: (at(q)[1] <= at(q)[0]) ^ (at(q)[1] == 0),
    "small penalty": lambda q: torch.where(at(q)[1] <= at(q)[0], 0.0, -100.0),
    "bias": lambda q: (at(q)[1] - at(q)[0]).float(),
    "bonus": lambda q: torch.where(at(q)[1] <= at(q)[0], 1.0, float("-inf")),
    "reward": lambda q: torch.where(at(q)[1] <= at(q)[0], 0.0, float("inf")),
    "rounded positions": lambda q: (at(q)[1] + 999).bfloat16() <= (at(q)[0] + 999).bfloat16(),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_are_refused(name: str, dynamic: bool) -> None:
    checker = run(NEAR_MISSES[name], dynamic=dynamic)
    assert checker.masks == [Reason.MASK_NOT_UNDERSTOOD.code]
    assert "%" in refusal(checker).detail


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (lambda q: at(q)[1] < at(q)[0], "causal(offset=-1)"),
        (lambda q: at(q)[1] <= at(q)[0] + 1, "causal(offset=1)"),
        (lambda q: (at(q)[1] <= at(q)[0]) & (at(q)[1] != at(q)[0]), "causal(offset=-1)"),
        (lambda q: (at(q)[1] <= at(q)[0]) & (at(q)[1] > at(q)[0] - 4), "causal & window(4)"),
        (lambda q: (at(q)[1] <= at(q)[0]) & (at(q)[1] >= at(q)[0] - 4), "causal & window(5)"),
        (lambda q: (at(q)[1] <= at(q)[0]) & (at(q)[1] > at(q)[0] - 99), "causal & window(99)"),
        (lambda q: (at(q)[0] - at(q)[1]).abs() < 4, "window(4)"),
        (lambda q: (at(q)[0] - at(q)[1]).abs() <= 4, "window(5)"),
        (lambda q: torch.where(at(q)[1] <= at(q)[0], 0.0, -1e4), "causal"),
        (lambda q: (at(q)[1] > at(q)[0]) * torch.finfo(q.dtype).min, "causal"),
    ],
)
def test_constants_are_read_exactly(mask: Callable[[Tensor], Tensor], expected: str) -> None:
    assert run(mask).masks == [expected]
    assert run(mask, dynamic=False).masks == [expected]


def padding_rows(q: Tensor, p: Tensor) -> Tensor:
    torch._check(p.shape[1] == q.shape[2])
    torch._check(p.shape[0] == q.shape[0])
    return p


PADDING_MISSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "on queries": lambda q, p: p.bool()[:, None, :, None],
    "on both, added": lambda q, p: (p[:, None, :, None] + p[:, None, None, :]) > 0,
    "or causal": lambda q, p: p.bool()[:, None, None, :] | (at(q)[1] <= at(q)[0]),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", PADDING_MISSES)
def test_padding_near_misses_are_refused(name: str, dynamic: bool) -> None:
    p = torch.randint(0, 2, (2, 12))
    checker = run(lambda q, p: PADDING_MISSES[name](q, padding_rows(q, p)), p, dynamic=dynamic)
    assert checker.masks == ["mask_not_understood"]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("numbers", [False, True])
def test_padding_on_queries_and_keys(dynamic: bool, numbers: bool) -> None:
    """Real queries see real keys; whoever is padding sees nothing."""

    def mask(q: Tensor, p: Tensor) -> Tensor:
        keep = padding_rows(q, p) if numbers else padding_rows(q, p).bool()
        both = keep[:, None, :, None] * keep[:, None, None, :]
        return both.bool() & (at(q)[1] <= at(q)[0])

    p = torch.randint(0, 2, (2, 12))
    checker = run(mask, p, dynamic=dynamic)
    assert checker.masks == ["causal & document & padding"]
    assert isinstance(checker.site.mask, Mask)
    assert len(checker.site.mask.binary) == numbers


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.int64, torch.uint8, torch.int32, torch.float32]
)
def test_padding_dtypes(dtype: torch.dtype, dynamic: bool) -> None:
    p = torch.randint(0, 2, (2, 12)).to(dtype)

    def mask(q: Tensor, p: Tensor) -> Tensor:
        return (at(q)[1] <= at(q)[0]) & padding_rows(q, p).bool()[:, None, None, :]

    assert run(mask, p, dynamic=dynamic).masks == ["causal & padding"]


def test_the_padding_tensor_has_one_column_a_key() -> None:
    p = torch.randint(0, 2, (2, 20))

    def sliced(q: Tensor, p: Tensor) -> Tensor:
        return p[:, None, None, :12].bool()

    assert run(sliced, p, dynamic=False).masks == ["padding"]

    def joined(q: Tensor, p: Tensor) -> Tensor:
        return p[:, None, None, :12].bool() & (at(q)[1] <= at(q)[0])

    assert run(joined, p, dynamic=False).masks == ["causal & padding"]

    def indexed(q: Tensor, p: Tensor) -> Tensor:
        return p.bool()[torch.arange(2)[:, None, None, None], at(q)[1]] & (at(q)[1] <= at(q)[0])

    assert run(indexed, p, dynamic=False).masks == ["causal & padding"]

    def crossed(q: Tensor, p: Tensor) -> Tensor:
        return p[:, None, None].bool()[..., 1:13] & p[:, None, None].bool()[..., :12] | (
            at(q)[1] <= at(q)[0]
        )

    assert run(crossed, p, dynamic=False).masks == ["mask_not_understood"]

    def named(q: Tensor, p: Tensor) -> Tensor:
        return p[:, :12].bool()[:, None, None, :]

    assert run(named, p, dynamic=False).masks == ["padding"]


def test_padding_that_is_overwritten_before_its_use_is_refused() -> None:
    def f(x: Tensor, p: Tensor) -> Tensor:
        q = x.view(2, 12, 4, 8).transpose(1, 2)
        keys = p != 5
        mask = keys[:, None, None, :] & torch.ones(12, 12, dtype=torch.bool)
        keys.zero_()
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    checker = check(f, (torch.randn(2, 12, 32), torch.ones(2, 12)))
    assert checker.masks == ["mask_not_understood"]
    assert "in place" in refusal(checker).detail


@pytest.mark.parametrize(
    ("hides", "expected"),
    [
        (lambda q: at(q)[1] > at(q)[0], "causal"),
        (lambda q: (at(q)[1] > at(q)[0]) | (at(q)[1] <= at(q)[0] - 3), "causal & window(3)"),
        (lambda q: at(q)[1] >= at(q)[0], "causal(offset=-1)"),
        (lambda q: (at(q)[1] > at(q)[0] + 4) | (at(q)[1] <= at(q)[0] + 1), "causal(offset=4)"),
    ],
)
def test_a_finite_penalty_hides_nothing_in_a_row_without_keys(
    hides: Callable[[Tensor], Tensor], expected: str
) -> None:
    """Dense attention averages over such a row; -inf and booleans leave it at 0, as converted."""

    def additive(penalty: float) -> Callable[[Tensor], Tensor]:
        return lambda q: torch.zeros(12, 12).masked_fill(hides(q), penalty)

    finite = run(additive(-1e9), dynamic=False).masks[0]
    assert run(additive(float("-inf")), dynamic=False).masks[0].startswith(expected)
    assert finite == ("mask_not_understood" if "offset" in expected else expected)


def test_two_paddings_are_one_when_a_tensor_holds_both() -> None:
    p = torch.randint(0, 2, (2, 12))

    def both(q: Tensor, p: Tensor) -> Tensor:
        keys = (p != 0) & (p != 3)
        return keys[:, None, None, :]

    assert run(both, p, dynamic=False).masks == ["padding"]

    def separate(q: Tensor, p: Tensor) -> Tensor:
        causal = at(q)[1] <= at(q)[0]
        return ((p != 0)[:, None, None, :] & causal) & ((p != 3)[:, None, None, :] & causal)

    assert run(separate, p, dynamic=False).masks == ["mask_not_understood"]


def packed(q: Tensor, position_ids: Tensor) -> Tensor:
    """Packed-sequence detection as transformers builds it."""
    first = position_ids[:, :1] - 1
    segment = (torch.diff(position_ids, prepend=first, dim=-1) != 1).cumsum(-1)
    b = torch.arange(position_ids.shape[0])[:, None, None, None]
    i = torch.arange(q.shape[2])[None, None, :, None]
    j = torch.arange(q.shape[2])[None, None, None, :]
    return (segment[b, i] == segment[b, j]) & (j <= i)


@pytest.mark.parametrize("dynamic", [False, True])
def test_packed_sequence_detection_on_an_arange_is_always_true(dynamic: bool) -> None:
    def mask(q: Tensor) -> Tensor:
        return packed(q, torch.arange(q.shape[2]).unsqueeze(0).expand(q.shape[0], -1))

    assert run(mask, dynamic=dynamic).masks == ["causal"]


def test_a_mask_from_outside_is_refused_by_name() -> None:
    checker = run(lambda q, m: m, torch.ones(2, 1, 12, 12, dtype=torch.bool), dynamic=False)
    assert "graph input" in refusal(checker).detail


def test_an_unnamed_condition_is_told_as_it_was_understood() -> None:
    checker = run(NEAR_MISSES["dilated"])
    assert "((i -j) // 2)" in refusal(checker).detail


def test_decode_step() -> None:
    def f(q: Tensor, k: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, k)

    checker = check(f, (torch.randn(1, 2, 1, 8), torch.randn(1, 2, 9, 8)))
    assert checker.masks == ["decode_step"]


class Buffered(nn.Module):
    """Attention under a registered mask, sliced to the length as nanoGPT does."""

    def __init__(self, mask: Tensor, use: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.register_buffer("bias", mask)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        q = x.view(x.shape[0], x.shape[1], 4, 8).transpose(1, 2)
        t = x.shape[1]
        mask = self.use(self.bias[..., :t, :t])
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)


def buffered(mask: Tensor, use: Callable[[Tensor], Tensor], dynamic: bool) -> Checker:
    calls = [(torch.randn(2, t, 32),) for t in ((12, 7) if dynamic else (12,))]
    if dynamic:
        torch._dynamo.mark_dynamic(calls[0][0], 1)
    return check(Buffered(mask, use), *calls, dynamic=None if dynamic else False)


ONES = torch.ones(64, 64)
ADDITIVE = torch.full((64, 64), float("-inf")).triu(1)
BROKEN = ONES.tril().index_put((torch.tensor(5), torch.tensor(3)), torch.tensor(0.0))
BUFFERS = [
    (ONES.tril().view(1, 1, 64, 64), lambda m: m != 0, "causal"),
    (ONES.tril().view(1, 1, 64, 64), lambda m: ~(m == 0), "causal"),
    (ONES.bool().tril(), lambda m: m, "causal"),
    (ONES.triu(1).bool(), lambda m: ~m, "causal"),
    (ONES.to(torch.uint8).tril(), lambda m: m.bool(), "causal"),
    (ADDITIVE, lambda m: m, "causal"),
    (ONES.tril(2), lambda m: m > 0, "causal(offset=2)"),
    (ONES.bool().tril().triu(-4), lambda m: m, "causal & window(5)"),
    (ONES.bool().tril(3).triu(-3), lambda m: m, "window(4)"),
    (ONES.bool(), lambda m: m, "full"),
    (ONES.tril(), lambda m: m == 0, "mask_not_understood"),
    (BROKEN, lambda m: m != 0, "mask_not_understood"),
    (torch.rand(64, 64), lambda m: m > 0.5, "mask_not_understood"),
    (torch.rand(64, 64), lambda m: m, "mask_not_understood"),
]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("case", range(len(BUFFERS)))
def test_buffers_are_read_by_value(case: int, dynamic: bool) -> None:
    mask, use, expected = BUFFERS[case]
    checker = buffered(mask, use, dynamic)
    assert checker.masks == [expected]
    proven = checker.site.mask
    if isinstance(proven, Mask):
        assert [n.op for n in proven.buffers] == ["placeholder"]
        assert proven.buffers[0].meta["example_value"].shape == mask.shape


def test_a_constant_program_is_evaluated_where_no_rule_exists() -> None:
    def mask(q: Tensor) -> Tensor:
        i, j = torch.tril_indices(12, 12)
        return torch.zeros(12, 12).index_put((i, j), torch.tensor(1.0)) > 0

    assert run(mask, dynamic=False).masks == ["causal"]
    assert run(lambda q: mask(q).rot90(), dynamic=False).masks == ["mask_not_understood"]


def test_random_masks_are_never_evaluated() -> None:
    checker = run(lambda q: torch.bernoulli(torch.ones(12, 12)).bool(), dynamic=False)
    assert checker.masks == ["mask_not_understood"]


def test_in_place_writes_are_followed() -> None:
    def mask(q: Tensor) -> Tensor:
        m = torch.full((12, 12), float("-inf"))
        m.triu_(1)
        return m

    assert run(mask, dynamic=False).masks == ["causal"]


def test_a_later_write_does_not_count() -> None:
    def f(x: Tensor) -> Tensor:
        q = x.view(2, 12, 4, 8).transpose(1, 2)
        m = torch.ones(12, 12, dtype=torch.bool).tril()
        y = F.scaled_dot_product_attention(q, q, q, attn_mask=m)
        m.fill_(True)
        return y + F.scaled_dot_product_attention(q, q, q, attn_mask=m)

    assert check(f, (torch.randn(2, 12, 32),)).masks == ["causal", "full"]


@pytest.mark.parametrize("through", ["view", "row", "item", "chunk"])
def test_a_write_through_a_view_is_not_missed(through: str) -> None:
    def mask(q: Tensor) -> Tensor:
        m = torch.ones(12, 12, dtype=torch.bool).tril()
        if through == "view":
            m.view(-1).fill_(True)
        elif through == "row":
            m[0].fill_(True)
        elif through == "item":
            m[0, 5] = True
        else:
            m.chunk(2)[0].logical_not_()
        return m

    assert run(mask, dynamic=False).masks == ["mask_not_understood"]


def test_an_in_place_view_is_not_misread() -> None:
    def mask(q: Tensor) -> Tensor:
        m = torch.ones(12, 12, dtype=torch.bool).tril()
        m.unsqueeze_(0)
        return m

    assert run(mask, dynamic=False).masks in (["causal"], ["mask_not_understood"])


def test_arguments_that_no_rule_foresaw_leave_other_masks_alone() -> None:
    def f(x: Tensor, n: Tensor) -> Tensor:
        q = x.view(2, 12, 4, 8).transpose(1, 2)
        odd = torch.ones(12, 12).cumsum(dim=-1, dtype=torch.float64) > n.cumsum(axis=0)
        y = sdpa(q, q, q, attn_mask=odd)
        return sdpa(y, y, y, is_causal=True)

    checker = check(f, (torch.randn(2, 12, 32), torch.randn(12)))
    assert checker.masks == ["mask_not_understood", "causal"]


def test_one_mask_serves_many_layers() -> None:
    def f(x: Tensor) -> Tensor:
        q = x.view(2, 12, 4, 8).transpose(1, 2)
        m = torch.ones(12, 12, dtype=torch.bool).tril()
        for _ in range(5):
            q = F.scaled_dot_product_attention(q, q, q, attn_mask=m)
        return q

    sites = check(f, (torch.randn(2, 12, 32),)).sites
    assert len(sites) == 5
    assert all(site.mask is sites[0].mask for site in sites)
