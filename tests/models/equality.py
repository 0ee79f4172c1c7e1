"""What "converted equals dense" means: logits at valid positions and every gradient."""

from __future__ import annotations

import torch

import nsa_compile
from tests.models.architectures import VOCABULARY, run

# Few blocks are forced and the budget covers all: selection runs and must find every block.
FULL_BUDGET = {
    "dense_len": 0, "window": 16, "select_block": 16, "query_tile": 16, "num_selected": 32,
    "inner": "aot_eager",
}  # fmt: skip
PADDED = ("llama", "gpt2", "qwen3", "mistral", "gemma2", "gpt_oss", "bloom")


def token_ids(length: int, batch: int = 2) -> torch.Tensor:
    torch.manual_seed(length)
    return torch.randint(3, VOCABULARY, (batch, length))


def padding_for(side: str, length: int) -> dict[str, torch.Tensor]:
    if side == "none":
        return {}
    mask = torch.ones(2, length, dtype=torch.long)
    count = length // 3
    if count:
        mask[0, slice(-count, None) if side == "right" else slice(count)] = 0
    return {"attention_mask": mask}


def extra_arguments(name: str) -> dict[str, object]:
    return {} if name == "tril_gpt" else {"use_cache": False}


def assert_equal(model, fast, ids, padding, extra) -> None:
    """Logits at valid positions and every parameter gradient agree with the dense model."""
    valid = padding.get("attention_mask", torch.ones_like(ids)).bool()
    outcomes = []
    for callable_ in (model, fast):
        model.zero_grad()
        logits = run(callable_, ids, **padding, **extra)
        (logits[valid].float().square().sum() / valid.sum()).backward()
        outcomes.append(
            (logits.detach()[valid], {n: p.grad.clone() for n, p in model.named_parameters()})
        )
    (dense, dense_grads), (sparse, sparse_grads) = outcomes
    torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-4)
    for name, grad in dense_grads.items():
        scale = grad.abs().max().clamp(min=1.0)
        torch.testing.assert_close(
            sparse_grads[name] / scale,
            grad / scale,
            rtol=1e-4,
            atol=1e-4,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def assert_all_converted(fast, layers: int = 2) -> None:
    report = nsa_compile.report(fast)
    assert len(report.sites) == layers, report.to_json()
    assert not report.skipped, report.to_json()
    assert not report.failures
