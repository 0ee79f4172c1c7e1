"""AOTInductor compiles a converted program, and what it made computes the same in this process."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch.export import Dim
from torch.utils.cpp_extension import CUDA_HOME

import nsa_compile
from tests.models.architectures import TrilGPT
from tests.models.equality import token_ids

SPARSE = {
    "dense_len": 0, "window": 16, "select_block": 16, "query_tile": 16, "num_selected": 4,
    "candidates": 6,
}  # fmt: skip
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a CUDA device")]),
]  # fmt: skip


@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
@pytest.mark.parametrize("device", DEVICES)
def test_a_package_computes_what_the_program_does(device: str, tmp_path: Path) -> None:
    if device == "cuda" and CUDA_HOME is None:
        pytest.skip("AOTInductor needs the headers of a CUDA toolkit")
    torch.manual_seed(0)
    model = TrilGPT(layers=1).eval().to(device)
    sizes = ({0: Dim.AUTO, 1: Dim.AUTO},)
    program = torch.export.export(model, (token_ids(96).to(device),), dynamic_shapes=sizes)
    converted, report = nsa_compile.convert(program, SPARSE)
    assert not report.skipped
    package = torch._inductor.aoti_compile_and_package(
        converted, package_path=str(tmp_path / "out.pt2")
    )
    compiled, module = torch._inductor.aoti_load_package(package), converted.module()
    with torch.no_grad():
        for length, batch in ((96, 2), (200, 1)):
            ids = token_ids(length, batch).to(device)
            torch.testing.assert_close(compiled(ids), module(ids), rtol=1e-4, atol=1e-4)
            assert (model(ids) - compiled(ids)).abs().max() > 1e-4
