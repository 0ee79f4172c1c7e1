"""Token-granular attention of large groups, a program a query, interpreted, against float64."""

from __future__ import annotations

import pytest
import torch

from tests.kernels import triton_cases
from tests.kernels.triton_cases import Case

_TOKENS = Case(heads=12, q_len=18, kv_len=45, query_tile=1, block=16, offset=12, count=4)
CASES = {
    "group of twelve": _TOKENS,
    "group of sixteen, padding": _TOKENS._replace(heads=16, padded=True, batch=2, q_len=12),
    "two kv heads": _TOKENS._replace(heads=24, kv_heads=2, q_len=9),
    "tile of four, negative scale and offset": _TOKENS._replace(
        heads=3, query_tile=4, scale=-0.4, offset=-5
    ),
    "not causal, window, dims 20 and 40": _TOKENS._replace(
        dim=20, value_dim=40, causal=False, window=9
    ),
    "one query": _TOKENS._replace(q_len=1, offset=44),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_reference(name: str, interpreted) -> None:
    interpreted(triton_cases.few, CASES[name], torch.float32)


def test_half_precision(interpreted) -> None:
    interpreted(triton_cases.few, CASES["group of twelve"], torch.float16)


@pytest.mark.parametrize(
    "terms", [{"ranges": "random"}, {"segments": "documents"}, {"slopes": True}, {"softcap": 2.0}]
)
def test_other_terms_go_to_the_tile_kernel(terms: dict[str, object], interpreted) -> None:
    interpreted(triton_cases.few, _TOKENS._replace(**terms, q_len=6), torch.float32)
