"""Zoo: attention inside PyTorch's own modules, flex_attention and activation checkpointing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from tests.models.zoo import HEADS, KEPT, WIDTH, Attention, hidden, keep_left, specimen
from tests.models.zoo_modifiers import alibi_slopes
from tests.models.zoo_spellings import TrilBuffer


class Multihead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)


@specimen("causal")
class MultiheadBool(Multihead):
    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]


@specimen("causal")
class MultiheadFloat(Multihead):
    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.attention(x, x, x, attn_mask=mask, need_weights=False, is_causal=True)[0]


@specimen("padding")
class MultiheadPadding(Multihead):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return self.attention(x, x, x, key_padding_mask=keep == 0, need_weights=False)[0]

    @staticmethod
    def inputs(length: int) -> tuple[Tensor, ...]:
        return hidden(length), keep_left(length)


@specimen("full")
class MultiheadCross(Multihead):
    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.attention(x, memory, memory, need_weights=False)[0]

    @staticmethod
    def inputs(length: int) -> tuple[Tensor, ...]:
        return hidden(length), hidden(length + 23)


@specimen(KEPT)
class MultiheadWeights(Multihead):
    def forward(self, x: Tensor) -> Tensor:
        y, weights = self.attention(x, x, x, need_weights=True)
        return torch.cat([y, weights], dim=-1)


@specimen(KEPT)
class MultiheadBiasKv(nn.Module):
    """Extra key and value positions: not the keys that masks speak of."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(
            WIDTH, HEADS, batch_first=True, add_bias_kv=True, add_zero_attn=True
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


@specimen("causal")
class MultiheadForward(Multihead):
    """The functional form, time first."""

    def forward(self, x: Tensor) -> Tensor:
        x, a = x.transpose(0, 1), self.attention
        mask = torch.full((x.shape[0], x.shape[0]), float("-inf")).triu(1)
        y, _ = F.multi_head_attention_forward(
            x, x, x, WIDTH, HEADS, a.in_proj_weight, a.in_proj_bias, None, None, False, 0.0,
            a.out_proj.weight, a.out_proj.bias, training=self.training, need_weights=False,
            attn_mask=mask,
        )  # fmt: skip
        return y.transpose(0, 1)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, dim_feedforward=48, dropout=0.0, batch_first=True
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@specimen("full", training=True)
class EncoderTraining(Encoder):
    pass


@specimen("full", gradients=False)
class EncoderFused(Encoder):
    """In eval mode without gradients the layer is one operator."""


@specimen("causal")
class EncoderCausal(Encoder):
    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.layer(x, src_mask=mask, is_causal=True)


@specimen("causal", "full")
class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(
            WIDTH, HEADS, dim_feedforward=48, dropout=0.0, batch_first=True
        )

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.layer(x, memory, tgt_mask=mask)

    @staticmethod
    def inputs(length: int) -> tuple[Tensor, ...]:
        return hidden(length), hidden(length + 23)


@specimen("causal", gradients=False, dynamic=False)
class FlexCausal(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def causal(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return torch.where(i >= j, score, -torch.inf)

        return flex_attention(q, k, v, score_mod=causal)


@specimen("causal & window(20)", gradients=False, dynamic=False)
class FlexBlockMask(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def window(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (i >= j) & (i - j < 20)

        t = q.shape[-2]
        mask = create_block_mask(window, None, None, t, t, device="cpu")
        return flex_attention(q, k, v, block_mask=mask)


@specimen("full + softcap(5.0)", gradients=False, dynamic=False)
class FlexSoftcap(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def cap(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return 5.0 * torch.tanh(score / 5.0)

        return flex_attention(q, k, v, score_mod=cap)


@specimen("causal + alibi", gradients=False, dynamic=False)
class FlexAlibi(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("slopes", alibi_slopes())

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        slopes = self.slopes

        def alibi(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return torch.where(i >= j, score + slopes[h] * (j - i), -torch.inf)

        return flex_attention(q, k, v, score_mod=alibi)


@specimen("causal", training=True)
class Checkpointed(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@specimen("causal & padding", training=True)
class CheckpointedMask(Attention):
    """The mask is built outside and is an operand of the checkpointed body."""

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        i = torch.arange(x.shape[1], device=x.device)
        mask = (i[None] <= i[:, None]) & keep[:, None, None].bool()
        return checkpoint(super().forward, x, mask, use_reentrant=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    @staticmethod
    def inputs(length: int) -> tuple[Tensor, ...]:
        return hidden(length), keep_left(length)


@specimen("causal", training=True)
class CheckpointedWrittenOut(TrilBuffer):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)
