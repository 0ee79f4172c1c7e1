"""Products of queries and keys in 16 bits, for CPUs whose matrix units are fastest at those.

Logits that only rank blocks need no more. Three things keep the rounding small. Keys are centred:
what that takes from all logits of a row, its softmax does not see. Both sides are scaled to fill
float16's range without leaving it. And a product is rounded once: the units sum in float32.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from nsa_compile.kernels.modifiers import Modifiers

# Fewer logits than this are computed before anything has been converted.
_LEAST_LOGITS = 1 << 24
# No sum of scaled products may pass float16's 65504, roundings included.
_ROOM = 60000.0


@functools.cache
def half_dtype() -> torch.dtype | None:
    """The most precise 16-bit dtype that matrix units of this CPU multiply, None without such.

    With vector units alone a 16-bit product is slower than one in float32, or hardly faster.
    """
    if not torch.backends.mkldnn.is_available():
        return None
    if torch.cpu._is_amx_tile_supported():
        return torch.float16 if torch.cpu._is_amx_fp16_supported() else torch.bfloat16
    return None


def score_dtype(wide: torch.dtype, modifiers: Modifiers, logits: int) -> torch.dtype:
    """What to multiply in: ``wide`` unless 16 bits pay and suffice.

    ALiBi's slopes need more digits.
    """
    half = half_dtype()
    if half is None or wide == torch.float64 or modifiers.slopes is not None:
        return wide
    return half if logits >= _LEAST_LOGITS else wide


def narrow_pair(
    queries: Tensor, keys: Tensor, valid: Tensor | None, scale: float, modifiers: Modifiers,
    rows: Tensor, columns: Tensor,
) -> float:  # fmt: skip
    """Narrow queries [G, Tq, r] to ``rows`` and keys [Tk, r] to ``columns``, 16 bits each.

    Times what is returned, their products are ``scale * q . k``, up to a number for each row.
    """
    room = math.sqrt(_ROOM / keys.shape[1])
    factor = _narrow(queries, None, False, math.copysign(room, scale), rows)
    # A cap looks at the size of the logits, and no model has one whose logits are large.
    factor *= _narrow(keys, valid, not modifiers.softcap, room, columns)
    return scale / factor


def _narrow(x: Tensor, valid: Tensor | None, centred: bool, room: float, out: Tensor) -> float:
    """Write x [..., r], scaled to entries of at most ``room``, to 16-bit ``out``; its factor.

    A negative ``room`` turns all signs. ``centred`` takes the mean of the valid ones from all
    entries first. What is not finite becomes 0: it would leave no scale for the others.
    """
    low, high = x.aminmax()
    if not bool((high - low).isfinite()):
        x = x.nan_to_num(0.0, 0.0, 0.0)
        low, high = x.aminmax()
    if not centred:
        factor = _ratio(room, max(-low.item(), high.item()))
        torch.mul(x, factor, out=out)
        return factor
    factor = _ratio(room, (high - low).item())  # The mean lies between the two.
    mean = x.mean(dim=0) if valid is None else valid.to(x.dtype) @ x / valid.sum().clamp(min=1)
    torch.add(mean * -factor, x, alpha=factor, out=out)
    return factor


def _ratio(room: float, largest: float) -> float:
    # The bound keeps the factor, and what undoes two of them, within float32.
    return math.copysign(min(abs(room) / max(largest, 1e-30), 2.0**60), room)


def bits(x: Tensor) -> Tensor:
    """The bits of 16-bit numbers, as integers."""
    return x.view(torch.int16)


def block_maxima(logits: Tensor, out: Tensor, signed: bool | None = None) -> None:
    """Maxima of the bits of logits [..., L, W] over L, into the bits of out [..., W].

    As integers the bits of numbers compare many times faster, and alike unless all are negative:
    then the smallest integer is the largest number. With ``signed`` False such a maximum is only
    known to be negative; None looks whether there is one.
    """
    torch.amax(logits, dim=-2, out=out)
    if signed is None:
        signed = int(out.amin()) < 0
    if signed:
        out.copy_(torch.where(out < 0, logits.amin(dim=-2), out))
