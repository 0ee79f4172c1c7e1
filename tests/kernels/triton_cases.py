"""What a Triton launcher must return: checks against the float64 reference, for any device.

Every check fills fresh memory with NaN first (``torch.use_deterministic_algorithms``), so a value
that no kernel wrote is found, and PyTorch would name an operator that is not deterministic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.kernels import terms

# Largest relative RMS error of outputs and of gradients.
TOLERANCE = {
    torch.float32: (1e-5, 1e-5),
    torch.float16: (5e-3, 1e-2),
    torch.bfloat16: (5e-3, 1e-2),
}


class Case(NamedTuple):
    """Sizes of one check; lengths and dims are odd on purpose where they can be."""

    heads: int = 2
    kv_heads: int = 1
    q_len: int = 64
    kv_len: int = 64
    dim: int = 16
    value_dim: int = 16
    query_tile: int = 16
    block: int = 16
    count: int = 3
    causal: bool = True
    offset: int = 0
    window: int | None = None
    padded: bool = False
    scale: float = 0.3
    local_window: int = 12
    channels: int = 8
    compress_block: int = 8
    compress_stride: int = 4
    batch: int = 1
    ranges: str = "none"
    segments: str = "none"
    slopes: bool = False
    positions: bool = False
    softcap: float = 0.0
    importance: str = "overlap"

    @property
    def logits(self) -> tuple[float, float, bool, int, int | None]:
        return self.scale, self.softcap, self.causal, self.offset, self.window

    def terms(self, valid: Tensor | None) -> tuple[Tensor | None, ...]:
        """valid, ranges, query and key segments, slopes, positions: as operators take them."""
        return terms.tensors(self, self.heads, self.kv_len, valid)

    @property
    def mask(self) -> tuple[float, bool, int, int | None]:
        return self.scale, self.causal, self.offset, self.window


@contextmanager
def replaced(module: ModuleType, constants: dict[str, Any]) -> Iterator[None]:
    """The module with other constants, for sizes that only large inputs would reach."""
    before = {name: getattr(module, name) for name in constants}
    vars(module).update(constants)
    try:
        yield
    finally:
        vars(module).update(before)


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh tensors hold NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def relative_error(got: Tensor, expected: Tensor) -> float:
    expected = expected.detach()
    difference = (got.detach().to(expected.device).double() - expected).norm()
    return float(difference / expected.norm().clamp(min=1e-30))


def inputs(case: Case, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, ...]:
    """q, k, v as views of [B, T, H, D], and the padding mask or None."""
    generator = torch.Generator().manual_seed(seed)

    def rows(length: int, heads: int, dim: int) -> Tensor:
        x = torch.randn(case.batch, length, heads, dim, generator=generator)
        return (x * (0.5 + torch.rand(dim, generator=generator))).to(dtype).transpose(1, 2)

    q = rows(case.q_len, case.heads, case.dim)
    k = rows(case.kv_len, case.kv_heads, case.dim)
    v = rows(case.kv_len, case.kv_heads, case.value_dim)
    valid = None
    if case.padded:
        valid = torch.rand(case.batch, case.kv_len, generator=generator) > 0.4
        valid[:, case.block : 2 * case.block] = False
        valid[:, -1] = True
    return q, k, v, valid


def on(device: str, *tensors: Tensor | None) -> list[Any]:
    """The tensors on a device; the float64 references run there too, where they are fast."""
    return [x if x is None else x.to(device) for x in tensors]


def random_blocks(case: Case, seed: int = 1) -> Tensor:
    """Any indices: unsorted, repeated, negative, past the end."""
    generator = torch.Generator().manual_seed(seed)
    tiles, blocks = -(-case.q_len // case.query_tile), -(-case.kv_len // case.block)
    shape = (case.batch, case.kv_heads, tiles, case.count)
    return torch.randint(-1, blocks + 1, shape, generator=generator, dtype=torch.int32)


def attend(case: Case, dtype: torch.dtype, device: str = "cpu", **overrides: Any) -> None:
    """Forward and all gradients of attention over random blocks."""
    from nsa_compile.kernels.attend import reference, triton_kernel, triton_key_gradient
    from nsa_compile.kernels.attend.site import Site as AttentionSite

    *qkv, valid = inputs(case, dtype)
    tensors = on(device, *case.terms(valid))
    *qkv, valid, blocks = on(device, *qkv, valid, random_blocks(case))
    sizes = (*case.logits, case.query_tile, case.block)
    exact = [x.double().requires_grad_() for x in qkv]
    with torch.device(device):
        out, lse = reference.selected_attention(*exact, blocks, *tensors, *sizes)
    sees = ~lse.isinf()
    generator = torch.Generator().manual_seed(2)
    grad_out = torch.randn(out.shape, generator=generator).to(device, dtype)
    grad_lse = torch.randn(lse.shape, generator=generator).to(device)
    objective = (out * grad_out.double()).sum() + (lse * grad_lse.double())[sees].sum()
    expected = torch.autograd.grad(objective, exact)

    if valid is not None:  # what stands in padding must not matter, nor may it be read
        qkv[1:] = [x.masked_fill(~valid[:, None, :, None], torch.nan) for x in qkv[1:]]
    rest = (blocks, AttentionSite(*tensors, *sizes))
    upstream = (grad_out, grad_lse)
    with poisoned(), replaced(triton_key_gradient, overrides):
        results = triton_kernel.forward(*qkv, *rest)
        grads = triton_kernel.backward(*upstream, *qkv, *results, *rest)
        again = triton_kernel.forward(*qkv, *rest)
        again += triton_kernel.backward(*upstream, *qkv, *again, *rest)
    most, most_grad = TOLERANCE[dtype]
    assert relative_error(results[0], out) < most
    assert torch.equal(results[1].isinf(), ~sees)
    assert relative_error(results[1][sees], lse[sees]) < most
    for name, grad, exact_grad in zip("qkv", grads, expected, strict=True):
        assert relative_error(grad, exact_grad) < most_grad, f"d{name}"
    for once, twice in zip((*results, *grads), again, strict=True):
        assert torch.equal(once, twice), "two runs differ"


def gathered(
    case: Case, dtype: torch.dtype, device: str = "cpu", scratch: int = 1 << 12,
    check: Callable[..., None] = attend,
) -> None:  # fmt: skip
    """``check`` with short lists gathered too; little scratch memory makes many rounds."""
    from nsa_compile.kernels.attend import triton_few, triton_gathered

    constants = {"LEAST_QUERIES": 1, "MOST_ROWS": 64, "PIECE_ROWS": 64, "SCRATCH_BYTES": scratch}
    only = replaced(triton_few, {"MOST_ROWS": 0})
    with only, replaced(triton_gathered, constants):
        check(case, dtype, device)


def few(
    case: Case, dtype: torch.dtype, device: str = "cpu", check: Callable[..., None] = attend
) -> None:
    """``check`` by a program a query after the shared blocks, also for short inputs."""
    from nsa_compile.kernels.attend import triton_few

    constants = {
        "LEAST_QUERIES": 1, "LEAST_ROWS": 1, "MOST_ROWS": 64, "MOST_BYTES": 4,
        "BLOCKS": (case.block,),
    }  # fmt: skip
    with replaced(triton_few, constants):
        check(case, dtype, device)


def gathers(case: Case) -> bool:
    """Whether the case is served by gathering, were it long enough."""
    from nsa_compile.kernels.attend import triton_gathered
    from nsa_compile.kernels.attend.site import Site as AttentionSite

    q, k, v, valid = inputs(case, torch.float32)
    site = AttentionSite(*case.terms(valid), *case.logits, case.query_tile, case.block)
    with replaced(triton_gathered, {"LEAST_QUERIES": 1}):
        return triton_gathered.serves(q, k, v, site)


def select(
    case: Case,
    dtype: torch.dtype,
    scorer: str,
    device: str = "cpu",
    with_lse: bool = False,
    spread: Tensor | None = None,
    **overrides: Any,
) -> None:
    """The chosen blocks: visible, ascending, the forced ones, and by score as good as the best."""
    from nsa_compile.kernels.compress import reference as compress_reference
    from nsa_compile.kernels.modifiers import Modifiers
    from nsa_compile.kernels.score import reference as score_reference
    from nsa_compile.kernels.select import reference, triton_kernel
    from nsa_compile.kernels.visibility import Visibility

    q, k, _, valid = inputs(case, dtype)
    if spread is not None:
        q, k = q / spread, k * spread + 8 * spread
    tensors = on(device, *case.terms(valid))
    q, k, valid = on(device, q, k, valid)
    if scorer == "channels":
        summary = score_reference.channels(q.double(), k.double(), valid, case.channels)
    else:
        compression = (case.compress_block, case.compress_stride)
        summary = compress_reference.compress(k.double(), valid, *compression).to(dtype)
    sizes = (case.query_tile, case.block)
    forced = (1, case.local_window, case.compress_block, case.compress_stride)
    exact_summary = summary if scorer == "channels" else summary.double()
    wide = (q.double(), k.double(), exact_summary)
    with torch.device(device):
        worth = reference.ranked_scores(
            *wide, *tensors, scorer, *case.logits, *sizes, *forced, case.importance
        )
    extra = Visibility(*tensors[:4]), Modifiers(*tensors[4:], case.softcap)
    lse = _compressed_lse(case, q, summary, valid) if with_lse else None
    given = (q, k, summary, *extra, scorer, *case.mask, *sizes, case.count, *forced, lse)
    with poisoned(), replaced(triton_kernel, overrides):
        picked, again = (triton_kernel.select_blocks(*given, case.importance) for _ in range(2))
    assert torch.equal(picked, again), "two runs differ"
    # Keys in half precision move a score by its rounding.
    check_selection(picked, worth, 1e-5 if dtype == torch.float32 else 2e-2)


def select_in_eight_bits(case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """By e4m3 products of channels; also where channels differ in size and do not centre on 0."""
    from nsa_compile.kernels.score import triton_kernel as scores

    spread = torch.logspace(-2, 1, case.dim, dtype=dtype)
    with replaced(scores, {"_eight_bits": lambda x: True, "MOST_WIDE": 0}):
        for channels in (case.channels, case.dim):
            select(case._replace(channels=channels), dtype, "channels", device)
        select(case._replace(channels=case.dim), dtype, "channels", device, spread=spread)


def _compressed_lse(case: Case, q: Tensor, k_cmp: Tensor, valid: Tensor | None) -> Tensor:
    """What attention over the compressed keys hands to the selection."""
    from nsa_compile.kernels.compressed import triton_kernel
    from nsa_compile.kernels.compressed.site import Site as CompressedSite

    sizes = (case.scale, case.causal, case.offset, case.compress_block, case.compress_stride)
    site = CompressedSite(valid, None, *sizes)
    return triton_kernel.forward(q, k_cmp, k_cmp, k_cmp.shape[2], site)[1]


def check_selection(picked: Tensor, worth: Tensor, tolerance: float) -> None:
    """``picked`` [B, Hkv, NT, n] against the scores [B, Hkv, NT, Ns] it should be the best of."""
    count, blocks = picked.shape[3], worth.shape[3]
    visible = (worth > -torch.inf).sum(-1).clamp(max=count)
    assert torch.equal((picked >= 0).sum(-1), visible), "too few or too many blocks"
    ids = torch.where(picked >= 0, picked.long(), blocks)
    assert bool(((ids.diff(dim=-1) > 0) | (ids[..., 1:] == blocks)).all()), "not ascending"
    padded = torch.nn.functional.pad(worth, (0, 1), value=0.0)
    got = padded.gather(-1, ids)
    assert bool((got > -torch.inf).all()), "an invisible block"
    best = worth.sort(-1, descending=True).values[..., :count]
    best = torch.nn.functional.pad(best, (0, count - best.shape[-1]))
    best = best.where(torch.arange(count, device=worth.device) < visible[..., None], 0.0)
    assert torch.equal(got.isinf().sum(-1), best.isinf().sum(-1)), "a forced block is missing"
    total, most = (x.masked_fill(x.isinf(), 0.0).sum(-1) for x in (got, best))
    assert bool((most - total <= tolerance * most.clamp(min=1e-6)).all()), "better blocks exist"


def channels(case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """The same channels as the reference, which finds them well apart on these inputs."""
    from nsa_compile.kernels.score import reference, triton_kernel

    q, k, _, valid = on(device, *inputs(case, dtype))
    strength = reference.channel_strength(q.double(), k.double(), valid)
    with poisoned():
        chosen = triton_kernel.channels(q, k, valid, case.channels)
    assert bool((chosen.diff(dim=-1) > 0).all()), "not ascending"
    best = strength.sort(-1, descending=True).values[..., : case.channels].sum(-1)
    got = strength.gather(-1, chosen.long()).sum(-1)
    assert bool((got >= best * (1 - 1e-5)).all())


def compress(case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """Pooled keys and the gradient of the keys."""
    from nsa_compile.kernels.compress import reference, triton_kernel

    _, k, _, valid = on(device, *inputs(case, dtype))
    compression = (case.compress_block, case.compress_stride)
    exact = k.double().requires_grad_()
    pooled = reference.compress(exact, valid, *compression)
    grad = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(2))
    grad = grad.to(device, dtype)
    if valid is not None:
        k = k.masked_fill(~valid[:, None, :, None], torch.nan)
    with poisoned():
        got = triton_kernel.compress(k, valid, *compression)
        got_grad = triton_kernel.compress_backward(grad, valid, *compression, case.kv_len)
    assert got.shape == pooled.shape
    if not pooled.numel():
        assert not got_grad.any()
        return
    (expected,) = torch.autograd.grad((pooled * grad.double()).sum(), exact)
    most, most_grad = TOLERANCE[dtype]
    assert relative_error(got, pooled.detach()) < most
    assert relative_error(got_grad, expected) < most_grad


def compressed_inputs(
    case: Case, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """q, k_cmp, v_cmp and the padding mask."""
    from nsa_compile.kernels.compress import reference as compress_reference

    q, k, v, valid = inputs(case, dtype)
    sizes = (case.compress_block, case.compress_stride)
    pooled = (compress_reference.compress(x.double(), valid, *sizes).to(dtype) for x in (k, v))
    return q, *pooled, valid


def compressed(case: Case, dtype: torch.dtype, device: str = "cpu", **overrides: Any) -> None:
    """Forward and all gradients of attention over compressed keys."""
    from nsa_compile.kernels.compressed import reference, triton_backward, triton_kernel
    from nsa_compile.kernels.compressed.site import Site as CompressedSite

    *qkv, valid = compressed_inputs(case, dtype)
    *qkv, valid, ranges = on(device, *qkv, valid, case.terms(valid)[1])
    sizes = (case.scale, case.causal, case.offset, case.compress_block, case.compress_stride)
    exact = [x.double().requires_grad_() for x in qkv]
    with torch.device(device):
        out, lse = reference.compressed_attention(*exact, valid, ranges, *sizes)
    sees = ~lse.isinf()
    generator = torch.Generator().manual_seed(2)
    grad_out = torch.randn(out.shape, generator=generator).to(device, dtype)
    grad_lse = torch.randn(lse.shape, generator=generator).to(device)
    objective = (out * grad_out.double()).sum() + (lse * grad_lse.double())[sees].sum()
    expected = torch.autograd.grad(objective, exact)

    count = qkv[1].shape[2]
    if valid is not None:  # what stands in a hidden block must not matter, nor may it be read
        holds = CompressedSite(valid, None, *sizes).holds(count)
        assert holds is not None
        qkv[1:] = [x.masked_fill(~holds[:, None, :, None], torch.nan) for x in qkv[1:]]
    site = CompressedSite(valid, ranges, *sizes)
    upstream = (grad_out, grad_lse)
    with poisoned(), replaced(triton_backward, overrides):
        results = triton_kernel.forward(*qkv, count, site)
        grads = triton_kernel.backward(*upstream, *qkv, *results, count, site)
        again = triton_kernel.forward(*qkv, count, site)
        again += triton_kernel.backward(*upstream, *qkv, *again, count, site)
    most, most_grad = TOLERANCE[dtype]
    assert relative_error(results[0], out) < most
    assert torch.equal(results[1].isinf(), ~sees)
    assert relative_error(results[1][sees], lse[sees]) < most
    for name, grad, exact_grad in zip("qkv", grads, expected, strict=True):
        assert relative_error(grad, exact_grad) < most_grad, f"d{name}"
    for once, twice in zip((*results, *grads), again, strict=True):
        assert torch.equal(once, twice), "two runs differ"


def scale_gradient(case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """The gradient of the scales of listed blocks, which are listed in any order and twice."""
    from nsa_compile.kernels.attend import triton_kernel as attention
    from nsa_compile.kernels.attend.site import Site as AttentionSite
    from nsa_compile.kernels.scaled import reference, triton_kernel

    *qkv, valid = inputs(case, dtype)
    tensors = on(device, *case.terms(valid))
    *qkv, valid, blocks = on(device, *qkv, valid, random_blocks(case))
    scales = torch.ones(blocks.shape, dtype=torch.float64, device=device, requires_grad=True)
    exact = [x.double() for x in qkv]
    sizes = (case.scale, case.causal, case.offset, case.window, case.query_tile, case.block)
    with torch.device(device):
        out, lse = reference.scaled_attention(*exact, blocks, scales, *tensors[:4], *sizes)
    sees = ~lse.isinf()
    generator = torch.Generator().manual_seed(2)
    grad_out = torch.randn(out.shape, generator=generator).to(device, dtype)
    grad_lse = torch.randn(lse.shape, generator=generator).to(device)
    objective = (out * grad_out.double()).sum() + (lse * grad_lse.double())[sees].sum()
    (expected,) = torch.autograd.grad(objective, scales)
    if valid is not None:
        qkv[1:] = [x.masked_fill(~valid[:, None, :, None], torch.nan) for x in qkv[1:]]
    site = AttentionSite(*tensors, *case.logits, case.query_tile, case.block)
    with poisoned():
        results = attention.forward(*qkv, blocks, site)
        saved = (*qkv, *results, blocks, site)
        got, again = (triton_kernel.scale_gradient(grad_out, grad_lse, *saved) for _ in range(2))
        without = triton_kernel.scale_gradient(grad_out, None, *saved)
    assert relative_error(got, expected) < TOLERANCE[dtype][1]
    assert torch.equal(got, again), "two runs differ"
    assert not torch.equal(got, without)


def described(check: Callable[..., None], case: Case, dtype: torch.dtype, *rest: Any) -> None:
    """A check with all that may be read through tensor descriptors read so, on any device."""
    from nsa_compile.kernels import triton_descriptors
    from nsa_compile.kernels.attend.triton_rows import Launch
    from nsa_compile.kernels.compressed import triton_backward, triton_kernel

    launch = Launch(32, 32, 4, 1)
    directions = {("query", 64): launch, ("key", 64): launch}
    with (
        replaced(triton_descriptors, {"has_copy_engine": lambda device: True}),
        replaced(triton_kernel, {"DESCRIBED_LAUNCHES": {64: launch}}),
        replaced(triton_backward, {"DESCRIBED_LAUNCHES": directions}),
    ):
        check(case, dtype, *rest)


def combine(case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """The gated sum and all its gradients; two branches and the gates lie as nobody expects."""
    from nsa_compile.kernels.combine import triton_kernel

    generator = torch.Generator().manual_seed(4)
    shape = (case.batch, case.heads, case.q_len, case.value_dim)
    grad, *branches = (torch.randn(shape, generator=generator).to(dtype) for _ in range(4))
    branches[0] = branches[0].transpose(1, 2).contiguous().transpose(1, 2)
    branches[1] = branches[1].transpose(2, 3).contiguous().transpose(2, 3)
    gates = torch.rand(3, *shape[:3], generator=generator).to(dtype).movedim(0, -1)
    exact = [x.double().requires_grad_() for x in (gates, *branches)]
    out = (torch.stack(exact[1:], -1) * exact[0][..., None, :]).sum(-1)
    expected = torch.autograd.grad(out, exact, grad.double())
    given = [x.to(device) for x in (gates, *branches)]
    with poisoned():
        got = triton_kernel.combine(*given)
        grads = triton_kernel.combine_backward(grad.to(device), *given)
    most, most_grad = TOLERANCE[dtype]
    assert relative_error(got, out) < most
    for name, x, true in zip(("gates", "cmp", "slc", "win"), grads, expected, strict=True):
        assert relative_error(x, true) < most_grad, f"d{name}"


def gated(case: Case, dtype: torch.dtype, device: str = "cpu", branches: str = "all") -> None:
    """The gated sum and its one backward, at gates of either sign; ``branches``: what is there.

    "remembered": the compressed branch has a gradient of its own; "given": so does the selected.
    """
    import nsa_compile.kernels.library  # noqa: F401
    from nsa_compile.kernels.gated import triton_kernel
    from nsa_compile.kernels.gated.op import Saved
    from nsa_compile.kernels.gated.site import Site as GatedSite

    _, k_cmp, v_cmp, _ = on(device, *compressed_inputs(case, dtype))
    q, k, v, valid = on(device, *inputs(case, dtype))
    generator = torch.Generator().manual_seed(6)
    gates = torch.randn(3, *q.shape[:3], generator=generator).to(device, dtype).movedim(0, -1)
    blocks = None if branches == "given" else random_blocks(case).to(device)
    compression = (case.compress_block, case.compress_stride)
    exact = [x.double().requires_grad_() for x in (gates, q, k, v, k_cmp, v_cmp)]
    with torch.device(device):
        out, o_cmp, o_slc = _gated_reference(case, exact, blocks, valid, branches)
    grad = torch.randn(out.shape, generator=generator).to(device, dtype)
    wanted = exact[:4] if branches == "remembered" else exact
    wanted = [*wanted, *{"remembered": [o_cmp], "given": [o_slc]}.get(branches, [])]
    expected = torch.autograd.grad(out, wanted, grad.double())

    site = GatedSite(
        valid, None, case.scale, case.causal, case.offset, *compression, case.local_window,
        case.query_tile, case.block,
    )  # fmt: skip
    given = [gates, q, k, v, k_cmp, v_cmp]
    attention = torch.ops.nsa.compressed_attention
    compressed, lse = attention(*given[1::3], given[5], *site.compressed(case.kv_len))
    if branches == "remembered":
        given[4:], lse = [None, None], None
    selected = o_slc.detach().to(dtype) if blocks is None else None
    before = (*given, compressed, lse, blocks, selected)
    arguments = tuple(getattr(site, name) for name in GatedSite.__dataclass_fields__)
    results = torch.ops.nsa.gated_attention(*before, *arguments, True)
    between = results[1] if selected is None else selected
    with poisoned():
        sums = [
            triton_kernel.forward(*given[:4], compressed, between, site, keep)
            for keep in (True, False)
        ]
        runs = [triton_kernel.backward(grad, Saved(*before, *results[1:]), site) for _ in range(2)]
    most, most_grad = TOLERANCE[dtype]
    for own, true in zip(sums[0], (out, results[3]), strict=False):
        assert relative_error(own, true) < most
    torch.testing.assert_close(sums[0][2], results[4], rtol=most, atol=most)
    assert torch.equal(sums[0][0], sums[1][0])
    assert not sums[1][1].numel()
    assert relative_error(results[0], out) < most
    names = ("gates", "q", "k", "v", "k_cmp", "v_cmp", "compressed", "selected")
    runs = [(found.dgates, *found.dqkv, *found[2:]) for found in runs]
    expected = iter(expected)
    for name, got, again in zip(names, *runs, strict=True):
        if got is not None:
            assert relative_error(got, next(expected)) < most_grad, f"d{name}"
            assert torch.equal(got, again), "two runs differ"
    assert next(expected, None) is None


def _gated_reference(
    case: Case, inputs: list[Tensor], blocks: Tensor | None, valid: Tensor | None, branches: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The gated sum, its compressed and its selected branch, with explicit matrices."""
    from nsa_compile.kernels.attend import reference
    from nsa_compile.kernels.compressed import reference as compressed_reference

    gates, q, k, v, k_cmp, v_cmp = inputs
    sizes = (case.compress_block, case.compress_stride)
    mask = (case.scale, case.causal, case.offset)
    pooled = (q, k_cmp, v_cmp, valid, None)
    o_cmp, _ = compressed_reference.compressed_attention(*pooled, *mask, *sizes)
    if branches == "remembered":
        o_cmp = o_cmp.detach().requires_grad_()
    terms = (valid, *(None,) * 5)
    logits = (case.scale, 0.0, case.causal, case.offset)
    tiling = (case.query_tile, case.block)
    if blocks is None:
        o_slc = o_cmp.detach().flip(2).requires_grad_()
    else:
        o_slc, _ = reference.selected_attention(q, k, v, blocks, *terms, *logits, None, *tiling)
    tiles, every = -(-case.q_len // case.query_tile), -(-case.kv_len // case.block)
    everything = torch.arange(every, dtype=torch.int32).expand(case.batch, case.kv_heads, tiles, -1)
    o_win, _ = reference.selected_attention(
        q, k, v, everything, *terms, *logits, case.local_window, *tiling
    )
    out = (torch.stack((o_cmp, o_slc, o_win), -1) * gates[..., None, :]).sum(-1)
    return out, o_cmp, o_slc
