"""nsa-convert on Hugging Face configurations written by the test."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.cli.running import Runner, convert

pytest.importorskip("transformers")
__all__ = ["convert"]
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64,
    "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 512,
    "dtype": "bfloat16",
}  # fmt: skip


def write(folder: Path, **changes: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**LLAMA, **changes}))
    return path


@pytest.mark.parametrize("as_directory", [True, False])
def test_a_configuration_is_a_target(convert: Runner, tmp_path: Path, as_directory: bool) -> None:
    path = write(tmp_path)
    outcome = convert(tmp_path if as_directory else path)
    assert outcome.status == 0, outcome.err
    assert outcome.json["model"] == "LlamaForCausalLM"
    assert outcome.verdicts() == [
        (f"model.layers.{i}.self_attn", "converted", None) for i in range(2)
    ]
    site = outcome.site()
    assert (site["q_len"], site["q_heads"], site["kv_heads"]) == (512, 4, 2)
    assert (site["mask"], site["dtype"]) == ("causal", "bfloat16")
    assert "modeling_llama.py" in site["source"]


def test_seq_len_and_batch(convert: Runner, tmp_path: Path) -> None:
    site = convert(write(tmp_path), "--seq-len", 20000, "--batch", 2).site()
    assert (site["batch"], site["kv_len"]) == (2, 20000)
    assert site["flops_sparse"] < site["flops_dense"]


def test_without_architectures_the_causal_model_is_built(convert: Runner, tmp_path: Path) -> None:
    assert convert(write(tmp_path, architectures=None)).json["model"] == "LlamaForCausalLM"


def test_an_encoder_attends_both_ways(convert: Runner, tmp_path: Path) -> None:
    path = write(tmp_path, model_type="bert", architectures=["BertModel"], dtype="float32")
    outcome = convert(path)
    assert outcome.json["model"] == "BertModel"
    assert [site["mask"] for site in outcome.json["sites"]] == ["full", "full"]


def test_an_architecture_without_sdpa_is_built_and_that_is_said(
    convert: Runner, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 32, "n_layer": 1, "n_head": 2, "vocab_size": 50, "dtype": "float32"}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "bloom", **sizes}))
    outcome = convert(path, "--seq-len", 32)
    assert outcome.status == 0, outcome.err
    assert "no SDPA attention for BloomForCausalLM" in outcome.err


SMALL = ["hidden_size=64", "num_hidden_layers=1", "num_attention_heads=4", "vocab_size=100"]


def changed(*pairs: str) -> list[str]:
    return [word for pair in pairs for word in ("--hf-config", pair)]


def test_a_model_type_with_changes_is_a_target(convert: Runner) -> None:
    outcome = convert("llama", *changed(*SMALL, "num_key_value_heads=2"))
    assert outcome.status == 0, outcome.err
    site = outcome.site()
    assert (outcome.json["model"], len(outcome.json["sites"])) == ("LlamaForCausalLM", 1)
    assert (site["q_heads"], site["kv_heads"], site["kv_len"]) == (4, 2, 2048)


def test_changes_of_a_configuration_file(convert: Runner, tmp_path: Path) -> None:
    outcome = convert(write(tmp_path), *changed("num_hidden_layers=3", "dtype=float32"))
    assert outcome.status == 0, outcome.err
    assert len(outcome.json["sites"]) == 3
    assert outcome.site()["dtype"] == "float32"


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_the_attention_implementation(convert: Runner, tmp_path: Path, attn: str) -> None:
    outcome = convert(write(tmp_path), "--attn", attn)
    assert outcome.site()["spelling"] == attn
    assert outcome.site()["decision"] == "converted"


def test_inputs_of_a_configuration(convert: Runner, tmp_path: Path) -> None:
    outcome = convert(
        write(tmp_path), "--inputs", "input_ids=int64[2,64], attention_mask=int64[2,64]"
    )
    assert outcome.site()["mask"] == "causal & padding"


BAD_OPTIONS = {
    "unknown value": (
        ["llama", *changed("num_hidden_layer=1")],
        "--hf-config: this configuration has no 'num_hidden_layer'; did you mean",
    ),
    "value of another type": (
        ["llama", *changed("num_hidden_layers=many")],
        "with these --hf-config values: StrictDataclassFieldValidationError",
    ),
    "into a number": (
        ["llama", *changed("vocab_size.x=3")],
        "--hf-config: this configuration has no 'vocab_size.x'",
    ),
    "no value": (["llama", "--hf-config", "vocab_size"], "--hf-config expects name=value, got"),
    "no such attention": (["llama", "--attn", "flash"], "--attn: invalid choice: 'flash'"),
    "no sdpa": (
        ["bloom", "--attn", "sdpa", *changed("n_layer=1", "n_head=2", "hidden_size=32")],
        "--attn sdpa: transformers has no SDPA attention for this model; use --attn eager",
    ),
    "no such input": (
        ["llama", *changed(*SMALL), "--inputs", "ids=int64[1,8]"],
        "the forward of LlamaForCausalLM failed with these inputs (ids=[1, 8]",
    ),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options(convert: Runner, case: str) -> None:
    arguments, message = BAD_OPTIONS[case]
    outcome = convert(*arguments)
    assert outcome.status == 2
    assert message in outcome.err
    assert outcome.err.startswith("nsa-convert: error: ")
    assert outcome.err.count("\n") == 1, outcome.err


BAD = {
    "not json": ("{", "not a readable JSON file"),
    "not an object": ("[1]", "expected a JSON object with a 'model_type'"),
    "no model_type": ("{}", "expected a JSON object with a 'model_type'"),
    "unknown type": ('{"model_type": "no_such_model"}', "cannot read this configuration"),
    "bad sizes": (json.dumps({**LLAMA, "hidden_size": "wide"}), "config"),
    "heads that do not divide": (json.dumps({**LLAMA, "num_attention_heads": 5}), "config"),
    "an image model": ('{"model_type": "vit"}', "only text models"),
    "remote code": (
        json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "a--b.C"}}),
        "cannot read this configuration",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_configurations(convert: Runner, tmp_path: Path, case: str) -> None:
    content, message = BAD[case]
    path = tmp_path / "config.json"
    path.write_text(content)
    outcome = convert(path)
    assert outcome.status == 2
    assert message in outcome.err
    assert outcome.err.startswith("nsa-convert: error: ")
    assert outcome.err.count("\n") == 1, outcome.err


def test_a_directory_without_a_configuration(convert: Runner, tmp_path: Path) -> None:
    outcome = convert(tmp_path)
    assert outcome.status == 2
    assert "config.json: no such file" in outcome.err


def test_without_transformers_the_extra_is_named(
    convert: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    outcome = convert(write(tmp_path))
    assert outcome.status == 2
    assert "pip install 'transformers>=5.0'" in outcome.err
