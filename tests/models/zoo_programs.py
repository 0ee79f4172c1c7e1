"""Random attention programs: spelling x mask x modifier x layout x dtype, and some with a twist."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.models.zoo import CONTEXT, HEAD_DIM, HEADS, WIDTH

CHUNK, WINDOW, PREFIX, CAP = 16, 11, 7, 3.0
SPELLINGS = ("sdpa", "matmul", "einsum", "heads last", "bmm", "baddbmm")
MASKS = (
    "full", "causal", "tril", "buffer", "window", "band", "chunk", "prefix", "document",
    "causal document", "padding", "causal padding", "window padding",
)  # fmt: skip
FORMS = ("fill -inf", "fill -1e9", "fill min", "where", "add -inf", "add min", "invert", "multiply")
# What makes a program something else than it seems. "" twice as often as all others together.
TWISTS = (
    "other softmax dim", "rolled weights", "uneven cap", "mild mask", "shifted mask", "hole",
    "doubled mask", "doubled weights", "masked after softmax", "negative scale", "mixed repeat",
    "sink slice", "bias", "written scores",
)  # fmt: skip


@dataclass(frozen=True)
class Program:
    """One attention as somebody might have written it; see :class:`Written` for the meaning."""

    spelling: str = "matmul"
    mask: str = "causal"
    form: str = "fill -inf"
    modifier: str = ""
    scale: str = "multiply"
    heads: str = "own"
    packed: bool = False
    upcast: bool = False
    in_place: bool = False
    dtype: torch.dtype = torch.float32
    dynamic: bool = False
    length: int = 40
    twist: str = ""


def programs() -> st.SearchStrategy[Program]:
    """Shrinks towards written-out causal attention of float32."""
    return st.builds(
        Program,
        spelling=st.sampled_from(("matmul", *SPELLINGS)),
        mask=st.sampled_from(("causal", *MASKS)),
        form=st.sampled_from(FORMS),
        modifier=st.sampled_from(("", "", "", "cap", "alibi keys", "alibi distance", "sinks")),
        scale=st.sampled_from(("multiply", "divide", "query", "both", "tensor", "none")),
        heads=st.sampled_from(("own", "interleave", "expand", "tile", "one")),
        packed=st.booleans(),
        upcast=st.booleans(),
        in_place=st.booleans(),
        dtype=st.sampled_from((torch.float32, torch.float32, torch.bfloat16, torch.float16)),
        dynamic=st.booleans(),
        length=st.integers(18, 60),
        twist=st.sampled_from(("",) * (2 * len(TWISTS)) + TWISTS),
    )


class Written(nn.Module):
    """The module that a :class:`Program` describes: x [B, T, WIDTH], keep and ids [B, T]."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = p = program
        self.kv_heads = {"own": HEADS, "one": 1}.get(p.heads, 2)
        kv = self.kv_heads * HEAD_DIM
        self.sizes = (WIDTH, kv, kv)
        if p.packed:
            self.qkv = nn.Linear(WIDTH, sum(self.sizes))
        else:
            self.projections = nn.ModuleList(nn.Linear(WIDTH, size) for size in self.sizes)
        self.sinks = nn.Parameter(torch.linspace(-1, 2, HEADS))
        self.register_buffer("tril", torch.ones(CONTEXT, CONTEXT).tril().bool())
        self.register_buffer("slopes", (0.5 ** torch.arange(1, HEADS + 1)).view(HEADS, 1, 1))

    def forward(self, x: Tensor, keep: Tensor, ids: Tensor) -> Tensor:
        b, t, _ = x.shape
        parts = (
            self.qkv(x).split(self.sizes, -1) if self.program.packed
            else [projection(x) for projection in self.projections]
        )  # fmt: skip
        q, k, v = (part.view(b, t, -1, HEAD_DIM).transpose(1, 2) for part in parts)
        allowed = self.allowed(x, keep, ids)
        if self.program.spelling == "sdpa":
            y = self.sdpa(q, self.repeated(k, "k"), self.repeated(v, "v"), allowed)
        else:
            y = self.written_out(q, self.repeated(k, "k"), self.repeated(v, "v"), allowed)
        return y.transpose(1, 2).reshape(b, t, WIDTH)

    # Masks and heads

    def allowed(self, x: Tensor, keep: Tensor, ids: Tensor) -> Tensor | None:
        """Bool, broadcastable to [B, H, T, T]; None is full."""
        p, t = self.program, x.shape[1]
        i = torch.arange(t, device=x.device)[:, None]
        j = i.T
        shift = int(p.twist == "shifted mask")
        past, near = j <= i + shift, i - j < WINDOW
        valid, same = keep[:, None, None].bool(), (ids[:, :, None] == ids[:, None])[:, None]
        masks = {
            "causal": lambda: past,
            "tril": lambda: torch.ones(t, t, dtype=torch.bool, device=x.device).tril(shift),
            "buffer": lambda: self.tril[:t, :t],
            "window": lambda: past & near,
            "band": lambda: (i - j).abs() < WINDOW,
            "chunk": lambda: past & (i // CHUNK == j // CHUNK),
            "prefix": lambda: past | (j < PREFIX),
            "document": lambda: same,
            "causal document": lambda: past & same,
            "padding": lambda: valid,
            "causal padding": lambda: past & valid,
            "window padding": lambda: past & near & valid,
        }
        if p.mask == "full":
            return None
        mask = masks[p.mask]()
        return mask & ((i != 15) | (j != 2)) if p.twist == "hole" else mask

    def repeated(self, y: Tensor, which: str) -> Tensor:
        """k or v with as many heads as q has."""
        how, group = self.program.heads, HEADS // self.kv_heads
        if self.program.twist == "mixed repeat" and which == "v" and self.kv_heads == 2:
            how = "tile" if how == "interleave" else "interleave"
        b, h, t, d = y.shape
        if how == "interleave":
            return y.repeat_interleave(group, 1)
        if how == "expand":
            return y[:, :, None].expand(b, h, group, t, d).reshape(b, h * group, t, d)
        if how == "tile":
            return y.repeat(1, group, 1, 1)
        return y.expand(b, HEADS, t, d) if how == "one" else y

    # Spellings

    def sdpa(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> Tensor:
        p = self.program
        scale = {"none": None, "query": 0.5, "both": 1.0}.get(p.scale, 0.3)
        mask = allowed
        if allowed is not None and p.form.startswith(("add", "invert", "multiply")):
            mask = self.additive(allowed, q)
        if p.mask == "causal" and p.form == "where" and p.twist in ("", "mixed repeat"):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)

    def written_out(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> Tensor:
        p = self.program
        scores = self.modified(self.scores(*self.prescaled(q, k)))
        if allowed is not None:
            scores = self.masked(scores, allowed)
        scores = self.twisted(scores)
        weights = self.weights(scores, v)
        if p.twist == "doubled weights":
            weights = weights * 2
        if p.twist == "rolled weights":
            weights = weights.roll(1, -1)
        if p.twist == "masked after softmax":
            weights = weights.masked_fill(~self.tril[: q.shape[2], : q.shape[2]], 0)
        return self.product(weights, v)

    def prescaled(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.program.scale == "query":
            return q * 0.3, k
        if self.program.scale == "both":
            return q * math.sqrt(0.3), k * math.sqrt(0.3)
        return q, k

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        p, (b, h, t, d) = self.program, q.shape
        if p.spelling == "baddbmm":
            q, k = (y.reshape(b * h, t, d) for y in (q, k))
            empty = torch.empty(b * h, t, t, dtype=q.dtype, device=q.device)
            alpha = 0.3 if p.scale in ("multiply", "divide", "tensor") else 1.0
            scores = torch.baddbmm(empty, q, k.transpose(1, 2), beta=0.0, alpha=alpha)
            return scores.view(b, h, t, t)
        return self.scaled(self.plain_scores(q, k))

    def plain_scores(self, q: Tensor, k: Tensor) -> Tensor:
        p, (b, h, t, d) = self.program, q.shape
        if p.spelling == "einsum":
            return torch.einsum("bhid,bhjd->bhij", q, k)
        if p.spelling == "heads last":
            return torch.einsum("bthd,bshd->bhts", q.transpose(1, 2), k.transpose(1, 2))
        if p.spelling == "bmm":
            q, k = (y.reshape(b * h, t, d) for y in (q, k))
            return torch.bmm(q, k.transpose(1, 2)).view(b, h, t, t)
        return q @ k.transpose(-1, -2)

    def scaled(self, scores: Tensor) -> Tensor:
        p = self.program
        if p.scale == "tensor":
            return scores / torch.full([], 3.0, dtype=scores.dtype, device=scores.device)
        factor = {"multiply": 0.3, "divide": 1 / 3.0}.get(p.scale, 1.0)
        factor = -factor if p.twist == "negative scale" else factor
        if factor == 1.0:
            return scores
        if p.in_place:
            scores *= factor
            return scores
        return scores / 3.0 if p.scale == "divide" and factor > 0 else scores * factor

    def modified(self, scores: Tensor) -> Tensor:
        p, t = self.program, scores.shape[-1]
        if p.modifier == "cap":
            other = 2 * CAP if p.twist == "uneven cap" else CAP
            return torch.tanh(scores / CAP) * other
        j = torch.arange(t, device=scores.device)
        if p.modifier == "alibi keys":
            return scores + (self.slopes * j).to(scores.dtype)
        if p.modifier == "alibi distance":
            return scores + (self.slopes * (j[None] - j[:, None])).to(scores.dtype)
        return scores

    def additive(self, allowed: Tensor, like: Tensor) -> Tensor:
        p = self.program
        least = -3.0 if p.twist == "mild mask" else torch.finfo(like.dtype).min
        if p.form == "add -inf":
            bias = torch.zeros_like(allowed, dtype=like.dtype)
            return bias.masked_fill(~allowed, -torch.inf)
        if p.form == "invert":
            return (1.0 - allowed.to(like.dtype)) * (-1e4 if p.twist != "mild mask" else least)
        return torch.where(allowed, 0.0, least).to(like.dtype)

    def masked(self, scores: Tensor, allowed: Tensor) -> Tensor:
        p = self.program
        least = torch.finfo(scores.dtype).min
        value = {"fill -inf": -torch.inf, "fill -1e9": max(-1e9, least)}.get(p.form, least)
        value = -3.0 if p.twist == "mild mask" else value
        if p.form.startswith("fill"):
            if p.in_place:
                return scores.masked_fill_(~allowed, value)
            return scores.masked_fill(allowed.logical_not(), value)
        if p.form == "where":
            return torch.where(allowed, scores, value)
        if p.form == "multiply":
            keep = allowed.to(scores.dtype)
            return scores * keep - 1e4 * (1 - keep)
        bias = self.additive(allowed, scores)
        return scores + bias + bias if p.twist == "doubled mask" else scores + bias

    def twisted(self, scores: Tensor) -> Tensor:
        p = self.program
        if p.twist == "bias":
            return scores + self.sinks.to(scores.dtype).view(1, HEADS, 1, 1) * scores.detach().sin()
        if p.twist == "written scores":
            scores = scores.clone()
            scores[..., 1] = 0.5
        return scores

    def weights(self, scores: Tensor, v: Tensor) -> Tensor:
        p = self.program
        dim = -2 if p.twist == "other softmax dim" else -1
        if p.modifier == "sinks":
            b, _, t, _ = scores.shape
            sinks = self.sinks.to(scores.dtype).view(1, HEADS, 1, 1).expand(b, HEADS, t, 1)
            both = torch.cat([scores, sinks], -1)
            both = both.softmax(dim)
            return both[..., 1:] if p.twist == "sink slice" else both[..., :-1]
        if p.upcast:
            return F.softmax(scores, dim=dim, dtype=torch.float32).to(v.dtype)
        return scores.softmax(dim)

    def product(self, weights: Tensor, v: Tensor) -> Tensor:
        p, (b, h, t, d) = self.program, v.shape
        if p.spelling == "einsum":
            return torch.einsum("bhij,bhjd->bhid", weights, v)
        if p.spelling == "heads last":
            return torch.einsum("bhts,bshd->bthd", weights, v.transpose(1, 2)).transpose(1, 2)
        if p.spelling in ("bmm", "baddbmm"):
            y = torch.bmm(weights.reshape(b * h, t, t), v.reshape(b * h, t, d))
            return y.view(b, h, t, d)
        return weights @ v
