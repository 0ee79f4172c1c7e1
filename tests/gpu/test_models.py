"""Real models on the GPU: compiled with Inductor, converted equals dense, forward and backward."""

from __future__ import annotations

import pytest
import torch

import nsa_compile
from tests.models.architectures import build, run
from tests.models.equality import (
    FULL_BUDGET,
    PADDED,
    assert_all_converted,
    assert_equal,
    extra_arguments,
    padding_for,
    token_ids,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def _to_gpu(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.cuda() for name, tensor in tensors.items()}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("side", ["none", "left", "right"])
# Not gpt_oss: Inductor of torch 2.11 itself gives other numbers than eager for its experts.
@pytest.mark.parametrize("name", ["tril_gpt", *(name for name in PADDED if name != "gpt_oss")])
def test_full_budget_equals_dense(name: str, side: str, dynamic: bool) -> None:
    if side != "none" and name not in PADDED:
        pytest.skip("this model takes no attention_mask")
    torch._dynamo.reset()
    torch.backends.cuda.matmul.allow_tf32 = False
    model = build(name).cuda()
    options = {**FULL_BUDGET, "inner": "inductor"}
    fast = torch.compile(model, backend="nsa", dynamic=dynamic, options=options)
    for length in (507, 63) if dynamic else (507,):
        padding = _to_gpu(padding_for(side, length))
        assert_equal(model, fast, token_ids(length).cuda(), padding, extra_arguments(name))
    assert_all_converted(fast)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_bf16_training_step_runs_and_decreases_the_loss(name: str, mode: str | None) -> None:
    torch._dynamo.reset()
    model = build(name).cuda()
    options = {"dense_len": 0, "num_selected": 8, "window": 64, "query_tile": 64}
    fast = torch.compile(model, backend="nsa", options={**options, "mode": mode})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = token_ids(1000).cuda()
    losses = []
    for _ in range(8):
        with torch.autocast("cuda", torch.bfloat16):
            logits = run(fast, ids, use_cache=False)
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert_all_converted(fast)


def test_the_default_options_run_a_long_sequence() -> None:
    torch._dynamo.reset()
    model = build("tril_gpt").cuda().bfloat16()
    for layer in model.layers:
        layer.bias = torch.tril(torch.ones(1, 1, 10240, 10240, device="cuda", dtype=torch.bool))
    fast = torch.compile(model, backend="nsa")
    with torch.no_grad():
        out = run(fast, token_ids(10240, batch=1).cuda())
    assert torch.isfinite(out).all()
    assert_all_converted(fast)
    assert nsa_compile.report(fast).sites[0].config["num_selected"] == 64
