"""The gated sum in Triton's interpreter, against float64."""

from __future__ import annotations

import pytest
import torch

from tests.kernels import triton_cases
from tests.kernels.triton_cases import Case

CASES = {
    "odd": Case(heads=3, batch=2, q_len=37, value_dim=20),
    "one query": Case(heads=5, q_len=1, value_dim=64),
    "no query": Case(q_len=0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_equals_reference(name: str, dtype: torch.dtype, interpreted) -> None:
    interpreted(triton_cases.combine, CASES[name], dtype)
