"""Every spelling of one attention is read the same, and what is read is what it computes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.passes.match_checking import Matched, match

B, H, T, D = 2, 4, 11, 8
SCALE = D**-0.5
Spelling = Callable[[Tensor, Tensor, Tensor], Tensor]


def heads(x: Tensor) -> Tensor:
    """[B, T, H * D] -> [B, H, T, D]."""
    return x.view(x.shape[0], x.shape[1], -1, D).transpose(1, 2)


def future(x: Tensor) -> Tensor:
    t = x.shape[1]
    return torch.ones(t, t, dtype=torch.bool).triu(1)


def penalty(x: Tensor) -> Tensor:
    return torch.zeros(x.shape[1], x.shape[1]).masked_fill(future(x), torch.finfo(x.dtype).min)


def flat(x: Tensor) -> Tensor:
    """[B, T, H * D] -> [B * H, T, D]."""
    b, t, _ = x.shape
    return x.view(b, t, H, D).permute(0, 2, 1, 3).reshape(b * H, t, D)


def unflat(x: Tensor) -> Tensor:
    return x.view(-1, H, x.shape[1], D)


def scale_add_cast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a = torch.matmul(heads(q), heads(k).transpose(2, 3)) * SCALE + penalty(q)
    a = F.softmax(a, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(F.dropout(a, 0.1, training=False), heads(v))


def divide_masked_fill(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a = heads(q) @ heads(k).mT / math.sqrt(D)
    return a.masked_fill(future(q), float("-inf")).softmax(-1) @ heads(v)


def divide_by_a_tensor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a = heads(q) @ heads(k).mT / torch.sqrt(torch.tensor(float(D)))
    return a.masked_fill(future(q), -1e9).softmax(-1) @ heads(v)


def mask_before_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((heads(q) @ heads(k).mT + penalty(q)) * SCALE).softmax(-1) @ heads(v)


def where_full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a = heads(q) @ heads(k).mT * SCALE
    a = torch.where(~future(q), a, torch.full([], torch.finfo(a.dtype).min, dtype=a.dtype))
    return a.softmax(-1) @ heads(v)


def multiply_then_subtract(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b = (~future(q)).to(q.dtype)
    a = heads(q) @ heads(k).mT * SCALE
    return (a * b - 1e4 * (1 - b)).softmax(-1) @ heads(v)


def in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a = heads(q) @ heads(k).mT
    a /= math.sqrt(D)
    a.masked_fill_(future(q), float("-inf"))
    return a.softmax(-1) @ heads(v)


def floor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a = heads(q) @ heads(k).mT * SCALE + penalty(q)
    return torch.max(a, torch.tensor(torch.finfo(a.dtype).min)).softmax(-1) @ heads(v)


def scaled_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (heads(q * SCALE) @ heads(k).mT + penalty(q)).softmax(-1) @ heads(v)


def both_scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a = (heads(q) * D**-0.25) @ (heads(k) * D**-0.25).mT
    return (a + penalty(q)).softmax(-1) @ heads(v)


def batched_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a = torch.bmm(flat(q), flat(k).transpose(1, 2)) * SCALE + penalty(q)
    return unflat(torch.bmm(a.softmax(-1), flat(v)))


def baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, t, _ = q.shape
    zeros = penalty(q).expand(b * H, t, t)
    a = torch.baddbmm(zeros, flat(q), flat(k).transpose(1, 2), beta=1.0, alpha=SCALE)
    return torch.bmm(a.view(b, H, t, t).softmax(-1).view(b * H, t, t), flat(v)).view(b, H, t, D)


def einsum_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a = torch.einsum("bhid,bhjd->bhij", heads(q), heads(k)) * SCALE + penalty(q)
    return torch.einsum("bhij,bhjd->bhid", a.softmax(-1), heads(v))


def einsum_tokens(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.view(*x.shape[:2], H, D) for x in (q, k, v))
    a = torch.einsum("bthd,bshd->bhts", q, k) * SCALE
    a = a.masked_fill(torch.ones(a.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
    return torch.einsum("bhts,bshd->bthd", a.softmax(-1), v).transpose(1, 2)


def einsum_keys_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores [B, S, T, H], softmax over dim 1."""
    q, k, v = (x.view(*x.shape[:2], H, D) for x in (q, k, v))
    a = torch.einsum("...thd,...shd->...sth", q, k) * SCALE
    hidden = torch.ones(a.shape[1:3], dtype=torch.bool).tril(-1)
    a = a.masked_fill(hidden[None, :, :, None], float("-inf"))
    return torch.einsum("bsth,bshd->bhtd", a.softmax(1), v)


def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, t, _ = q.shape
    qkv = torch.cat([q, k, v], -1).view(b, t, 3, H, D).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    a = (q @ k.transpose(-2, -1)) * SCALE + penalty(q[:, 0])
    return a.softmax(-1) @ v


