"""nsa-convert with a model's weights: --verify and --save, and what a user can get wrong there."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.running import MODELS, Runner, convert
from tests.cli.test_bad_input import check
from tests.models.architectures import build
from tests.models.equality import token_ids

__all__ = ["convert"]
SPARSE = [
    word
    for option in ("dense_len=0", "window=8", "select_block=8", "query_tile=8", "num_selected=3",
                   "compress_stride=8", "compress_block=8", "candidates=3")
    for word in ("--option", option)
]  # fmt: skip
SCRIPT = """
import torch
from tests.models.architectures import build as made
from tests.models.equality import token_ids
def build(): return made("tril_gpt"), token_ids(200)
def alone(): return made("tril_gpt")
def labelled():
    return made("llama"), {"input_ids": token_ids(99), "labels": token_ids(99), "use_cache": False}
def on_meta(): return made("tril_gpt").to("meta"), token_ids(200)
def branches():
    class Model(torch.nn.Module):
        def forward(self, x): return x * 2 if x.sum() > 0 else x
    return Model(), torch.randn(2, 2)
"""


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "target.py"
    path.write_text(SCRIPT)
    return path


def same(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("error::FutureWarning")
def test_a_script_is_saved_with_the_weights_that_it_makes(
    convert: Runner, script: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.pt2"
    outcome = convert(script, "--save", out, *SPARSE)
    assert outcome.status == 0, outcome.err
    assert outcome.verdicts() == [(f"layers.{i}", "converted", None) for i in range(2)]
    assert outcome.out.endswith(
        f"saved {out}: 2 of 2 attention layers converted\n"
        f'  to load it: import torch, nsa_compile; program = torch.export.load("{out}")\n'
        "  to call it: program.module()(int64[2, 200])\n"
    )
    program = torch.export.load(out)
    weights = build("tril_gpt").state_dict()
    assert program.state_dict.keys() == weights.keys()
    assert all(torch.equal(program.state_dict[name], weights[name]) for name in weights)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "out.pt2", "report.json", "target.py",
    ]  # fmt: skip


def test_a_program_is_run_on_inputs_like_its_own_alone(convert: Runner, tmp_path: Path) -> None:
    program, data = tmp_path / "in.pt2", tmp_path / "data.pt"
    ids = token_ids(96)
    torch.export.save(torch.export.export(build("tril_gpt"), (ids,)), program)
    for given, words in (
        (token_ids(95), "takes (int64[2, 96]), got (int64[2, 95]); pass"),
        ({"input_ids": ids}, "takes (int64[2, 96]), got (input_ids=int64[2, 96]); pass"),
        ((ids, 3), "got (int64[2, 96], 3); pass"),
    ):
        torch.save(given, data)
        outcome = convert(program, "--verify", "--data", data)
        check(outcome.status, outcome.err, words)


def test_named_sizes_stay_symbolic(convert: Runner, script: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.pt2"
    given = ("--seq-len", 64, "--inputs", "int64[B,T]", *SPARSE)
    assert convert(f"{script}:alone", "--save", out, *given).status == 0
    module = torch.export.load(out).module()
    fast = torch.compile(build("tril_gpt"), backend="nsa", options=options())
    with torch.no_grad():
        for ids in (token_ids(64), token_ids(130, 3)):
            same(module(ids), fast(ids))


def options() -> dict[str, Any]:
    pairs = (word.split("=") for word in SPARSE[1::2])
    return {**{name: int(value) for name, value in pairs}, "inner": "eager"}


def test_a_program_in_is_a_program_out(convert: Runner, tmp_path: Path) -> None:
    program, out = tmp_path / "in.pt2", tmp_path / "out.pt2"
    torch.export.save(torch.export.export(build("tril_gpt"), (token_ids(96),)), program)
    outcome = convert(program, "--save", out, "--verify", *SPARSE)
    assert outcome.status == 0, outcome.err
    assert outcome.json["verification"]["end_to_end"]["relative_error"] > 0.1
    fast = torch.compile(build("tril_gpt"), backend="nsa", options=options())
    with torch.no_grad():
        same(torch.export.load(out).module()(token_ids(96)), fast(token_ids(96)))
    assert convert(program, "--save", program, *SPARSE).status == 0  # in place
    assert program.read_bytes() != out.read_bytes()
    torch.export.load(program)


DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a CUDA device")]),
]  # fmt: skip
TILES = [word.replace("=8", "=16") for word in SPARSE]


@pytest.mark.parametrize("device", DEVICES)
def test_model_and_program_go_to_the_device(
    convert: Runner, script: Path, tmp_path: Path, device: str
) -> None:
    first, second = tmp_path / "first.pt2", tmp_path / "second.pt2"
    torch.export.save(torch.export.export(build("tril_gpt"), (token_ids(96),)), first)
    for target in (script, first):
        outcome = convert(target, "--verify", "--save", second, "--device", device, *TILES)
        assert outcome.status == 0, outcome.err
        found = outcome.json["verification"]
        assert found["device"].partition(":")[0] == device
        assert found["end_to_end"]["relative_error"] > 1e-3
        program = torch.export.load(second)
        assert {x.device.type for x in program.state_dict.values()} == {device}
        args, _ = program.example_inputs
        with torch.no_grad():
            assert program.module()(*args).device.type == device
        outcome = convert(second, "--verify")
        assert outcome.json["verification"]["device"].partition(":")[0] == device
        assert "second.pt2 was converted before" in outcome.err


def test_verify_prints_the_layers_and_finds_those_to_keep(convert: Runner, script: Path) -> None:
    page = script.parent / "report.md"
    outcome = convert(script, "--verify", "--tolerance", "0.2", "--markdown", page, *SPARSE)
    assert outcome.status == 0, outcome.err
    assert "TrilGPT: 2 converted layers, relative error of the output" in outcome.out
    assert 'add to the options: {"exclude": [' in outcome.out
    found = outcome.json["verification"]
    assert [layer["module"] for layer in found["layers"]] == ["layers.0", "layers.1"]
    assert found["suggestion"]["met"]
    assert found["suggestion"]["relative_error"] <= 0.2
    assert found["threshold"] == 0.2
    assert "Verified on cpu: relative error of the output" in page.read_text()


def test_weights_that_nobody_loaded_are_noted(convert: Runner, script: Path) -> None:
    note = "drew random numbers and loaded no state_dict: if its weights are random"
    script.write_text(
        SCRIPT
        + "def loaded():\n    model, ids = build()\n    model.load_state_dict(model.state_dict())\n"
        "    return model, ids\n"
    )
    assert note in convert(script, "--verify", *SPARSE).err
    assert note not in convert(f"{script}:loaded", "--verify", *SPARSE).err
    assert note not in convert(script, *SPARSE).err


def test_a_saved_program_keeps_dense_what_the_tolerance_asks(
    convert: Runner, script: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.pt2"
    outcome = convert(script, "--verify", "--tolerance", "0", "--save", out, *SPARSE)
    assert [site["reason"] for site in outcome.json["sites"]] == ["excluded", "excluded"]
    with torch.no_grad():
        same(torch.export.load(out).module()(token_ids(200)), build("tril_gpt")(token_ids(200)))


def test_labels_give_perplexity_and_data_comes_from_a_file(
    convert: Runner, script: Path, tmp_path: Path
) -> None:
    outcome = convert(f"{script}:labelled", "--verify", *SPARSE)
    assert outcome.status == 0, outcome.err
    assert "perplexity: dense" in outcome.out
    data = tmp_path / "batch.pt"
    batch = {"input_ids": token_ids(70), "labels": token_ids(70)}
    torch.save(batch, data)
    given = ("--seq-len", "64", "--verify", "--data", data)
    found = convert(f"{script}:alone", *given, *SPARSE).json["verification"]
    assert found["end_to_end"]["shape"] == [2, 70, 61]
    assert found["end_to_end"]["perplexity_dense"] > 1
    for other in (batch["input_ids"], (batch["input_ids"],)):
        torch.save(other, data)
        assert convert(f"{script}:alone", *given, *SPARSE).status == 0


def test_a_hugging_face_directory_is_read_with_its_weights(convert: Runner, tmp_path: Path) -> None:
    folder, out = tmp_path / "llama", tmp_path / "out.pt2"
    build("llama").save_pretrained(folder)
    data = tmp_path / "batch.pt"
    torch.save({"input_ids": token_ids(90)}, data)
    given = ("--seq-len", "90", "--verify", "--data", data, "--save", out, *SPARSE)
    outcome = convert(folder, *given)
    assert outcome.status == 0, outcome.err
    assert "random" not in outcome.err
    assert "import torch, nsa_compile, transformers.modeling_outputs; program" in outcome.out
    assert outcome.json["verification"]["end_to_end"]["top1_agreement"] < 1
    with torch.no_grad():
        found = torch.export.load(out).module()(input_ids=token_ids(90)[:1], use_cache=False)
        fast = torch.compile(build("llama"), backend="nsa", options=options())
        same(found.logits, fast(token_ids(90)[:1], use_cache=False).logits)

    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.0.self_attn.q_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    outcome = convert(folder, *given)
    assert outcome.status == 0
    assert "note: 1 weights are not in the files of" in outcome.err
    assert "are random: model.layers.0.self_attn.q_proj.weight; what is measured" in outcome.err
    file.unlink()
    outcome = convert(folder, *given)
    check(outcome.status, outcome.err, "describes a model without its weights")


LLAMA = (
    "llama", "--seq-len", "8", "--hf-config", "num_hidden_layers=1", "--hf-config",
    "hidden_size=64", "--hf-config", "intermediate_size=64", "--hf-config", "vocab_size=99",
)  # fmt: skip
MISTAKES = {
    "save to another suffix": ((MODELS, "--save", "out.pt"), "--save expects a path that ends in"),
    "save into nowhere": ((MODELS, "--save", "no/such/a.pt2"), "directory no/such does not exist"),
    "save over a folder": ((MODELS, "--save", "folder.pt2"), "is a directory; expected a file"),
    "tolerance in words": (
        (MODELS, "--verify", "--tolerance", "small"), "expected a number from 0 up, got 'small'",
    ),
    "tolerance below nothing": ((MODELS, "--verify", "--tolerance", "-1"), "number from 0 up"),
    "tolerance without end": ((MODELS, "--verify", "--tolerance", "inf"), "number from 0 up"),
    "tolerance alone": ((MODELS, "--tolerance", "0.1"), "--tolerance needs --verify"),
    "data alone": ((MODELS, "--data", "x.pt"), "--data needs --verify"),
    "verify without inputs": (
        (f"{MODELS}:just_a_model", "--seq-len", "48", "--verify"),
        "--verify runs the model and needs inputs with values: pass --data",
    ),
    "verify with shapes": (
        (MODELS, "--inputs", "int64[1,48]", "--verify"), "needs inputs with values",
    ),
    "data that is not there": ((MODELS, "--verify", "--data", "x.pt"), "--data x.pt: no such file"),
    "data that is no file of torch": (
        (MODELS, "--verify", "--data", MODELS), "expected a file of torch.save with tensors",
    ),
    "data of a number": ((MODELS, "--verify", "--data", "three.pt"), "by name, got int"),
    "data that runs code": ((MODELS, "--verify", "--data", "code.pt"), "expected a file of torch"),
    "inputs that do not fit": (
        (MODELS, "--verify", "--data", "wrong.pt"), "--verify: Model failed: ",
    ),
    "inputs of another name": (
        (MODELS, "--verify", "--data", "named.pt"), "--verify: Model failed: ",
    ),
    "labels that do not fit": (
        (MODELS, "--verify", "--data", "labels.pt"), "labels must be token ids [B, T]",
    ),
    "a model type": ((*LLAMA, "--verify"), "describes a model without its weights"),
    "a model type to save": ((*LLAMA, "--save", "a.pt2"), "describes a model without its weights"),
    "weights on meta": (
        ("target.py:on_meta", "--verify"), "weights are on the meta device (embed.weight, ...)",
    ),
    "a device that is not there": (
        (MODELS, "--verify", "--device", "cuda"), "--device cuda: torch sees no GPU here",
    ),
    "a device nobody knows": ((MODELS, "--verify", "--device", "moon"), "invalid choice: 'moon'"),
    "device alone": ((MODELS, "--device", "cpu"), "--device needs --verify, --bench or --save"),
    "labels beyond the vocabulary": (
        (MODELS, "--verify", "--data", "beyond.pt"), "or -100 for none; got 100000",
    ),
    "labels that are no ids": (
        (MODELS, "--verify", "--data", "float.pt"), "], got torch.float32",
    ),
    "labels in words": (
        (MODELS, "--verify", "--data", "words.pt"), "], got str",
    ),
    "what torch cannot export": (
        ("target.py:branches", "--save", "a.pt2"), "torch.export cannot capture Model: ",
    ),
    "no output": ((f"{MODELS}:convolution", "--diff", "a", "b", "--save", "c"), "no TARGET"),
}  # fmt: skip


LABELS = {
    "beyond": torch.full((2, 48), 100_000), "float": torch.rand(1, 48),
    "words": "none",
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(
    case: str, script: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nsa_compile.cli import main

    if "is not there" in case and "device" in case:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    monkeypatch.chdir(script.parent)
    Path("folder.pt2").mkdir()
    torch.save(3, "three.pt")
    torch.save(Path, "code.pt")
    torch.save(torch.full((1, 48), 100_000), "wrong.pt")
    torch.save({"tokens": token_ids(48)}, "named.pt")
    torch.save({"ids": token_ids(48), "labels": token_ids(20)}, "labels.pt")
    for name, labels in LABELS.items():
        torch.save({"ids": token_ids(48), "labels": labels}, f"{name}.pt")
    arguments, words = MISTAKES[case]
    status = main([str(argument) for argument in arguments])
    check(status, capsys.readouterr().err, words)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_to(convert: Runner, script: Path, tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    outcome = convert(script, "--save", folder / "a.pt2")
    check(outcome.status, outcome.err, "cannot be written: Permission denied")


def test_a_disk_that_is_full_leaves_no_file(
    convert: Runner, script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(program: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nsa_compile.cli.real.save", full)
    (tmp_path / "a.pt2").write_bytes(b"what was there")
    outcome = convert(script, "--save", tmp_path / "a.pt2")
    check(outcome.status, outcome.err, "cannot be written: No space left on device")
    assert (tmp_path / "a.pt2").read_bytes() == b"what was there"
    assert not list(tmp_path.glob(".a.*"))
