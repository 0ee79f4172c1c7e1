"""Prepared models in DistributedDataParallel and fully_shard train as one process does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

ROOT = Path(__file__).parents[2]
WRAPPINGS = ("ddp", "ddp_inside", "ddp_blocks", "ddp_cut", "fsdp_blocks", "fsdp_whole")

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="needs gloo"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes wrote."""
    path = tmp_path_factory.mktemp("distributed")
    command = [sys.executable, "-m", "tests.nn.distributed_training", str(path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    return path


def read(folder: Path, wrapping: str, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / f"{wrapping}-{rank}.pt")
    assert "error" not in found, found["error"]
    return found


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_processes_train_the_model_that_one_process_trains(folder: Path, wrapping: str) -> None:
    wanted = read(folder, "alone", 0)
    ranks = [read(folder, wrapping, rank) for rank in (0, 1)]
    losses = torch.tensor([found["losses"] for found in ranks]).mean(0)
    torch.testing.assert_close(losses, torch.tensor(wanted["losses"]), rtol=1e-4, atol=1e-4)
    for found in ranks:
        torch.testing.assert_close(found["state"], wanted["state"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_every_layer_is_reported(folder: Path, wrapping: str) -> None:
    rows = read(folder, wrapping, 0)["rows"]
    assert rows
    assert all(reason is None for _, reason in rows), rows
    paths = {path.removeprefix("module.") for path, _ in rows}
    # Blocks that are built alike and are graphs of their own share code and a row.
    shared = wrapping in ("ddp_blocks", "fsdp_blocks", "fsdp_whole")
    assert paths == {f"blocks.{i}.attention" for i in range(1 if shared else 2)}, rows


def test_buckets_are_cut_from_the_converted_graph(folder: Path) -> None:
    assert read(folder, "ddp", 0)["graphs"] == 1
    assert read(folder, "ddp_cut", 0)["graphs"] > 4
