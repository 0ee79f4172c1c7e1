"""Runs every kernel once on small odd shapes, for a memory checker to watch.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
        python -m tests.gpu.memcheck

Without PyTorch's cache each tensor is an allocation of its own, so that an access one element past
its end is seen. Results are checked against float64 as well.
"""

from __future__ import annotations

import torch

from tests.gpu.test_kernels import CASES, COMPRESSED, GATED, GATHERED, LARGE_GROUPS, TERMS
from tests.kernels import triton_cases

_SHAPES = (
    "group 3", "dims 80 and 48", "dims 192 and 128", "tile 1, block 64", "tile 16, block 64",
    "tile 128, block 16", "window and padding", "not causal", "one query",
    "111 keys, block 24",
)  # fmt: skip
_TERMS = ("random ranges, window, padding", "mixed segments, padding", "alibi, block 24", "cap")
_GATHERED = ("group 7, dims 80", "block 24", "window and padding")
_FEW = ("group 12, dims 80", "group 16, window and padding", "tile 4")
_COMPRESSED = ("group 7", "padding", "2000 keys")
_GATED = ("tile 64, group 1, padding", "group 4", "not causal, dims 192 and 128")


def main() -> None:
    dtype, device = torch.bfloat16, "cuda"
    for name in _SHAPES + _TERMS:
        case = {**CASES, **TERMS}[name]
        triton_cases.attend(case, dtype, device)
        for scorer in ("channels", "mean"):
            triton_cases.select(case, dtype, scorer, device)
        print(name, flush=True)
    for name in _GATHERED:
        triton_cases.gathered(GATHERED[name], dtype, device, scratch=1 << 17)
        print("gathered,", name, flush=True)
    for name in _FEW:
        triton_cases.few(LARGE_GROUPS[name], dtype, device)
        print("few,", name, flush=True)
    for name in _COMPRESSED:
        triton_cases.compressed(COMPRESSED[name], dtype, device)
        print("compressed,", name, flush=True)
    for name in _GATED:
        triton_cases.gated(GATED[name], dtype, device)
        print("gated,", name, flush=True)
    for name in ("group 3", "dims 80 and 48"):
        triton_cases.combine(CASES[name], dtype, device)
        triton_cases.channels(CASES[name], dtype, device)
        triton_cases.compress(CASES[name], dtype, device)
        print("statistics,", name, flush=True)


if __name__ == "__main__":
    main()
