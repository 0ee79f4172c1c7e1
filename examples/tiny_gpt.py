"""A byte-level GPT that trains on Python's own sources, first dense, then with backend="nsa".

    nsa-convert examples/tiny_gpt.py          which layers would be converted, without training
    python examples/tiny_gpt.py               train it; two to five minutes on two CPU cores

The training run shows three things: the held-out loss of the dense model, the loss of the same
weights the moment they are compiled with ``backend="nsa"`` (nothing is trained for that), and how
both go on training from there.
"""

from __future__ import annotations

import argparse
import copy
import math
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

import nsa_compile

BYTES = 256
# Small enough that the sparse path has to choose: 8 blocks of 32 keys out of a context of 1024.
NSA = {
    "dense_len": 0, "select_block": 32, "num_selected": 8, "window": 64, "query_tile": 64,
}  # fmt: skip


class Attention(nn.Module):
    """Causal self-attention, [B, T, width] -> [B, T, width]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        split = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm_attention(x))
        return x + self.mlp(self.norm_mlp(x))


class TinyGPT(nn.Module):
    """Byte ids [B, T] -> logits [B, T, 256]."""

    def __init__(self, context: int, width: int = 128, layers: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.byte = nn.Embedding(BYTES, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, BYTES, bias=False)
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=width**-0.5 / 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.byte(ids) + self.position(positions)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def build(seq_len: int = 32768, batch: int = 1) -> tuple[nn.Module, torch.Tensor]:
    """What nsa-convert looks at: the model and example inputs of the asked size."""
    return TinyGPT(seq_len), torch.zeros(batch, seq_len, dtype=torch.long)


class Text:
    """The standard library's sources as bytes; every tenth file is held out."""

    def __init__(self, context: int, batch: int, device: str) -> None:
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        self.train = _bytes([file for i, file in enumerate(files) if i % 10])
        self.held_out = _bytes(files[::10])
        self.context, self.batch, self.device = context, batch, device
        if min(len(self.train), len(self.held_out)) <= context + 1:
            raise SystemExit(f"--context {context} is longer than the text; choose a smaller one")

    def sample(self, data: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Random windows, int64 [B, context + 1]."""
        starts = torch.randint(len(data) - self.context - 1, (self.batch,), generator=generator)
        rows = [data[start : start + self.context + 1] for start in starts.tolist()]
        return torch.stack(rows).long().to(self.device)


def _bytes(files: list[Path]) -> torch.Tensor:
    return torch.frombuffer(
        bytearray(b"\n".join(file.read_bytes() for file in files)), dtype=torch.uint8
    )


def loss_of(model: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    logits = model(rows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def held_out_bits(model: Callable[[torch.Tensor], torch.Tensor], text: Text, batches: int) -> float:
    """Bits per byte on the held-out files; the same windows for every model."""
    generator = torch.Generator().manual_seed(1)
    # Gradients stay enabled: the graph that trains is used again instead of compiling another.
    losses = [loss_of(model, text.sample(text.held_out, generator)).item() for _ in range(batches)]
    return sum(losses) / len(losses) / math.log(2)


def train(
    model: Callable[[torch.Tensor], torch.Tensor],
    weights: nn.Module,
    text: Text,
    steps: int,
    bar: Progress,
    name: str,
) -> float:
    """Run AdamW for ``steps``; returns seconds a step, the first (which compiles) left out."""
    optimizer = torch.optim.AdamW(weights.parameters(), lr=2e-3, betas=(0.9, 0.95))
    warmup = max(steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 1 - 0.9 * step / max(steps, 1))
    )
    generator = torch.Generator().manual_seed(0)
    task, began = bar.add_task(name, total=steps, loss=math.nan), time.perf_counter()
    for step in range(steps):
        loss = loss_of(model, text.sample(text.train, generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.update(task, advance=1, loss=loss.item() / math.log(2))
        if step == 0:
            began = time.perf_counter()
    return (time.perf_counter() - began) / max(steps - 1, 1)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a tiny GPT dense, then with backend='nsa'.")
    parser.add_argument("--steps", type=int, default=300, help="dense steps (half as many after)")
    parser.add_argument("--context", type=int, default=1024, help="bytes in a sequence")
    parser.add_argument("--batch", type=int, default=2, help="sequences in a step")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--inner", default="inductor", help="inductor, aot_eager or eager")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    torch.manual_seed(0)
    text = Text(arguments.context, arguments.batch, arguments.device)
    batches = min(16, max(arguments.steps // 4, 1))
    dense = TinyGPT(arguments.context).to(arguments.device)
    columns = (
        TextColumn("{task.description:28}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[loss]:.3f} bits/byte"), TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns) as bar:
        train(dense, dense, text, arguments.steps, bar, "dense")
        twin = copy.deepcopy(dense)
        fast = torch.compile(
            twin, backend="nsa", dynamic=False, options={**NSA, "inner": arguments.inner}
        )
        before = held_out_bits(dense, text, batches), held_out_bits(fast, text, batches)
        more = max(arguments.steps // 2, 1)
        times = (
            train(dense, dense, text, more, bar, "dense, continued"),
            train(fast, twin, text, more, bar, "nsa, same start"),
        )
        after = held_out_bits(dense, text, batches), held_out_bits(fast, text, batches)
    print(f"\nheld-out bits per byte, context {arguments.context} on {arguments.device}")
    print(f"{'':34}{'dense':>8}{'nsa':>8}")
    print(f"{f'after {arguments.steps} dense steps':34}{before[0]:8.3f}{before[1]:8.3f}")
    print(f"{f'after {more} more steps, each its own':34}{after[0]:8.3f}{after[1]:8.3f}")
    print(f"{'milliseconds a step':34}{times[0] * 1e3:8.0f}{times[1] * 1e3:8.0f}\n")
    print(nsa_compile.report(fast))


if __name__ == "__main__":
    main()
