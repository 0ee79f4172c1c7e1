"""Native Sparse Attention with learned parts, block by block with explicit matrices."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nsa_compile.kernels.attend import reference as attend
from nsa_compile.kernels.compressed.reference import compressed_attention as compressed_lse
from nsa_compile.kernels.compressed.reference import visible
from nsa_compile.kernels.importance import reference as importance
from nsa_compile.kernels.scaled import reference as scaled
from nsa_compile.kernels.select import reference as select
from nsa_compile.nn import NSAParameters
from tests.kernels.test_select_blocks import assert_best


def compress(kind: str, module: nn.Module | None, x: Tensor, real: Tensor) -> Tensor:
    """One block of one head: tokens x [l, D], real [l, 1] bool -> [D]."""
    if not real.any() and kind in ("mean", "weighted", "attention"):
        return torch.zeros_like(x[0])
    x = x * real
    if kind == "mean":
        return x.sum(0) / real.sum()
    assert module is not None
    w = {name: p for name, p in module.named_parameters()}
    if kind == "weighted":
        return (w["logits"][:, None].masked_fill(~real, -torch.inf).softmax(0) * x).sum(0)
    if kind == "attention":
        return ((x @ w["weight"]).masked_fill(~real, -torch.inf).softmax(0) * x).sum(0)
    if kind == "conv":
        return (w["weight"] * x).sum(0) + w["bias"][0]
    if kind == "linear":
        return sum(x[i] @ w["weight"][i] for i in range(len(x))) + w["bias"][0]
    x = (x + w["positions"]) * real
    flat = w["weight_in"].flatten(0, 1)
    return F.relu(x.flatten() @ flat + w["bias_in"][0]) @ w["weight_out"] + w["bias_out"][0]


class _Head(nn.Module):
    """The parameters of one head of a compression."""

    def __init__(self, module: nn.Module, head: int) -> None:
        super().__init__()
        self.held = {name: p[head] for name, p in module.named_parameters()}

    def named_parameters(self):  # type: ignore[no-untyped-def]
        return self.held.items()


def compressed(own: NSAParameters, module: nn.Module | None, x: Tensor, valid: Tensor) -> Tensor:
    """[B, Hkv, T, D] -> [B, Hkv, Nc, D]."""
    config, length = own.config, x.shape[2]
    starts = range(0, length - config.compress_block + 1, config.compress_stride)
    if not starts:
        return x[:, :, :0]
    rows = [
        compress(
            config.compression, module and _Head(module, h), x[b, h, s : s + config.compress_block],
            valid[b, s : s + config.compress_block, None],
        )
        for b in range(x.shape[0]) for h in range(x.shape[1]) for s in starts
    ]  # fmt: skip
    return torch.stack(rows).view(*x.shape[:2], len(starts), x.shape[3])


def attention(
    own: NSAParameters, hidden: Tensor, q: Tensor, k: Tensor, v: Tensor, causal: bool = True,
    valid: Tensor | None = None, scale: float | None = None, offset: int = 0,
) -> Tensor:  # fmt: skip
    """The gated branches [B, Hq, Tq, Dv] for hidden states [B, Tq, C]."""
    config, (batch, heads, q_len, dim), kv_len = own.config, q.shape, k.shape[2]
    scale = dim**-0.5 if scale is None else scale
    real = torch.ones(batch, kv_len, dtype=torch.bool) if valid is None else valid
    logits = F.linear(hidden, own.gate.weight, own.gate.bias)
    gates = logits.sigmoid().view(batch, q_len, heads, 3).transpose(1, 2)
    k_cmp = compressed(own, own.compress_k, k, real)
    v_cmp = compressed(own, own.compress_v, v, real)
    o_cmp = _compressed_branch(own, q, k_cmp, v_cmp, real, causal, scale, offset)
    terms, mask = (valid, None, None, None, None, None), (scale, 0.0, causal, offset)
    o_slc = _selected_branch(own, q, k, v, k_cmp, terms, mask)
    whole, tiling = torch.zeros(batch, k.shape[1], 1, 1, dtype=torch.int32), (q_len, kv_len)
    o_win, _ = attend.selected_attention(q, k, v, whole, *terms, *mask, config.window, *tiling)
    return (torch.stack((o_cmp, o_slc, o_win), -1) * gates[..., None, :]).sum(-1)


def _selected_branch(
    own: NSAParameters, q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor,
    terms: tuple[Tensor | None, ...], mask: tuple[float, float, bool, int],
) -> Tensor:  # fmt: skip
    """One softmax over the blocks that the group chose, or the query head for itself."""
    config = own.config
    if not config.num_selected:
        return q.new_zeros(*q.shape[:3], v.shape[3])
    if not config.share_selection:
        group = q.shape[1] // k.shape[1]
        k, v, k_cmp = (x.repeat_interleave(group, 1) for x in (k, v, k_cmp))
    sizes = (config.query_tile, config.select_block)
    forced = (config.init_blocks, config.local_window())
    scoring = (config.compress_block, config.compress_stride)
    with torch.no_grad():
        blocks = torch.ops.nsa.select_blocks(
            q, k, k_cmp, *terms, "mean", *mask, None, *sizes, config.num_selected, *forced,
            *scoring, 0, None, config.importance,
        )  # fmt: skip
        blocks = blocks.unflatten(2, (-1, config.num_selected))
        # Blocks inside one compressed block may be equally good: any of the best will do.
        assert_best(
            blocks,
            select.ranked_scores(
                q, k, k_cmp, *terms, "mean", *mask, None, *sizes, *forced, *scoring,
                config.importance,
            ),
            1e-9,
        )  # fmt: skip
    if not config.sel_scale:
        return attend.selected_attention(q, k, v, blocks, *terms, *mask, None, *sizes)[0]
    scale, _, causal, offset = mask
    logits = (terms[0], None, scale, causal, offset, *scoring)
    lse = compressed_lse(q, k_cmp, k_cmp, *logits)[1]
    scales = importance.selection_scale(
        q, k_cmp, lse, blocks, *logits, k.shape[2], *sizes, *forced, config.importance
    )
    site = (*terms[:4], scale, causal, offset, None)
    return scaled.scaled_attention(q, k, v, blocks, scales, *site, *sizes)[0]


def _compressed_branch(
    own: NSAParameters, q: Tensor, k: Tensor, v: Tensor, valid: Tensor, causal: bool, scale: float,
    offset: int,
) -> Tensor:  # fmt: skip
    """One softmax over memory and the compressed blocks that a query sees."""
    sizes = (own.config.compress_block, own.config.compress_stride)
    seen = visible(q.shape[2], k.shape[2], valid, None, causal, offset, *sizes)[:, None]
    seen = seen.expand(q.shape[0], 1, -1, -1)
    if own.memory_k is not None and own.memory_v is not None:
        batch, count = q.shape[0], own.memory_k.shape[1]
        k = torch.cat((own.memory_k.expand(batch, -1, -1, -1), k), 2)
        v = torch.cat((own.memory_v.expand(batch, -1, -1, -1), v), 2)
        seen = F.pad(seen, (count, 0), value=True)
    group = q.shape[1] // k.shape[1]
    scores = scale * q @ k.repeat_interleave(group, 1).transpose(-1, -2)
    alive = seen.any(-1, keepdim=True)
    weights = scores.masked_fill(~seen, -torch.inf).where(alive, 0.0).softmax(-1).where(alive, 0.0)
    return weights @ v.repeat_interleave(group, 1)


def assert_equal_with_gradients(
    own: NSAParameters, given: list[Tensor], out: Tensor, exact: Tensor
) -> tuple[Tensor, ...]:
    """``out`` equals ``exact``, as do the gradients of inputs and parameters; these."""
    torch.testing.assert_close(out, exact)
    wanted, weights = [*given, *own.parameters()], torch.randn_like(exact)
    grads, true = (
        torch.autograd.grad((x * weights).sum(), wanted, allow_unused=True, materialize_grads=True)
        for x in (out, exact)
    )
    names = ["hidden", "q", "k", "v", *(name for name, _ in own.named_parameters())]
    for name, grad, other in zip(names, grads, true, strict=True):
        torch.testing.assert_close(grad, other, msg=lambda text, name=name: f"d {name}: {text}")
    return grads
