"""Token-granular attention by gathering readers, in the interpreter, against float64."""

from __future__ import annotations

import pytest
import torch

from tests.kernels import triton_cases
from tests.kernels.triton_cases import Case

_TOKENS = Case(q_len=33, kv_len=45, query_tile=1, block=8, offset=12, count=4)
CASES = {
    "group of one": _TOKENS._replace(heads=2, kv_heads=2, q_len=20),
    "group of two": _TOKENS,
    "group of three": _TOKENS._replace(heads=3),
    "group of sixteen": _TOKENS._replace(heads=16, q_len=18),
    "block of 4": _TOKENS._replace(block=4, count=6),
    "block of 2, group of three, padding": _TOKENS._replace(
        heads=3, block=2, q_len=17, count=7, padded=True
    ),
    "tile of four": _TOKENS._replace(query_tile=4),
    "padding": _TOKENS._replace(padded=True, batch=2),
    "window and padding": _TOKENS._replace(window=20, padded=True),
    "not causal, window, block of 24": _TOKENS._replace(causal=False, window=9, block=24),
    "negative scale and offset": _TOKENS._replace(scale=-0.4, offset=-9),
    "dims 20 and 40": _TOKENS._replace(dim=20, value_dim=40),
    "one query": _TOKENS._replace(q_len=1, offset=44),
}
TERMS = {
    "ranges": {"ranges": "random"},
    "segments": {"segments": "documents"},
    "ALiBi": {"slopes": True},
    "softcap": {"softcap": 2.0},
}


@pytest.mark.parametrize("name", CASES)
def test_equals_reference(name: str, interpreted) -> None:
    interpreted(triton_cases.gathered, CASES[name], torch.float32)


def test_half_precision(interpreted) -> None:
    interpreted(triton_cases.gathered, CASES["padding"], torch.float16)


def test_one_round(interpreted) -> None:
    interpreted(triton_cases.gathered, _TOKENS, torch.float32, scratch=1 << 29)


def test_serves_every_mask_of_sdpa(interpreted) -> None:
    for case in CASES.values():
        assert interpreted(triton_cases.gathers, case)


@pytest.mark.parametrize("name", TERMS)
def test_other_terms_go_to_the_tile_kernel(name: str, interpreted) -> None:
    case = _TOKENS._replace(**TERMS[name], q_len=12)
    assert not interpreted(triton_cases.gathers, case)
    interpreted(triton_cases.gathered, case, torch.float32)


def test_long_tiles_go_to_the_tile_kernel(interpreted) -> None:
    assert not interpreted(triton_cases.gathers, _TOKENS._replace(query_tile=64))
    assert not interpreted(triton_cases.gathers, _TOKENS._replace(heads=32))
