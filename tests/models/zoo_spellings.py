"""Zoo: causal attention in many spellings, and the ways to share key/value heads."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, einsum, nn

from tests.models.zoo import HEAD_DIM, HEADS, WIDTH, Attention, hidden, keep_left, specimen

SCALE = 1 / math.sqrt(HEAD_DIM)


@specimen("causal")
class SdpaCausal(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@specimen("causal", "causal", "causal")
class Chained(Attention):
    """What an attention gives is the query, then the keys and values of the next one."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        k = v = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@specimen("causal")
class TrilBuffer(Attention):
    """As in small GPTs: product, scale, -inf where the buffer is zero."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t = q.size(-2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.tril[:, :, :t, :t] == 0, float("-inf"))
        return F.softmax(att, dim=-1) @ v


@specimen("causal")
class DropoutModules(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.drop, self.resid = nn.Dropout(0.1), nn.Dropout(0.1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t = q.size(-2)
        att = torch.matmul(q, k.mT) / math.sqrt(HEAD_DIM)
        att = att.masked_fill(self.tril[..., :t, :t] < 0.5, -torch.inf)
        att = self.drop(torch.softmax(att, -1))
        return self.resid(torch.matmul(att, v))


@specimen("causal")
class EinsumTriu(Attention):
    """einsum with letters, mask from ones().triu, filled with -finfo.max."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dots = einsum("b h i d, b h j d -> b h i j", q, k) * SCALE
        i, j = dots.shape[-2:]
        mask = torch.ones((i, j), device=q.device, dtype=torch.bool).triu(j - i + 1)
        dots = dots.masked_fill(mask, -torch.finfo(dots.dtype).max)
        return einsum("b h i j, b h j d -> b h i d", dots.softmax(dim=-1), v)


@specimen("causal")
class EinopsChunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(x).chunk(3, dim=-1)
        q, k, v = (rearrange(y, "b n (h d) -> b h n d", h=HEADS) for y in (q, k, v))
        sim = einsum("b h i d, b h j d -> b h i j", q * SCALE, k)
        i = torch.arange(sim.shape[-1], device=x.device)
        sim = sim.masked_fill(rearrange(i, "i -> i 1") < rearrange(i, "j -> 1 j"), -1e9)
        y = einsum("b h i j, b h j d -> b h i d", sim.softmax(-1), v)
        return self.out(rearrange(y, "b h n d -> b n (h d)"))


@specimen("causal")
class TimeFirstBmm(nn.Module):
    """Time first, heads folded into the batch, bmm, an additive mask of -inf."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        t, b, c = x.shape
        q = (self.q(x) * SCALE).contiguous().view(t, b * HEADS, HEAD_DIM).transpose(0, 1)
        k = self.k(x).contiguous().view(-1, b * HEADS, HEAD_DIM).transpose(0, 1)
        v = self.v(x).contiguous().view(-1, b * HEADS, HEAD_DIM).transpose(0, 1)
        weights = torch.bmm(q, k.transpose(1, 2))
        mask = torch.triu(torch.full((t, t), float("-inf")), 1)
        weights = weights + mask.unsqueeze(0)
        weights = F.softmax(weights, dim=-1, dtype=torch.float32).type_as(weights)
        y = torch.bmm(weights, v).transpose(0, 1).contiguous().view(t, b, c)
        return self.out(y).transpose(0, 1)


@specimen("causal")
class WhereOnSlicedBias(Attention):
    """float32 product, where on a sliced bool buffer, then divide."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q_len, k_len = q.size(-2), k.size(-2)
        mask = self.tril.bool()[:, :, k_len - q_len : k_len, :k_len]
        w = torch.matmul(q.to(torch.float32), k.to(torch.float32).transpose(-1, -2))
        value = torch.tensor(torch.finfo(w.dtype).min, dtype=w.dtype).to(w.device)
        w = torch.where(mask, w, value) / torch.tensor(math.sqrt(HEAD_DIM), dtype=w.dtype)
        return torch.matmul(nn.Softmax(dim=-1)(w).to(v.dtype), v)