def linear_form(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One sequence, one head: x @ weight.T with activations for a weight."""
    a = F.linear(q[0, :, :D] * SCALE, k[0, :, :D]) + penalty(q)
    return (a.softmax(-1) @ v[0, :, :D])[None, None]


def maximum_subtracted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a = heads(q) @ heads(k).mT * SCALE + penalty(q)
    return (a - a.max(dim=-1, keepdim=True).values).softmax(-1) @ heads(v)


def masked_again(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a = (heads(q) @ heads(k).mT * SCALE).masked_fill(future(q), torch.finfo(q.dtype).min)
    return a.softmax(-1).masked_fill(future(q), 0.0) @ heads(v)


def half_precision(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (heads(x).bfloat16() for x in (q, k, v))
    a = q.float() @ k.float().mT * SCALE + penalty(q[:, 0].float())
    return (a.softmax(-1).type_as(v) @ v).float()


SPELLINGS = (
    scale_add_cast, divide_masked_fill, divide_by_a_tensor, mask_before_scale, where_full,
    multiply_then_subtract, in_place, floor, scaled_query, both_scaled, batched_products, baddbmm,
    einsum_heads, einsum_tokens, einsum_keys_first, packed, maximum_subtracted, masked_again,
    half_precision,
)  # fmt: skip


def inputs(width: int = H * D) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(B, T, width) for _ in range(3))


def matched(spelling: Spelling, dynamic: bool = False) -> Matched:
    arguments = inputs()
    if dynamic:
        for tensor in arguments:
            torch._dynamo.mark_dynamic(tensor, 0)
            torch._dynamo.mark_dynamic(tensor, 1)
    return match(spelling, arguments, dynamic=None if dynamic else False)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_of_one_attention(spelling: Spelling, dynamic: bool) -> None:
    found = matched(spelling, dynamic)
    site = found.site
    assert found.masks == ["causal"], site.mask
    assert (site.q_heads, site.kv_heads, site.head_dim, site.value_dim) == (H, H, D, D)
    assert found.checked == 1


def test_a_linear_layer_of_two_activations() -> None:
    found = matched(linear_form)
    assert found.masks == ["causal"]
    assert (found.checked, found.site.head_dim) == (1, D)


def softcapped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a = heads(q) @ heads(k).mT * SCALE
    a = torch.tanh(a / 5.0) * 5.0 + penalty(q)
    return a.softmax(-1) @ heads(v)


def sinks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a = heads(q) @ heads(k).mT * SCALE + penalty(q)
    sink = v[0, 0, :H].reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[1], -1)
    a = torch.cat([a, sink], dim=-1)
    a = a - a.max(dim=-1, keepdim=True).values
    return F.softmax(a, dim=-1)[..., :-1] @ heads(v)


def sinks_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a = heads(q) @ heads(k).mT * SCALE
    sink = v[0, 0, :H].view(1, H, 1, 1).expand(q.shape[0], H, q.shape[1], 1)
    return torch.cat([sink, a], dim=-1).softmax(-1)[..., 1:] @ heads(v)


def scale_of_each_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a = heads(q) @ heads(k).mT * v[0, 0, :H].view(H, 1, 1)
    return (a + penalty(q)).softmax(-1) @ heads(v)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("spelling", "mask", "modifiers"),
    [
        (softcapped, "causal", "softcap(5.0)"),
        (sinks, "causal", "sinks"),
        (sinks_first, "full", "sinks"),
        (scale_of_each_head, "causal", ""),
    ],
)
def test_modifiers(spelling: Spelling, mask: str, modifiers: str, dynamic: bool) -> None:
    found = matched(spelling, dynamic)
    assert found.masks == [mask], found.site.mask
    assert found.site.modifiers.describe() == modifiers
    assert found.checked == 1


def test_each_head_of_a_loop_is_an_attention() -> None:
    def loop(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = []
        for h in range(H):
            part = slice(h * D, (h + 1) * D)
            a = q[..., part] @ k[..., part].mT * SCALE + penalty(q)
            out.append(a.softmax(-1) @ v[..., part])
        return torch.cat(out, -1)

    found = matched(loop)
    assert found.masks == ["causal"] * H
    assert found.checked == H


def test_scale_that_only_the_run_knows() -> None:
    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = 0.3

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return (heads(q) @ heads(k).mT * self.scale).softmax(-1) @ heads(v)

    arguments = inputs()
    for tensor in arguments:
        torch._dynamo.mark_static(tensor, 2)
    found = match(Scaled(), arguments, dynamic=True)
    assert isinstance(found.site.scale, torch.fx.Node)
    assert (found.masks, found.checked) == (["full"], 1)


def test_dropout_of_weights_is_read() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        a = (heads(q) @ heads(k).mT * SCALE).softmax(-1)
        return F.dropout(a, 0.25, training=True) @ heads(v)

    torch._dynamo.reset()
    found = Matched()
    torch.compile(f, backend=lambda gm, inputs: (found(gm, inputs), gm.forward)[1])(*inputs())
    assert found.site.dropout == 0.25


def test_aten_program() -> None:
    """A torch.export program, as it is and decomposed."""

    class Eager(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return divide_masked_fill(q, k, v)

    class Fused(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(heads(q), heads(k), heads(v), is_causal=True)

    from nsa_compile.passes.match import find_sites
    from tests.passes.checking import verdict

    for module in (Eager(), Fused()):
        program = torch.export.export(module, inputs())
        for each in (program, program.run_decompositions()):
            (site,) = find_sites(each.graph_module)
            assert (verdict(site), site.q_heads) == ("causal", H)
            scales = [1.0] if site.scale == 1.0 else [pytest.approx(SCALE)]
            assert site.scale in scales
