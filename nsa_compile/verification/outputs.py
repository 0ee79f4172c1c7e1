"""The model's output, dense and converted: distance, and what the logits predict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from nsa_compile.verification.measures import Distance, perplexity, predictions, rounding
from nsa_compile.verification.report import EndToEnd

# Errors of single layers add up along a model.
_GROWTH = 10


_IDS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class NoOutput(ValueError):
    """The model returns nothing that could be compared, or not what the labels are for."""


def end_to_end(
    dense: Any,
    converted: Any,
    labels: Tensor | None,
    inputs: Mapping[str, Any],
    dtypes: Iterable[torch.dtype] = (),
) -> EndToEnd:
    """How far the outputs are apart.

    ``logits`` are compared where the output has them, else its first floating tensor. Positions
    that an ``attention_mask`` [B, T] among ``inputs`` hides do not count. ``dtypes`` are those of
    the layers: in mixed precision they are coarser than the output.

    Raises:
        NoOutput: no floating tensor in the output, or labels that do not fit it.
    """
    a, b = _main(dense), _main(converted)
    if labels is not None:
        labels = _token_ids(labels, a)
    kept = inputs.get("attention_mask")
    distance, rows = Distance(), (a, b)
    if isinstance(kept, Tensor) and a.dim() == 3 and kept.shape == a.shape[:2]:
        valid = kept.to(a.device) != 0
        rows = (a[valid], b[valid])
        labels = None if labels is None else labels.to(a.device).masked_fill(~valid, -100)
    distance.add(*rows)
    said = None
    if a.dim() == 3 and (labels is not None or _has_logits(dense) or _reads_ids(inputs)):
        said = predictions(*(x.reshape(-1, x.shape[-1]) for x in rows))
    return EndToEnd(
        shape=tuple(a.shape),
        relative_error=distance.relative,
        max_error=distance.largest,
        cosine=distance.cosine,
        kl=said.kl if said else None,
        top1_agreement=said.top1 if said else None,
        tokens=said.tokens if said else None,
        perplexity_dense=None if labels is None else perplexity(a, labels),
        perplexity_converted=None if labels is None else perplexity(b, labels),
        equal=distance.relative <= _GROWTH * rounding(a.dtype, *dtypes),
    )


def _token_ids(labels: Any, logits: Tensor) -> Tensor:
    """``labels`` as int64; refuses what stands for no token of ``logits`` [B, T, V]."""
    expected = f"labels must be token ids [B, T] of logits [B, T, V] = {list(logits.shape)}"
    if not isinstance(labels, Tensor) or labels.dtype not in _IDS:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise NoOutput(f"{expected}, got {got}")
    if logits.dim() != 3 or labels.shape != logits.shape[:2]:
        raise NoOutput(f"{expected}, got {list(labels.shape)}")
    wrong = labels[(labels != -100) & ((labels < 0) | (labels >= logits.shape[-1]))]
    if wrong.numel():
        raise NoOutput(f"{expected}, or -100 for none; got {int(wrong[0])}")
    return labels.long()


def _main(output: Any) -> Tensor:
    """The logits of an output, or its first floating tensor."""
    found = output.get("logits") if isinstance(output, Mapping) else None
    found = getattr(output, "logits", found)
    leaves = [found] if isinstance(found, Tensor) else tree_leaves(output)
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim():
            return leaf
    raise NoOutput(
        f"the model returns {type(output).__name__} with no floating tensor in it to compare"
    )


def _has_logits(output: Any) -> bool:
    return hasattr(output, "logits") or (isinstance(output, Mapping) and "logits" in output)


def _reads_ids(inputs: Mapping[str, Any]) -> bool:
    """Whether the model takes token ids [B, T]: then a 3-d output is taken for logits."""
    return any(
        isinstance(x, Tensor) and x.dim() == 2 and x.dtype in (torch.int64, torch.int32)
        for x in inputs.values()
    )
