"""nsa_compile.convert keeps what a program promises: signature, weights, sizes, checks."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

import nsa_compile
from nsa_compile.export import save
from tests.models.architectures import build, run
from tests.models.equality import FULL_BUDGET, token_ids

ROOT = Path(__file__).parents[2]
# A budget that leaves keys out: equal numbers are the compiled model's, not the dense one's.
SPARSE = {
    "dense_len": 0, "window": 16, "select_block": 16, "query_tile": 16, "num_selected": 4,
    "candidates": 4,
}  # fmt: skip
LOAD = """
import sys, torch, nsa_compile
{imports}
program = torch.export.load(sys.argv[1])
torch.save([program.module()(*args, **kwargs) for args, kwargs in torch.load(sys.argv[2])],
           sys.argv[3])
"""


class Cached(nn.Module):
    """Writes keys and values into buffers, as a static cache does, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.tied = nn.Linear(32, 32, bias=False)
        self.again = nn.Linear(32, 32, bias=False)
        self.again.weight = self.tied.weight
        self.register_buffer("keys", torch.zeros(1, 4, 96, 8))
        self.register_buffer("values", torch.zeros(1, 4, 96, 8))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long), persistent=False)

    def forward(self, x: torch.Tensor, log: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = (y.view(1, 96, 4, 8).transpose(1, 2) for y in self.qkv(x).split(32, 2))
        self.keys.copy_(k)
        self.values.copy_(v)
        self.calls.add_(1)
        log.add_(x.sum())
        y = F.scaled_dot_product_attention(q, self.keys, self.values, is_causal=True)
        y = y.transpose(1, 2).reshape(1, 96, 32)
        return self.again(self.tied(y)), self.calls


class Padded(nn.Module):
    """Scores with arithmetic on a padding mask of integers."""

    def forward(self, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        q = x.view(2, -1, 4, 8).transpose(1, 2)
        bias = (1.0 - keep[:, None, None, :].to(x.dtype)) * -1e9
        return ((q @ q.mT) / 8**0.5 + bias).softmax(-1) @ q


def export(model: nn.Module, *args: torch.Tensor, **options: Any) -> torch.export.ExportedProgram:
    return torch.export.export(model.eval(), args, **options)


@pytest.mark.parametrize("name", ["tril_gpt", "llama"])
def test_a_saved_program_computes_in_another_process_what_the_compiled_model_does(
    name: str, tmp_path: Path
) -> None:
    model = build(name)
    auto = {0: Dim.AUTO, 1: Dim.AUTO}
    extra = {} if name == "tril_gpt" else {"use_cache": False}
    shapes = {"input_ids": auto, **dict.fromkeys(extra)}
    program = torch.export.export(
        model, (), {"input_ids": token_ids(128), **extra}, dynamic_shapes=shapes
    )
    converted, report = nsa_compile.convert(program, SPARSE)
    assert [site.mask for site in report.sites] == ["causal", "causal"]
    assert report.model == type(model).__name__
    save(converted, tmp_path / "out.pt2")

    calls = [((), {"input_ids": token_ids(n, batch), **extra}) for n, batch in ((128, 2), (201, 3))]
    torch.save(calls, tmp_path / "calls.pt")
    imports = "" if name == "tril_gpt" else "import transformers.models.llama.modeling_llama"
    files = [tmp_path / file for file in ("out.pt2", "calls.pt", "results.pt")]
    command = [sys.executable, "-c", LOAD.format(imports=imports), *map(str, files)]
    subprocess.run(command, check=True, cwd=ROOT)
    results = torch.load(tmp_path / "results.pt", weights_only=False)

    torch._dynamo.reset()
    fast = torch.compile(model, backend="nsa", dynamic=True, options={**SPARSE, "inner": "eager"})
    with torch.no_grad():
        for (_, kwargs), result in zip(calls, results, strict=True):
            expected = run(fast, kwargs["input_ids"], **extra)
            found = result if isinstance(result, torch.Tensor) else result.logits
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            assert (run(model, kwargs["input_ids"], **extra) - expected).abs().max() > 1e-3


def test_the_signature_stays_and_state_goes_on_being_written() -> None:
    model = Cached()
    program = export(model, torch.randn(1, 96, 32), torch.zeros(()))
    converted, report = nsa_compile.convert(program, SPARSE)
    assert not report.skipped
    assert converted.graph_signature.input_specs == program.graph_signature.input_specs
    kinds = [(spec.kind, spec.target) for spec in program.graph_signature.output_specs]
    assert [(s.kind, s.target) for s in converted.graph_signature.output_specs] == kinds
    assert converted.state_dict.keys() == program.state_dict.keys()
    for name, tensor in program.state_dict.items():
        assert converted.state_dict[name].data_ptr() == tensor.data_ptr()
    module, dense, log = converted.module(), program.module(), torch.zeros(())
    assert module.tied.weight is module.again.weight
    x = torch.randn(1, 96, 32)
    for expected in (1, 2):
        assert module(x, log)[1] == expected
    dense(x, torch.zeros(()))
    torch.testing.assert_close(module.keys, dense.keys)
    torch.testing.assert_close(log, 2 * x.sum())


def test_a_decomposed_program_with_mutations_in_its_outputs() -> None:
    program = export(Cached(), torch.randn(1, 96, 32), torch.zeros(())).run_decompositions({})
    assert program.graph_signature.buffers_to_mutate
    converted, report = nsa_compile.convert(program, FULL_BUDGET)
    assert not report.skipped
    x = torch.randn(1, 96, 32)
    found, expected = (p.module()(x, torch.zeros(())) for p in (converted, program))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_mask_buffer_is_no_constant_where_the_program_writes_to_it() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("tril", torch.ones(96, 96, dtype=torch.bool).tril())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = F.scaled_dot_product_attention(x, x, x, attn_mask=self.tril)
            self.tril.logical_not_()
            return y

    program = export(Written(), torch.randn(1, 2, 96, 8))
    for form in (program, program.run_decompositions({})):
        converted, report = nsa_compile.convert(form, SPARSE)
        assert [site.decision for site in report.sites] == ["kept"]
        assert converted is form


def test_a_changed_mask_buffer_is_an_error_and_equal_ones_share_a_copy() -> None:
    program = export(build("tril_gpt"), token_ids(64))
    converted, _ = nsa_compile.convert(program, SPARSE)
    assert len(converted.constants) == len(program.constants) + 1
    module = converted.module()
    module(token_ids(64))
    module.get_buffer("layers.1.bias")[..., 5, 4] = 0
    with pytest.raises(RuntimeError, match="mask buffer b_layers_1_bias changed: convert"):
        module(token_ids(64))


def test_padding_numbers_are_checked() -> None:
    keep = torch.ones(2, 96, dtype=torch.long)
    keep[0, 70:] = 0
    program = export(Padded(), torch.randn(2, 96, 32), keep)
    converted, report = nsa_compile.convert(program, FULL_BUDGET)
    assert [site.mask for site in report.sites] == ["padding"]
    x = torch.randn(2, 96, 32)
    torch.testing.assert_close(converted.module()(x, keep), program.module()(x, keep))
    with pytest.raises(RuntimeError, match="padding mask keep holds more than 0 and 1"):
        converted.module()(x, 2 * keep)


def test_a_view_that_counts_on_the_strides_of_dense_attention() -> None:
    """As nn.MultiheadAttention has it, whose first dimension is time."""

    class TimeFirst(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q = x.view(96, 2, 4, 8).permute(1, 2, 0, 3)
            y = F.scaled_dot_product_attention(q, q, q, is_causal=True)
            return y.permute(2, 0, 1, 3).contiguous().view(192, 32)

    x = torch.randn(96, 2, 32)
    program = export(TimeFirst(), x)
    graph = program.graph_module
    for node in list(graph.graph.nodes):  # some versions of torch leave it out when they export
        if "contiguous" in str(node.target) or "clone" in str(node.target):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    graph.recompile()
    converted, report = nsa_compile.convert(program, FULL_BUDGET)
    assert not report.skipped
    torch.testing.assert_close(converted.module()(x), program.module()(x), rtol=1e-4, atol=1e-4)


def test_gradients_are_those_of_the_compiled_model() -> None:
    model = build("tril_gpt")
    converted, _ = nsa_compile.convert(export(model, token_ids(96)), SPARSE)
    module = converted.module()
    module(token_ids(96)).square().mean().backward()
    torch._dynamo.reset()
    fast = torch.compile(model, backend="nsa", options={**SPARSE, "inner": "eager"})
    fast(token_ids(96)).square().mean().backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(module.get_parameter(name).grad, weight.grad)


def test_a_prepared_model_keeps_its_gates() -> None:
    model = nsa_compile.prepare(
        build("tril_gpt"), {"merge": "gate", "window": 16, "num_selected": 4, "compression": "mlp"}
    )
    converted, report = nsa_compile.convert(export(model, token_ids(96)))
    assert [site.config["merge"] for site in report.sites] == ["gate", "gate"]
    assert all(node.target is not torch.ops.nsa.site.default for node in converted.graph.nodes)
    torch._dynamo.reset()
    fast = torch.compile(model, backend="nsa", options={"inner": "eager"})
    with torch.no_grad():
        torch.testing.assert_close(converted.module()(token_ids(96)), fast(token_ids(96)))


def test_nothing_to_convert_is_the_same_program() -> None:
    program = export(nn.Linear(3, 3), torch.randn(2, 3))
    converted, report = nsa_compile.convert(program)
    assert converted is program
    assert not report.sites
    assert report.model == "Linear"


@pytest.mark.parametrize("selector", ["local", "topk"])
def test_other_selectors(selector: str) -> None:
    model, options = build("tril_gpt"), {**SPARSE, "selector": selector}
    converted, _ = nsa_compile.convert(export(model, token_ids(96)), options)
    torch._dynamo.reset()
    fast = torch.compile(model, backend="nsa", options={**options, "inner": "eager"})
    with torch.no_grad():
        torch.testing.assert_close(converted.module()(token_ids(96)), fast(token_ids(96)))


def test_a_selector_that_reads_values_is_refused() -> None:
    def selector(q: torch.Tensor, k: torch.Tensor, **_: Any) -> torch.Tensor:
        blocks = 0 if q.sum() > 0 else 1
        return torch.full((k.shape[0], k.shape[1], q.shape[2] // 16, 4), blocks)

    program = export(build("tril_gpt"), token_ids(96))
    with pytest.raises(nsa_compile.ConvertError, match="rewrite failed: GuardOnData"):
        nsa_compile.convert(program, {**SPARSE, "selector": selector})


def test_only_exported_programs_are_taken() -> None:
    with pytest.raises(TypeError, match=r"expected a torch.export.ExportedProgram, got Linear"):
        nsa_compile.convert(nn.Linear(2, 2))
    with pytest.raises(nsa_compile.NSAConfigError, match="unknown option"):
        nsa_compile.convert(export(nn.Linear(2, 2), torch.ones(1, 2)), {"windows": 3})


def test_a_file_says_what_loads_it(tmp_path: Path) -> None:
    path = tmp_path / "out.pt2"
    save(nsa_compile.convert(export(build("tril_gpt"), token_ids(64)), SPARSE)[0], path)
    with zipfile.ZipFile(path) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("nsa_compile.txt"))
        assert b"import torch, nsa_compile" in archive.read(name)
    code = f"import torch; torch.export.load({str(path)!r})"
    failed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert failed.returncode == 1
    assert "torch.ops.nsa" in failed.stderr
    assert "import the custom op" in failed.stderr
