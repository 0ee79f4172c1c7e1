"""The rows people read: equal layers folded into one, each cell as text."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePath

from nsa_compile.passes.site import SiteRecord
from nsa_compile.report.measured import own_time
from nsa_compile.report.summary import runs_dense
from nsa_compile.report.units import amount

_SHORT_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Row:
    """The texts of one line of the table, and how many sites it stands for.

    Attributes:
        flops: dense, and sparse behind an arrow where converted; ``saving`` is their ratio.
        time: as ``flops``, measured at this length; empty where it was not.
        verdict: ``"converted"`` or ``"kept"``, then ``reason`` is the code.
    """

    layer: str
    origin: str
    attention: str
    mask: str
    length: str
    flops: str
    saving: str
    time: str
    verdict: str
    reason: str
    converted: bool
    count: int


def rows(sites: list[SiteRecord]) -> list[Row]:
    """Sites that differ in nothing but the numbers of their module path share a row."""
    groups: dict[tuple[object, ...], list[SiteRecord]] = {}
    for site in sites:
        pattern = re.sub(r"\d+", "#", site.module)
        texts = (_origin(site), _attention(site), _scores(site), _length(site))
        costs = (site.flops_dense, site.flops_sparse)
        key = (pattern, site.ordinal, *texts, *costs, own_time(site), site.decision, site.reason)
        groups.setdefault(key, []).append(site)
    return [_row(group) for group in groups.values()]


def _row(group: list[SiteRecord]) -> Row:
    first = group[0]
    layer = _path([site.module for site in group]) or "(no module path)"
    return Row(
        layer=f"{layer} #{first.ordinal + 1}" if first.ordinal else layer,
        origin=_origin(first),
        attention=_attention(first),
        mask=_scores(first),
        length=_length(first),
        flops=_flops(first),
        saving=_saving(first),
        time=own_time(first),
        verdict=first.decision,
        reason=first.reason or "",
        converted=first.decision == "converted",
        count=len(group),
    )


def _flops(site: SiteRecord) -> str:
    dense, sparse = site.flops_dense, site.flops_sparse
    if sparse is None or sparse == dense or isinstance(dense, str):
        return amount(dense)
    return f"{amount(dense)} -> {amount(sparse)}"


def _saving(site: SiteRecord) -> str:
    """``"3.9x less"``, or what keeps it from being less."""
    dense, sparse = site.flops_dense, site.flops_sparse
    if sparse is None:
        return ""
    if runs_dense(site):
        return "dense here"
    if not isinstance(dense, int) or not isinstance(sparse, int):
        return ""
    if sparse <= dense:
        return f"{dense / max(sparse, 1):.1f}x less"
    return f"{sparse / max(dense, 1):.1f}x more"


def _path(modules: list[str]) -> str:
    """``"layers.0.attn", "layers.1.attn"`` -> ``"layers.[0-1].attn"``.

    Paths that vary in several numbers are listed.
    """
    if len(set(modules)) == 1:
        return modules[0]
    parts = [re.split(r"(\d+)", module) for module in modules]
    varying = [i for i, part in enumerate(zip(*parts, strict=True)) if len(set(part)) > 1]
    if len(varying) > 1:
        return ", ".join(modules)
    numbers = sorted({int(part[varying[0]]) for part in parts})
    first = parts[0]
    first[varying[0]] = f"[{_ranges(numbers)}]"
    return "".join(first)


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> ``"0-2,5"``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def _origin(site: SiteRecord) -> str:
    """``"LlamaAttention, modeling_llama.py:250"``."""
    path, colon, line = site.source.rpartition(":")
    place = f"{PurePath(path).name}{colon}{line}" if path else site.source
    return ", ".join(part for part in (site.module_class, place) if part)


def _attention(site: SiteRecord) -> str:
    heads = f"{site.q_heads}/{site.kv_heads}"
    dims = f"{site.head_dim}"
    if site.value_dim != site.head_dim:
        dims += f"/{site.value_dim}"
    return f"{heads} heads x {dims}, {_SHORT_DTYPES.get(site.dtype, site.dtype)}"


def _scores(site: SiteRecord) -> str:
    """The mask, and what else is done to the logits: ``"causal, softcap(50.0)"``."""
    return f"{site.mask}, {site.modifiers}" if site.modifiers else site.mask


def _length(site: SiteRecord) -> str:
    same = site.q_len == site.kv_len
    length = f"{site.kv_len}" if same else f"{site.q_len} x {site.kv_len}"
    return length if site.batch == 1 else f"{site.batch} x {length}"
