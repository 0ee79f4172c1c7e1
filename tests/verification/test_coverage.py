"""The share of attention that chosen blocks hold, against a softmax written out in float64."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import nsa_compile.kernels.library  # noqa: F401
from nsa_compile.verification import coverage as module
from nsa_compile.verification.coverage import coverage

Tensor = torch.Tensor
B, HQ, HKV, T, D, TILE, BLOCK = 2, 4, 2, 75, 8, 16, 8
PADDING = torch.arange(T) < torch.tensor([[T], [50]])
STARTS = torch.tensor([0, 20, 21, 60])
DOCUMENT = torch.bucketize(torch.arange(T), STARTS, right=True)
RANGES = torch.stack([STARTS[DOCUMENT - 1], torch.tensor([20, 21, 60, T])[DOCUMENT - 1]], -1).int()[
    None
]
CASES: dict[str, dict[str, Any]] = {
    "causal": {},
    "full": {"causal": False},
    "offset": {"offset": 5},
    "window": {"window": 33},
    "padding": {"valid": PADDING},
    "ranges": {"ranges": RANGES},
    "documents": {"segments": DOCUMENT.int()[None].expand(B, T)},
    "alibi": {"slopes": torch.tensor([0.5, 0.25, 0.1, 0.05])},
    "softcap": {"softcap": 2.0},
}


def seen(causal: bool, offset: int, window: int | None, terms: dict[str, Any]) -> Tensor:
    """bool [B, Tq, Tk]."""
    i, j = torch.arange(T)[:, None] + offset, torch.arange(T)
    shown = torch.ones(B, T, T, dtype=torch.bool)
    if causal:
        shown &= j <= i
    if window is not None:
        shown &= j > i - window
    if terms.get("valid") is not None:
        shown &= terms["valid"][:, None]
    if terms.get("ranges") is not None:
        shown &= (j >= terms["ranges"][..., :1]) & (j < terms["ranges"][..., 1:])
    if terms.get("segments") is not None:
        shown &= terms["segments"][:, :, None] == terms["segments"][:, None]
    return shown


@pytest.mark.parametrize("at_once", [1 << 24, 7 * T])
@pytest.mark.parametrize("case", CASES)
def test_against_the_definition(case: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_AT_ONCE", at_once)
    torch.manual_seed(0)
    terms = dict(CASES[case])
    causal, offset = terms.pop("causal", True), terms.pop("offset", 0)
    window, softcap = terms.pop("window", None), terms.pop("softcap", 0.0)
    q, k = torch.randn(B, HQ, T, D), torch.randn(B, HKV, T, D)
    tiles, blocks = -(-T // TILE), -(-T // BLOCK)
    chosen = torch.rand(B, HKV, tiles, blocks).argsort(-1)[..., :4].int()
    ids = terms.get("segments")
    arguments = (
        q, k, k, chosen.flatten(2), terms.get("valid"), terms.get("ranges"), ids, ids,
        terms.get("slopes"), None, D**-0.5, softcap, causal, offset, window, TILE, BLOCK, 0,
    )  # fmt: skip
    _, lse = torch.ops.nsa.selected_attention(*arguments)

    logits = (q.double() @ k.double().repeat_interleave(HQ // HKV, 1).mT) * D**-0.5
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if "slopes" in terms:
        distance = torch.arange(T) - (torch.arange(T)[:, None] + offset)
        logits = logits + terms["slopes"].double()[:, None, None] * distance
    shown = seen(causal, offset, window, terms)[:, None]
    weights = logits.masked_fill(~shown, -torch.inf).softmax(-1)
    read = torch.zeros(B, HKV, tiles, blocks).scatter(-1, chosen.long(), 1.0)
    read = read.repeat_interleave(TILE, 2)[:, :, :T].repeat_interleave(BLOCK, 3)[..., :T]
    expected = (weights * read.repeat_interleave(HQ // HKV, 1)).sum(-1)
    found = coverage(lse, arguments)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_memory_is_linear_in_the_length() -> None:
    """The scores of one head alone would be 1 GB."""
    code = """
import resource, torch, nsa_compile.kernels.library
from nsa_compile.verification.coverage import coverage
T = 16384
q = torch.randn(1, 1, T, 8)
valid = torch.ones(1, T, dtype=torch.bool)
valid[0, -9:] = False
blocks = torch.arange(4, dtype=torch.int32).repeat(1, 1, T // 64)
arguments = (q, q, q, blocks, valid, *[None] * 5, 0.3, 0.0, True, 0, None, 64, 64, 0)
_, lse = torch.ops.nsa.selected_attention(*arguments)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
coverage(lse, arguments)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    )
    unit = 1024 if sys.platform != "darwin" else 1
    assert int(done.stdout) * unit < 350e6
