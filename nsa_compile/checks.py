"""What nsa_compile.functional demands of its arguments: errors say expected and got."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nsa_compile.kernels.autocast import autocast_dtype
from nsa_compile.kernels.geometry import num_tiles
from nsa_compile.passes.config import NSAConfig
from nsa_compile.passes.config_checks import IMPORTANCES, SCORERS


def logit_scale(scale: float | None, dim: int) -> float:
    return 1 / math.sqrt(dim) if scale is None else scale


def pooled_keys(
    k: Tensor, k_cmp: Tensor | None, valid: Tensor | None, length: int, stride: int
) -> Tensor:
    """The compressed keys of scorer "mean", pooled here or given and checked."""
    if k_cmp is None:
        return torch.ops.nsa.compress(k, valid, length, stride)
    batch, heads, kv_len, dim = k.shape
    expected = [batch, heads, max(0, (kv_len - length) // stride + 1), dim]
    if list(k_cmp.shape) != expected or autocast_dtype(k_cmp) != autocast_dtype(k):
        raise ValueError(
            f"k_cmp must be [B, Hkv, Nc, D] = {expected} in {k.dtype}, got {list(k_cmp.shape)} in "
            f"{k_cmp.dtype}"
        )
    return k_cmp


def check_scorer(scorer: str, importance: str) -> None:
    if scorer not in SCORERS:
        raise ValueError(f"scorer must be {' or '.join(map(repr, SCORERS))}, got {scorer!r}")
    if importance not in IMPORTANCES:
        raise ValueError(
            f"importance must be {' or '.join(map(repr, IMPORTANCES))}, got {importance!r}"
        )
    if importance != "overlap" and scorer != "mean":
        raise ValueError(
            f"importance={importance!r} is about compressed keys and needs scorer='mean', got "
            f"scorer={scorer!r}"
        )


def check_blocks(block_indices: Tensor, q: Tensor, k: Tensor, query_tile: int) -> None:
    tiles, shape = num_tiles(q.shape[2], query_tile), list(block_indices.shape)
    batch, heads = k.shape[:2]
    if len(shape) != 4 or shape[:3] not in ([batch, h, tiles] for h in (heads, q.shape[1])):
        raise ValueError(
            f"block_indices must be [B, Hkv, ceil(Tq / query_tile), n] = [{batch}, {heads}, "
            f"{tiles}, n], or with Hq={q.shape[1]} for Hkv, got {shape}"
        )
    if block_indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"block_indices must be int32 or int64, got {block_indices.dtype}")


def check_sel_scale(
    scorer: str, window: int | None, query_segments: Tensor | None, slopes: Tensor | None,
    softcap: float,
) -> None:  # fmt: skip
    """The scales are shares of attention over compressed keys, which knows a few terms alone."""
    if scorer != "mean":
        raise ValueError(
            f"sel_scale=True is about compressed keys and needs scorer='mean', got {scorer!r}"
        )
    terms = {"window": window, "query_segments": query_segments, "slopes": slopes}
    for name, value in {**terms, "softcap": softcap or None}.items():
        if value is not None:
            raise ValueError(f"sel_scale=True and {name} do not go together; leave out one of them")


def check_scales(
    sel_scale: Tensor | None, block_indices: Tensor, slopes: Tensor | None, softcap: float
) -> None:
    if sel_scale is None:
        return
    if sel_scale.shape != block_indices.shape or not sel_scale.is_floating_point():
        raise ValueError(
            f"sel_scale must be floating {list(block_indices.shape)} as block_indices is, got "
            f"{sel_scale.dtype} {list(sel_scale.shape)}"
        )
    for name, there in (("slopes", slopes is not None), ("softcap", bool(softcap))):
        if there:
            raise ValueError(f"sel_scale and {name} do not go together; leave out one of them")


def check_lse(lse: Tensor | None, q: Tensor, scorer: str) -> None:
    if lse is None:
        return
    if scorer != "mean":
        raise ValueError(f"lse is that of scorer 'mean', got scorer {scorer!r}")
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if lse.dtype != dtype or lse.shape != q.shape[:3]:
        raise ValueError(
            f"lse must be {str(dtype).removeprefix('torch.')} [B, Hq, Tq] = {list(q.shape[:3])}, "
            f"got {lse.dtype} {list(lse.shape)}"
        )


def check_inputs(
    q: Tensor, k: Tensor, v: Tensor | None, valid: Tensor | None,
    names: tuple[str, str, str] = ("k", "v", "Tk"),
) -> None:  # fmt: skip
    key, value, length = names
    named = [("q", q, "[B, Hq, Tq, D]"), (key, k, f"[B, Hkv, {length}, D]")]
    if v is not None:
        named.append((value, v, f"[B, Hkv, {length}, Dv]"))
    for name, tensor, layout in named:
        if tensor.ndim != 4:
            raise ValueError(f"{name} must be {layout}, got {list(tensor.shape)}")
        if autocast_dtype(tensor) != autocast_dtype(q) or not tensor.is_floating_point():
            raise ValueError(
                f"q, {key} and {value} must have one floating dtype, got {name} in {tensor.dtype} "
                f"and q in {q.dtype}"
            )
    batch, q_heads, _, dim = q.shape
    if k.shape[0] != batch or k.shape[3] != dim:
        raise ValueError(
            f"{key} must be [B, Hkv, {length}, D] with B={batch} and D={dim} of q, got "
            f"{list(k.shape)}"
        )
    if k.shape[1] == 0 or q_heads % k.shape[1]:
        raise ValueError(f"Hq must be a multiple of Hkv, got Hq={q_heads} and Hkv={k.shape[1]}")
    if v is not None and v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"{value} must be [B, Hkv, {length}, Dv] with {list(k.shape[:3])} of {key}, got "
            f"{list(v.shape)}"
        )
    check_valid(valid, batch, k.shape[2], length)


def check_valid(valid: Tensor | None, batch: int, length: int, name: str) -> None:
    if valid is None:
        return
    if valid.dtype != torch.bool or tuple(valid.shape) != (batch, length):
        raise ValueError(
            f"valid must be bool [B, {name}] = [{batch}, {length}], got {valid.dtype} "
            f"{list(valid.shape)}"
        )


def check_terms(
    q: Tensor, k: Tensor, ranges: Tensor | None, query_segments: Tensor | None,
    key_segments: Tensor | None, slopes: Tensor | None, positions: Tensor | None, softcap: float,
) -> None:  # fmt: skip
    """Shapes and dtypes of the optional terms of mask and logits."""
    if (query_segments is None) != (key_segments is None):
        raise ValueError("query_segments and key_segments go together, got only one of them")
    if positions is not None and slopes is None:
        raise ValueError("positions are those of ALiBi and need slopes, got slopes=None")
    if softcap < 0:
        raise ValueError(f"softcap must be 0 (none) or more, got {softcap!r}")
    (batch, q_heads, q_len, _), kv_len = q.shape, k.shape[2]
    integer, real = torch.int32, torch.float32
    named: tuple[tuple[str, Tensor | None, torch.dtype, str, tuple[int, ...]], ...] = (
        ("ranges", ranges, integer, "[B or 1, Tq, 2]", (batch, q_len, 2)),
        ("query_segments", query_segments, integer, "[B or 1, Tq]", (batch, q_len)),
        ("key_segments", key_segments, integer, "[B or 1, Tk]", (batch, kv_len)),
        ("slopes", slopes, real, "[Hq]", (q_heads,)),
        ("positions", positions, real, "[B or 1, Tk]", (batch, kv_len)),
    )
    for name, tensor, dtype, layout, shape in named:
        if tensor is None:
            continue
        shapes = (shape,) if name == "slopes" else (shape, (1, *shape[1:]))
        if tensor.dtype != dtype or tuple(tensor.shape) not in shapes:
            raise ValueError(
                f"{name} must be {str(dtype).removeprefix('torch.')} {layout} = {list(shape)}, got "
                f"{tensor.dtype} {list(tensor.shape)}"
            )


def check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")


def check_mask(window: int | None, init_blocks: int) -> None:
    if window is not None:
        check_sizes(window=window)
    if init_blocks:
        check_sizes(init_blocks=init_blocks)


def check_gates(gates: Tensor | None, q: Tensor, merge: str) -> None:
    """Gates come with ``merge="gate"`` and only then."""
    expected = [*q.shape[:3], 3]
    if merge != "gate":
        if gates is not None:
            raise ValueError(
                f"gates belong to merge='gate', got gates with merge={merge!r}: leave them out, or "
                "ask for config={'merge': 'gate'}"
            )
        return
    if gates is None:
        raise ValueError(
            f"merge='gate' needs gates [B, Hq, Tq, 3] = {expected}, for the compressed, selected "
            "and window branch, got None"
        )
    if list(gates.shape) != expected or not gates.is_floating_point():
        raise ValueError(
            f"gates must be floating [B, Hq, Tq, 3] = {expected}, got {gates.dtype} "
            f"{list(gates.shape)}"
        )
    if gates.device != q.device:
        raise ValueError(f"gates must be on {q.device} as q is, got {gates.device}")


def check_gated_terms(
    window: int | None, query_segments: Tensor | None, slopes: Tensor | None, softcap: float
) -> None:
    """What the compressed branch has no meaning for is refused, not dropped."""
    refused = {
        "window": (window, "its window branch is config.window"),
        "query_segments": (query_segments, "give sorted documents as ranges"),
        "slopes": (slopes, "compressed keys have no position"),
        "softcap": (softcap or None, "its three softmaxes are not capped"),
    }
    for name, (value, reason) in refused.items():
        if value is not None:
            raise ValueError(f"merge='gate' does not take {name}: {reason}")


def check_unlearned(options: NSAConfig) -> None:
    """Functions have no parameters: what ``options`` wants learned needs NSAParameters."""
    wanted = options.sizes()
    for name, default in (("compression", "mean"), ("num_mem_kv", 0), ("gate", None)):
        if wanted[name] != default:
            raise ValueError(
                f"{name}={wanted[name]!r} has parameters, which a function has not; use "
                f"nsa_compile.prepare or nsa_compile.NSAParameters, or {name}={default!r}"
            )
