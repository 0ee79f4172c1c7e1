"""Runs a captured graph and computes every site again, densely, from what was read off it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from nsa_compile.passes.masks.evaluate import evaluate
from nsa_compile.passes.site import AttentionSite, Mask, Steps
from tests.passes.checking import Checker


class Matched(Checker):
    """``torch.compile(f, backend=matched)`` runs f and compares every site with its result."""

    may_guard = True  # a run-time float that enters the formula is fixed by one

    def recorder(self, gm: fx.GraphModule, sites: Sequence[AttentionSite]) -> Recorder:
        return Recorder(gm, sites)


def match(f: Callable[..., Any], *calls: tuple[Any, ...], dynamic: bool | None = None) -> Matched:
    """Compile ``f``, call it with each of ``calls``, return what was found and compared."""
    torch._dynamo.reset()
    matched = Matched()
    compiled = torch.compile(f, backend=matched, dynamic=dynamic)
    with torch.no_grad():
        for call in calls:
            compiled(*call)
    return matched


def dense(site: AttentionSite, at: Callable[[Any], Any]) -> torch.Tensor:
    """What ``site`` says it computes, in float64; ``at`` gives the run's value of a node."""
    mask = site.mask
    assert isinstance(mask, Mask)
    q, k, v = (
        apply(at(node).double(), steps, at)
        for node, steps in (
            (site.query, site.query_steps),
            (site.key, site.key_steps),
            (site.value, site.value_steps),
        )
    )
    assert (q.shape[1], k.shape[1], q.shape[3]) == (site.q_heads, site.kv_heads, site.head_dim)
    assert v.shape[:3] == k.shape[:3]
    group = site.q_heads // site.kv_heads
    logits = at(site.scale) * q @ k.repeat_interleave(group, 1).mT
    modifiers = site.modifiers
    if modifiers.softcap:
        logits = modifiers.softcap * torch.tanh(logits / modifiers.softcap)
    if modifiers.slopes is not None:
        slopes = at(modifiers.slopes)
        slopes = torch.as_tensor(slopes).double().reshape(1, -1, 1, 1)
        positions = at(modifiers.positions)
        positions = torch.arange(k.shape[2]) if positions is None else positions[:, None, None]
        logits = logits + slopes * positions.double()
    seen = evaluate(
        mask, q.shape[2], k.shape[2], **{n: at(getattr(mask, n)) for n in ("valid", "offset")}
    )
    logits = logits.masked_fill(~seen, -torch.inf)
    if modifiers.sinks is not None:
        sinks = at(modifiers.sinks).double().reshape(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sinks], -1)
    weights = logits.softmax(-1)[..., : k.shape[2]].nan_to_num(0)
    return apply(weights @ v.repeat_interleave(group, 1), site.output_steps, at)


def apply(x: torch.Tensor, steps: Steps, at: Callable[[Any], Any]) -> torch.Tensor:
    """``x`` after a site's steps."""
    for target, args in steps:
        args = tuple(at(a) for a in args)
        x = getattr(x, target)(*args) if isinstance(target, str) else target(x, *args)
    return x


class Recorder(fx.Interpreter):
    """Runs a graph and keeps what every site reads and answers."""

    def __init__(self, gm: fx.GraphModule, sites: Sequence[AttentionSite]) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.outputs = {site.output: site for site in sites}
        self.results: dict[fx.Node, torch.Tensor] = {}
        self.expected: dict[fx.Node, torch.Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        site = self.outputs.get(n)
        if site is not None and isinstance(site.mask, Mask):
            self.expected[n] = dense(site, self._value)
        result = super().run_node(n)
        if site is not None:
            self.results[n] = result.clone()
        return result

    def _value(self, argument: Any) -> Any:
        return self.env[argument] if isinstance(argument, fx.Node) else argument

    def compare(self, site: AttentionSite) -> None:
        expected, result = self.expected[site.output], self.results[site.output]
        tolerance = {torch.float32: 1e-4}.get(result.dtype, 2e-2)
        assert expected.shape == result.shape
        rows = expected.abs().sum(-1) > 0  # rows without keys: whatever the model makes of them
        torch.testing.assert_close(
            expected[rows].float(), result[rows].float(), rtol=tolerance, atol=tolerance
        )