@specimen("causal")
class MultiplyThenSubtract(Attention):
    """The first GPTs: w * b - 1e4 * (1 - b)."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = torch.matmul(q, k.permute(0, 1, 3, 2)) / math.sqrt(v.size(-1))
        nd, ns = w.size(-2), w.size(-1)
        b = self.tril[:, :, ns - nd : ns, :ns]
        w = w * b - 1e4 * (1 - b)
        return torch.matmul(nn.Softmax(dim=-1)(w), v)


@specimen("causal")
class ScaledBoth(Attention):
    """q and k each scaled by D ** -0.25."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = HEAD_DIM**-0.25
        att = (q * s) @ (k * s).transpose(-1, -2)
        t = att.shape[-1]
        att = att + torch.full((t, t), -1e9, device=q.device).triu(1)
        return att.softmax(-1) @ v


@specimen("causal")
class MaskBeforeDivision(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t = q.shape[-2]
        att = q @ k.transpose(-1, -2)
        att = att + torch.triu(torch.ones(t, t, device=q.device) * float("-inf"), diagonal=1)
        return torch.softmax(att / math.sqrt(HEAD_DIM), dim=-1) @ v


@specimen("causal")
class InPlace(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t = q.shape[-2]
        att = q @ k.transpose(-1, -2)
        att /= math.sqrt(HEAD_DIM)
        att.masked_fill_(~torch.ones(t, t, dtype=torch.bool).tril(), float("-inf"))
        return torch.softmax(att, dim=-1) @ v


@specimen("causal & padding")
class MaskedAgainAfterSoftmax(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        t = q.shape[-2]
        blocked = (keep[:, None, None] == 0) | torch.ones(t, t, dtype=torch.bool).triu(1)
        att = (q @ k.transpose(-1, -2) * SCALE).masked_fill(blocked, torch.finfo(q.dtype).min)
        return att.softmax(-1).masked_fill(blocked, 0.0) @ v

    @staticmethod
    def inputs(length: int) -> tuple[Tensor, ...]:
        return hidden(length), keep_left(length)


@specimen("causal")
class TypeAs(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t = q.shape[-2]
        mask = torch.full((1, 1, t, t), float("-inf"), device=q.device)
        mask = torch.triu(mask, diagonal=1).type_as(q)
        scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(HEAD_DIM)
        return torch.matmul(F.softmax((scores + mask).float(), dim=-1).type_as(q), v)


@specimen("causal")
class Baddbmm(Attention):
    """beta * mask + alpha * q k, heads in the batch."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, h, t, d = q.shape
        mask = torch.full((t, t), -1e9).triu(1).expand(b * h, t, t)
        q, k, v = (y.reshape(b * h, t, d) for y in (q, k, v))
        att = torch.baddbmm(mask, q, k.transpose(1, 2), beta=1.0, alpha=SCALE)
        return torch.bmm(att.softmax(-1), v).view(b, h, t, d)


@specimen("causal")
class BaddbmmOfEmpty(Attention):
    """beta=0: the first operand is uninitialised memory."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, h, t, d = q.shape
        q, k = (y.reshape(b * h, t, d) for y in (q, k))
        empty = torch.empty(b * h, t, t, dtype=q.dtype, device=q.device)
        att = torch.baddbmm(empty, q, k.transpose(-1, -2), beta=0, alpha=SCALE).view(b, h, t, t)
        att = att.masked_fill(self.tril[:, :, :t, :t] == 0, -10000.0)
        return att.softmax(-1) @ v


@specimen(*["causal"] * HEADS)
class HeadLoop(Attention):
    """One 3-D attention a head."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t = q.shape[-2]
        mask = torch.tril(torch.ones(t, t, device=q.device))
        heads = []
        for h in range(HEADS):
            att = q[:, h] @ k[:, h].transpose(-2, -1) * SCALE
            att = att.masked_fill(mask == 0, float("-inf"))
            heads.append(F.softmax(att, dim=-1) @ v[:, h])
        return torch.stack(heads, dim=1)


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)


@specimen("causal")
class UnbindSdpa(Packed):
    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(b, t, c))


@specimen("full")
class UnbindEncoder(Packed):
    """The vision transformer's block: scale on q, no mask."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        att = (q * SCALE) @ k.transpose(-2, -1)
        return self.out((att.softmax(dim=-1) @ v).transpose(1, 2).reshape(b, n, c))


@specimen("causal")
class HeadsLast(Packed):
    """einsum over [B, T, H, D] without a transpose."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b t (three h d) -> three b t h d", three=3, h=HEADS)
        att = torch.einsum("bthd,bshd->bhts", q, k) * SCALE
        t = x.shape[1]
        att = att + torch.triu(torch.full((t, t), -10000.0, device=x.device), 1)
        y = torch.einsum("bhts,bshd->bthd", att.softmax(-1), v)
        return self.out(rearrange(y, "b t h d -> b t (h d)"))


class Grouped(Attention):
    kv_heads = 2

    def causal(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t = q.shape[-2]
        att = (q @ k.transpose(-2, -1) * SCALE).masked_fill(self.tril[..., :t, :t] == 0, -torch.inf)
        return att.softmax(-1) @ v


@specimen("causal")
class GroupedSdpa(Grouped):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@specimen("causal")
class RepeatInterleave(Grouped):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = HEADS // self.kv_heads
        return self.causal(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))


@specimen("causal")
class ExpandReshape(Grouped):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, h, t, d = k.shape
        k, v = (
            y[:, :, None].expand(b, h, 2, t, d).reshape(b, 2 * h, t, d).contiguous() for y in (k, v)
        )
        return self.causal(q, k, v)


@specimen("causal")
class TiledRepeatSdpa(Grouped):
    """repeat puts head h at h mod Hkv: not the order of grouped attention."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (y.repeat(1, 2, 1, 1) for y in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@specimen("causal")
class TiledRepeat(Grouped):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.causal(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1))


@specimen("causal")
class EinopsRepeat(Grouped):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (repeat(y, "b h n d -> b (h g) n d", g=2) for y in (k, v))
        return self.causal(q, k, v)


@specimen("causal")
class EinopsTiled(Grouped):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (repeat(y, "b h n d -> b (g h) n d", g=2) for y in (k, v))
        return self.causal(q, k, v)


@specimen("causal")
class MixedRepeat(Grouped):
    """k interleaved, v tiled: no grouped attention has this order."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.causal(q, k.repeat_interleave(2, 1), v.repeat(1, 2, 1, 1))


@specimen("causal")
class OneHeadBroadcast(Attention):
    """Multi-query: one key head, broadcast by matmul."""

    kv_heads = 1

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t = q.shape[-2]
        att = torch.matmul(q, k.transpose(-1, -2)) * SCALE
        att = att.masked_fill(self.tril[..., :t, :t] == 0, -torch.inf)
        return torch.matmul(att.softmax(-1), v)


@specimen("causal")
class OneHeadEinsum(Attention):
    kv_heads = 1

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k[:, 0], v[:, 0]
        sim = einsum("b h i d, b j d -> b h i j", q * SCALE, k)
        t = q.shape[-2]
        mask = torch.ones((t, t), device=q.device, dtype=torch.bool).triu(1)
        att = sim.masked_fill(mask, -torch.finfo(sim.dtype).max).softmax(-1)
        return einsum("b h i j, b j d -> b h i d", att, v)


@specimen("causal")
class GroupedEinsum(Grouped):
    """Five axes: the query's heads split into groups."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = rearrange(q, "b (h g) n d -> b h g n d", h=self.kv_heads)
        att = einsum("b h g n d, b h s d -> b h g n s", q, k) * SCALE
        t = q.shape[-2]
        att = att.masked_fill(self.tril[0, 0, :t, :t] == 0, -torch.inf).softmax(-1)
        y = einsum("b h g n s, b h s d -> b h g n d", att, v)
        return rearrange(y, "b h g n d -> b (h g) n d")


@specimen("causal")
class WideValues(Attention):
    """Dv is twice D."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t = q.shape[-2]
        att = (q @ k.mT * SCALE).masked_fill(self.tril[..., :t, :t] == 0, -torch.inf)
        return sum((att.softmax(-1) @ torch.cat([v, 2 * v], -1)).chunk(2, -1))
