"""Whatever attention is written, and however: converted implies equal at full budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings

import nsa_compile
from nsa_compile.passes import decide
from tests.models.equality import FULL_BUDGET
from tests.models.zoo import BATCH, documents, hidden, keep_left
from tests.models.zoo_programs import Program, Written, programs

OPTIONS = {**FULL_BUDGET, "inner": "eager"}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 8e-2, torch.float16: 6e-3}
SHARDS = 10  # of the slow suite, so that pytest-xdist can share them out
_SETTINGS = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
# Programs that were once converted wrongly.
FOUND = (
    Program(modifier="cap", twist="uneven cap"),
    Program(spelling="bmm", mask="chunk", modifier="sinks", dynamic=True, length=53),
    Program(mask="causal document", form="fill -1e9", heads="tile", dynamic=True),
    Program(modifier="alibi keys", heads="tile"),
    Program(modifier="sinks", heads="tile"),
)


@pytest.fixture(autouse=True)
def _convert_local_layers_too(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A budget that covers every key covers every window: such layers are compared as well."""
    monkeypatch.setattr(decide, "_already_local", lambda site, config: None)
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("program", FOUND, ids=str)
def test_found_before(program: Program) -> None:
    check(program)


@given(programs())
@settings(max_examples=12, derandomize=True, **_SETTINGS)
def test_converted_is_equal(program: Program) -> None:
    check(program)


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(SHARDS))
def test_converted_is_equal_over_two_thousand_programs(shard: int) -> None:
    verdicts: Counter[str] = Counter()

    @seed(shard)
    @given(programs())
    @settings(max_examples=2000 // SHARDS, **_SETTINGS)
    def run(program: Program) -> None:
        verdicts[check(program)] += 1

    run()
    assert verdicts["converted"] > verdicts.total() // 3, verdicts


def check(program: Program) -> str:
    """Compile the program, compare outputs and gradients; -> its verdict."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Written(program)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.3)
    model = model.to(program.dtype)
    fast = torch.compile(model, backend="nsa", dynamic=program.dynamic, options=OPTIONS)
    for length in (program.length, program.length - 5) if program.dynamic else (program.length,):
        compare(program, model, fast, length)
    report = nsa_compile.report(fast)
    assert not report.failures, report.failures
    assert len(report.sites) <= 1, report.to_json()
    return report.sites[0].reason or "converted" if report.sites else "none"


def compare(program: Program, model: Written, fast: Written, length: int) -> None:
    """Outputs at valid positions; gradients where no row of the dense model is all masked."""
    torch.manual_seed(length)
    x = hidden(length).to(program.dtype)
    keep, ids = keep_left(length), documents(length)
    rows = keep.bool() if "padding" in program.mask else torch.ones(BATCH, length).bool()
    gradients = "padding" not in program.mask and program.dtype == torch.float32
    results = []
    for call in (model, fast):
        with torch.set_grad_enabled(gradients):
            x_ = x.clone().requires_grad_(gradients)
            y = call(x_, keep, ids)
        result = [y[rows].detach().float()]
        if gradients:
            (y * torch.linspace(-1, 1, y.shape[-1])).sum().backward()
            result.append(x_.grad)
        results.append(result)
    rounding = torch.zeros(())
    if program.dtype != torch.float32:
        # What the dense layer's own rounding costs it, distances of ALiBi above all.
        exact = Written(replace(program, dtype=torch.float32))
        exact.load_state_dict(model.state_dict())
        with torch.no_grad():
            error = exact(x.float(), keep, ids)[rows] - results[0][0]
        rounding = error.abs().nan_to_num(0).max()
    for name, dense, sparse in zip(("output", "gradient"), *results, strict=False):
        scale = dense.abs().nan_to_num(0).max().clamp(min=1.0)
        limit = TOLERANCE[program.dtype] + float(rounding / scale)
        torch.testing.assert_close(
            sparse / scale, dense / scale, rtol=0, atol=limit, equal_nan=True,
            msg=lambda text, name=name: f"{name} of {program}: {text}",
        )  # fmt: skip
