"""Repeated key/value heads are undone in every spelling, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from tests.passes.checking import Checker, check

Tensor = torch.Tensor
Repeat = Callable[[Tensor, int], Tensor]


def none_expand_reshape(x: Tensor, g: int) -> Tensor:
    b, h, t, d = x.shape
    return x[:, :, None, :, :].expand(b, h, g, t, d).reshape(b, h * g, t, d)


def repeat_interleave(x: Tensor, g: int) -> Tensor:
    return x.repeat_interleave(g, dim=1)


def function_repeat_interleave(x: Tensor, g: int) -> Tensor:
    return torch.repeat_interleave(x, repeats=g, dim=-3)


def unsqueeze_expand_flatten(x: Tensor, g: int) -> Tensor:
    return x.unsqueeze(2).expand(-1, -1, g, -1, -1).flatten(1, 2)


def repeat_view_contiguous(x: Tensor, g: int) -> Tensor:
    b, h, t, d = x.shape
    return x.unsqueeze(2).repeat(1, 1, g, 1, 1).view(b, h * g, t, d).contiguous()


def broadcast_to_reshape(x: Tensor, g: int) -> Tensor:
    b, h, t, d = x.shape
    return torch.broadcast_to(x[:, :, None], (b, h, g, t, d)).reshape(b, -1, t, d)


def tiled_repeat(x: Tensor, g: int) -> Tensor:
    return x.repeat(1, g, 1, 1)


def expand_in_front(x: Tensor, g: int) -> Tensor:
    b, h, t, d = x.shape
    return x[:, None].expand(b, g, h, t, d).reshape(b, h * g, t, d)


def repeat_tokens(x: Tensor, g: int) -> Tensor:
    b, h, t, d = x.shape
    return x[:, :, :, None].expand(b, h, t, g, d).reshape(b, h * g, t, d)


def shifted(x: Tensor, g: int) -> Tensor:
    return x.repeat_interleave(g, dim=1).flip(1)


UNDONE = (
    none_expand_reshape,
    repeat_interleave,
    function_repeat_interleave,
    unsqueeze_expand_flatten,
    repeat_view_contiguous,
    broadcast_to_reshape,
    tiled_repeat,
    expand_in_front,
)
KEPT = (repeat_tokens, shifted)


def gqa(repeat_k: Repeat, repeat_v: Repeat, dynamic: bool, g: int = 3, **kw: bool) -> Checker:
    def f(x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = x[..., : 6 * 8].view(b, t, 6, 8).transpose(1, 2)
        k = x[..., : 2 * 8].view(b, t, 2, 8).transpose(1, 2)
        v = x[..., 8 : 3 * 8].view(b, t, 2, 8).transpose(1, 2)
        return F.scaled_dot_product_attention(
            q, repeat_k(k, g), repeat_v(v, g), is_causal=True, **kw
        )

    x = torch.randn(2, 10, 48)
    if dynamic:
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(x, 1)
    return check(f, (x,), dynamic=None if dynamic else False)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("repeat", UNDONE)
def test_repetition_is_undone(repeat: Repeat, dynamic: bool) -> None:
    site = gqa(repeat, repeat, dynamic).site
    assert (site.q_heads, site.kv_heads) == (6, 2)
    assert site.key.meta["example_value"].shape[1] == 2
    assert site.value.meta["example_value"].shape[1] == 2


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("repeat", KEPT)
def test_other_head_orders_are_left(repeat: Repeat, dynamic: bool) -> None:
    site = gqa(repeat, repeat, dynamic).site
    assert (site.q_heads, site.kv_heads) == (6, 6)


def test_two_spellings_are_undone_independently() -> None:
    assert gqa(repeat_interleave, none_expand_reshape, True).site.kv_heads == 2


def test_keys_and_values_that_disagree_are_left() -> None:
    site = gqa(repeat_interleave, tiled_repeat, False).site
    assert (site.kv_heads, site.batch) == (6, 2)
    assert site.key.target == "repeat_interleave"


def test_enable_gqa_needs_nothing() -> None:
    site = gqa(lambda x, g: x, lambda x, g: x, True, enable_gqa=True).site
    assert (site.q_heads, site.kv_heads) == (6, 2)


def test_one_head_is_broadcast() -> None:
    def f(q: Tensor, k: Tensor) -> Tensor:
        k = k.expand(-1, 4, -1, -1)
        return F.scaled_dot_product_attention(q, k, k)

    site = check(f, (torch.randn(2, 4, 7, 8), torch.randn(2, 1, 7, 8))).site
    assert (site.q_heads, site.kv_heads) == (4, 1)


def test_keys_written_after_their_repetition_are_left() -> None:
    def f(x: Tensor) -> Tensor:
        k = x[:, :2] * 2
        repeated = k.repeat_interleave(2, 1)
        k.zero_()
        return F.scaled_dot_product_attention(x, repeated, repeated)

    site = check(f, (torch.randn(2, 4, 7, 8),)).site
    assert site.kv_heads == 4
