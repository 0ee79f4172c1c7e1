"""Hand-written models get the verdict they must, and compute what they did before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import nsa_compile
from nsa_compile.passes import decide
from nsa_compile.passes.reasons import Reason
from nsa_compile.passes.site import SiteRecord
from tests.models import (  # noqa: F401  importing a file of the zoo fills it
    zoo_masks,
    zoo_modifiers,
    zoo_modules,
    zoo_near_misses,
    zoo_spellings,
    zoo_traps,
)
from tests.models.equality import FULL_BUDGET
from tests.models.zoo import DENSE, KEPT, UNDECIDED, ZOO, build

OPTIONS = {**FULL_BUDGET, "inner": "eager"}
LENGTHS = (50, 37, 66)


@pytest.fixture(autouse=True)
def _convert_local_layers_too(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A budget that covers every key covers every window: such layers are compared as well."""
    monkeypatch.setattr(decide, "_already_local", lambda site, config: None)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _names(dynamic: bool) -> list[Any]:
    """Every second specimen is everyday with static sizes, the others with dynamic ones."""
    cases = []
    for position, (name, entry) in enumerate(ZOO.items()):
        if dynamic and not entry.dynamic:
            continue
        everyday = not entry.dynamic or bool(position % 2) == dynamic
        marks = [] if everyday else [pytest.mark.slow]
        if entry.pending:
            marks.append(pytest.mark.xfail(reason=entry.pending))
        cases.append(pytest.param(name, marks=marks))
    return cases


@pytest.mark.parametrize("name", _names(dynamic=False))
def test_static(name: str) -> None:
    check(name, LENGTHS[:1], dynamic=False)


@pytest.mark.parametrize("name", _names(dynamic=True))
def test_dynamic(name: str) -> None:
    check(name, LENGTHS, dynamic=True)


def check(name: str, lengths: tuple[int, ...], *, dynamic: bool) -> None:
    """Compile the specimen, compare every length with the dense run, then read the report."""
    entry = ZOO[name]
    model, inputs = build(name)
    fast = torch.compile(model, backend="nsa", dynamic=dynamic, options=OPTIONS)
    for length in lengths:
        arguments = inputs(length)
        expected = outcome(model, model, arguments, entry.gradients)
        found = outcome(fast, model, arguments, entry.gradients)
        assert_same(found, expected, entry.tolerance)
    report = nsa_compile.report(fast)
    fallbacks = [text for text in report.failures if "runs dense" in text]  # deliberate ones
    assert report.failures == fallbacks
    assert_verdicts([verdict(site) for site in report.sites], entry.verdicts)


def verdict(site: SiteRecord) -> str:
    """As :class:`tests.models.zoo.Specimen` writes it."""
    if site.decision != "converted":
        return str(site.reason)
    modifiers = getattr(site, "modifiers", "")
    return f"{site.mask} + {modifiers}" if modifiers else site.mask


def assert_verdicts(found: list[str], expected: tuple[str, ...]) -> None:
    reasons = {reason.code for reason in Reason}
    if expected == DENSE:
        assert set(found) <= reasons, found
    elif expected != UNDECIDED:
        shown = [KEPT if f in reasons and e == KEPT else f for f, e in zip(found, expected)]  # noqa: B905
        assert (*shown, *found[len(expected) :]) == expected, found


def outcome(
    call: Callable[..., torch.Tensor],
    model: nn.Module,
    arguments: tuple[torch.Tensor, ...],
    gradients: bool,
) -> dict[str, torch.Tensor]:
    """The output and, if asked, the gradients of every parameter and of the first argument."""
    torch.manual_seed(1)
    if not gradients:
        with torch.no_grad():
            return {"output": call(*arguments)}
    model.zero_grad()
    x = arguments[0].clone().requires_grad_()
    output = call(x, *arguments[1:])
    torch.manual_seed(2)
    (output * torch.randn(output.shape)).sum().backward()
    named = [(n, p.grad) for n, p in model.named_parameters() if p.grad is not None]
    return {"output": output.detach(), "input gradient": x.grad, **dict(named)}


def assert_same(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float
) -> None:
    """A gradient may be 0 but for rounding (that of a key bias), so all have one scale."""
    assert found.keys() == expected.keys()
    largest = max([value.abs().max() for n, value in expected.items() if n != "output"], default=1)
    for name, value in expected.items():
        scale = max(1.0, float(value.abs().max() if name == "output" else largest))
        torch.testing.assert_close(
            found[name] / scale,
            value / scale,
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )
