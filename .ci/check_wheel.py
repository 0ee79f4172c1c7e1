"""Check an installed wheel outside the source tree: what can be imported, and that "nsa" works."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

for name in ("kernels", "passes", "tests", "examples"):
    assert importlib.util.find_spec(name) is None, f"the wheel installs a top-level {name!r}"
assert "nsa" in torch._dynamo.list_backends(), torch._dynamo.list_backends()
assert "nsa_compile" not in sys.modules, "listing the backends imported nsa_compile"


class Attention(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)


model, x = Attention(), torch.randn(1, 2, 300, 16)
options = {
    "dense_len": 0, "window": 16, "select_block": 16, "query_tile": 16, "num_selected": 19,
    "inner": "aot_eager",
}  # fmt: skip
fast = torch.compile(model, backend="nsa", options=options)  # the entry point, by name only
torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)

import nsa_compile  # noqa: E402

report = nsa_compile.report(fast)
assert len(report.converted) == 1, report.to_json()
assert not report.failures
assert report.to_html().startswith("<!DOCTYPE html>")
home = Path(nsa_compile.__file__).resolve().parent
assert "site-packages" in home.parts, f"nsa_compile comes from {home}"
assert (home / "passes" / "config.py").is_file()
assert (home / "py.typed").is_file()
print(report)
