"""What the table says of a trained variant: loss, retrieval, time, memory, share of each branch."""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from training.loop import autocast, losses_of, one_step, optimizer_of
from training.text import Corpus
from training.variants import Made, branches

BRANCHES = ("compressed", "selected", "window")
_CLOSED = -30.0  # logit of a gate that lets nothing through
_TIMED = 8


def quality(made: Made, corpus: Corpus) -> dict[str, float]:
    """Held-out loss in nats and bits a byte of plain text, and the share of values recalled."""
    count = corpus.settings.eval_batches
    loss = sum(_plain_loss(made, corpus, index) for index in range(count)) / count
    recall = sum(_recall(made, corpus, index) for index in range(count)) / count
    return {"loss": loss, "bits_per_byte": loss / math.log(2), "recall": recall}


def _plain_loss(made: Made, corpus: Corpus, index: int) -> float:
    # Gradients stay enabled: the graph that trains is used again instead of compiling another.
    return losses_of(made.model, corpus.plain(index), 1.0, corpus.device)[1].item()


def _recall(made: Made, corpus: Corpus, index: int) -> float:
    """Share of the questions whose answer is the model's first choice."""
    ids, answers = corpus.planted(index)
    with autocast(corpus.device):
        best = made.model(ids[:, :-1]).argmax(-1)
    return (best.gather(1, answers - 1) == ids.gather(1, answers)).float().mean().item()


def cost(made: Made, corpus: Corpus) -> dict[str, Any]:
    """Median milliseconds of a training step and, on a GPU, the peak memory in MiB.

    The steps have learning rate 0, so they change no weight.
    """
    settings, device = corpus.settings, corpus.device
    optimizer, batch, times = optimizer_of(made, device, 0.0), corpus.full(), []
    for warm_up in (True, *(False,) * _TIMED):
        _settle(device)
        if device == "cuda" and not warm_up:
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        one_step(made, optimizer, batch, settings, device)
        _settle(device)
        times.append((time.perf_counter() - began) * 1e3)
    peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else None
    made.weights.zero_grad(set_to_none=True)
    return {"step_ms": statistics.median(times[1:]), "peak_mib": peak}


def _settle(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def without_branches(made: Made, corpus: Corpus) -> dict[str, dict[str, float]]:
    """Quality with one branch shut in every layer: what the model has come to need it for."""
    gates = [part.gate for part in branches(made.weights)]
    held = [(gate.weight.detach().clone(), gate.bias.detach().clone()) for gate in gates]
    found = {}
    for branch, name in enumerate(BRANCHES):
        with torch.no_grad():
            for gate in gates:
                gate.weight[branch :: len(BRANCHES)] = 0.0
                gate.bias[branch :: len(BRANCHES)] = _CLOSED
        found[name] = quality(made, corpus)
        with torch.no_grad():
            for gate, (weight, bias) in zip(gates, held, strict=True):
                gate.weight.copy_(weight)
                gate.bias.copy_(bias)
    return found


def breakdown(made: Made, corpus: Corpus) -> dict[str, float]:
    """Device milliseconds of one training step by operator: attention's, products, the rest."""
    settings, device = corpus.settings, corpus.device
    optimizer, batch = optimizer_of(made, device, 0.0), corpus.full()
    one_step(made, optimizer, batch, settings, device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        one_step(made, optimizer, batch, settings, device)
        _settle(device)
    spent: dict[str, float] = {}
    total = 0.0
    for event in seen.events():
        if event.device_type == DeviceType.CUDA:  # a kernel; operators hold those they launch
            total += event.self_device_time_total / 1e3
        elif (name := _counted(event)) is not None:
            spent[name] = spent.get(name, 0.0) + event.device_time_total / 1e3
    spent["everything else"] = total - sum(spent.values())
    made.weights.zero_grad(set_to_none=True)
    return dict(sorted(spent.items(), key=lambda item: -item[1]))


def _counted(event: Any) -> str | None:
    """The row that ``event`` counts for; None inside an operator that counts already."""
    outer = event.cpu_parent
    while outer is not None:
        if _kind(outer.name) is not None:
            return None
        outer = outer.cpu_parent
    return _kind(event.name)


def _kind(name: str) -> str | None:
    """The row of :func:`breakdown` that an operator counts for."""
    if name.startswith(("nsa::", "aten::_scaled_dot_product")):
        return name
    return "matrix products" if name in ("aten::mm", "aten::addmm", "aten::bmm") else None
