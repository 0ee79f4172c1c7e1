"""Two processes that train prepared models, wrapped in every way; tests read what they wrote.

Called with a folder: each process leaves ``<wrapping>-<rank>.pt`` in it.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import nsa_compile
from nsa_compile import backend

PROCESSES = 2
STEPS = 3
SIZES: dict[str, Any] = {
    "merge": "gate", "compress_block": 8, "compress_stride": 4, "select_block": 8,
    "num_selected": 4, "window": 10, "query_tile": 1, "compression": "linear", "num_mem_kv": 1,
}  # fmt: skip
COMPILED: dict[str, Any] = {"backend": "nsa", "options": {"inner": "eager"}}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.feed = Attention(), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + F.gelu(self.feed(x))


class GPT(nn.Module):
    """Token ids [B, T] -> logits [B, T, 32]."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(32, 16), nn.Linear(16, 32)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def made() -> nn.Module:
    """A prepared model whose parameters are not at their beginning."""
    torch.manual_seed(0)
    model = nsa_compile.prepare(GPT(), SIZES)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".nsa." in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def batch(step: int) -> Tensor:
    """Token ids [2 a process, 41] of all processes."""
    torch.manual_seed(step)
    return torch.randint(0, 32, (2 * PROCESSES, 41))


def train(model: nn.Module, fast: Any, part: slice) -> list[float]:
    """Losses of a few steps on ``part`` of each batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for step in range(STEPS):
        ids = batch(step)[part]
        loss = F.cross_entropy(fast(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def alone(model: nn.Module) -> Any:
    return torch.compile(model, **COMPILED)


def ddp(model: nn.Module) -> Any:
    return torch.compile(DistributedDataParallel(model), **COMPILED)


def ddp_inside(model: nn.Module) -> Any:
    return DistributedDataParallel(torch.compile(model, **COMPILED))


def ddp_blocks(model: nn.Module) -> Any:
    for block in model.blocks:
        block.compile(**COMPILED)
    return DistributedDataParallel(model)


def ddp_cut(model: nn.Module) -> Any:
    """Buckets so small that every layer is cut in two or more."""
    wrapped = DistributedDataParallel(model)
    wrapped.bucket_bytes_cap = torch.distributed._DEFAULT_FIRST_BUCKET_BYTES = 1000
    return torch.compile(wrapped, **COMPILED)


def fsdp_blocks(model: nn.Module) -> Any:
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
        block.compile(**COMPILED)
    return fully_shard(model, mesh=mesh)


def fsdp_whole(model: nn.Module) -> Any:
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return torch.compile(fully_shard(model, mesh=mesh), **COMPILED)


WRAPPINGS: dict[str, Callable[[nn.Module], Any]] = {
    each.__name__: each
    for each in (alone, ddp, ddp_inside, ddp_blocks, ddp_cut, fsdp_blocks, fsdp_whole)
}


def result(wrapping: str, rank: int) -> dict[str, Any]:
    """Losses, parameters after the steps, and the report's rows."""
    torch._dynamo.reset()
    model = made()
    fast = WRAPPINGS[wrapping](model)
    part = slice(None) if wrapping == "alone" else slice(2 * rank, 2 * rank + 2)
    with mock.patch.object(backend, "lookup_backend", wraps=backend.lookup_backend) as compiles:
        losses = train(model, fast, part)
    state = {
        name: getattr(x, "full_tensor", lambda x=x: x)().detach()
        for name, x in model.named_parameters()
    }
    rows = [(row.module, row.reason_text) for row in nsa_compile.report(fast).sites]
    return {"losses": losses, "state": state, "rows": rows, "graphs": compiles.call_count}


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=PROCESSES)
    for wrapping in WRAPPINGS:
        try:
            found = result(wrapping, rank)
        except Exception:
            found = {"error": traceback.format_exc()}
        torch.save(found, Path(folder) / f"{wrapping}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    multiprocessing.spawn(process, args=(sys.argv[1],), nprocs=PROCESSES)
