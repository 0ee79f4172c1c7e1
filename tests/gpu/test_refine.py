"""refine_blocks on the GPU, held against the float64 reference by score."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.inputs import Site
from tests.kernels.refine_cases import chooses_the_best

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("changes", [
    {},
    {"group": 1, "dim": 64},
    {"group": 7, "dim": 80, "q_len": 507},
    {"dim": 128, "block": 64, "query_tile": 64, "q_len": 2000, "local_window": 100},
    {"dim": 256, "block": 32, "query_tile": 128, "q_len": 1000, "num_selected": 8},
    {"padding": "left", "q_len": 300},
    {"window": 90, "q_len": 300},
    {"causal": False, "q_len": 300, "block": 8, "local_window": 8},
    {"query_tile": 1, "q_len": 130, "group": 4},
    {"ranges": "chunks", "q_len": 300},
    {"ranges": "random", "q_len": 300, "causal": False, "padding": "left"},
    {"segments": "documents", "q_len": 300, "group": 7},
    {"slopes": True, "positions": True, "q_len": 300, "dim": 80},
    {"slopes": True, "q_len": 300, "block": 8, "local_window": 8},
    {"softcap": 1.5, "q_len": 300},
    {"softcap": 1.5, "slopes": True, "ranges": "random", "segments": "mixed", "window": 90,
     "q_len": 507, "dim": 128, "block": 64, "query_tile": 64},
])  # fmt: skip
def test_chooses_the_best(changes: dict[str, object], dtype: torch.dtype) -> None:
    chooses_the_best(Site().but(**changes), dtype, "cuda")
