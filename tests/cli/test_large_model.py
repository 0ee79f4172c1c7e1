"""The cost of looking: an 80-layer Llama-70B configuration at 65,536 tokens, in time and memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]
LLAMA_70B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8192,
    "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8,
    "vocab_size": 128256, "max_position_embeddings": 131072, "dtype": "bfloat16",
}  # fmt: skip
MEASURE = """
import json, resource, sys, time
began = time.perf_counter()
from nsa_compile.capture import capture
from nsa_compile.passes.config import NSAConfig
from nsa_compile.passes.record import record
from nsa_compile.passes.pipeline import convert
from nsa_compile.targets import Request, load
import nsa_compile.kernels.library, torch

target = load(Request(sys.argv[1], seq_len=65536))
with torch.no_grad():
    captured = capture(target.model.eval(), target.args, target.kwargs, values=target.values)
(graph,) = captured.graphs
nodes, start = len(graph.gm.graph.nodes), time.perf_counter()
decisions = convert(graph.gm, NSAConfig(), values=graph.values).decisions
rows = [record(decision, graph.compile_id) for decision in decisions]
end = time.perf_counter()
print(json.dumps({
    "nodes": nodes, "converted": sum(row.decision == "converted" for row in rows),
    "dynamo": captured.seconds, "passes": end - start, "wall": end - began,
    "gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
}))
"""


def measure(folder: Path, layers: int) -> dict[str, Any]:
    path = folder / "config.json"
    path.write_text(json.dumps({**LLAMA_70B, "num_hidden_layers": layers}))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    outcome: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(layers, outcome)
    return outcome


@pytest.mark.slow
def test_seventy_billion_parameters_within_a_minute_and_two_gigabytes(tmp_path: Path) -> None:
    outcome = measure(tmp_path, 80)
    assert outcome["converted"] == 80
    assert outcome["wall"] < 60
    assert outcome["gigabytes"] < 2
    assert outcome["passes"] <= 0.05 * outcome["dynamo"]


@pytest.mark.slow
def test_the_passes_grow_linearly_with_the_layers(tmp_path: Path) -> None:
    few, many = (measure(tmp_path, layers)["passes"] for layers in (20, 80))
    assert many < 4 * few * 1.5
