"""The one backward of the gated sum, in the interpreter, against float64."""

from __future__ import annotations

import pytest
import torch

from tests.kernels import triton_cases
from tests.kernels.triton_cases import Case

_TOKENS = Case(q_len=33, kv_len=45, query_tile=1, block=8, offset=12, count=4)
CASES = {
    "tile": _TOKENS._replace(query_tile=16),
    "padding": _TOKENS._replace(query_tile=16, padded=True, batch=2, value_dim=24),
    "not causal, group of three": _TOKENS._replace(query_tile=4, causal=False, heads=3),
    "negative scale and offset": _TOKENS._replace(query_tile=16, scale=-0.4, offset=-9),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_reference(name: str, interpreted) -> None:
    interpreted(triton_cases.gated, CASES[name], torch.float32)


@pytest.mark.parametrize("branches", ["remembered", "given"])
def test_a_branch_with_a_gradient_of_its_own(branches: str, interpreted) -> None:
    interpreted(triton_cases.gated, CASES["tile"], torch.float32, branches=branches)


def test_half_precision(interpreted) -> None:
    interpreted(triton_cases.gated, CASES["padding"], torch.float16)


def test_gathered(interpreted) -> None:
    interpreted(triton_cases.gathered, _TOKENS, torch.float32, check=triton_cases.gated)


def test_a_program_a_query(interpreted) -> None:
    case = _TOKENS._replace(heads=4, block=16)
    interpreted(triton_cases.few, case, torch.float32, check=triton_cases.gated)
