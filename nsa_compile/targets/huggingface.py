"""A Hugging Face configuration as target: a local directory or config.json, never the network."""

from __future__ import annotations

import inspect
import json
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from nsa_compile.dynamo_text import describe
from nsa_compile.targets.skeleton import build_skeleton
from nsa_compile.targets.target import (
    Request,
    Target,
    TargetError,
    own_length,
    token_ids,
)


def load_huggingface(path: Path, request: Request) -> Target:
    """The text model that a configuration describes, with SDPA attention and no cache.

    ``--seq-len`` defaults to the longest sequence that the configuration names.

    Raises:
        TargetError: transformers is missing, the configuration cannot be read, or it does not
            describe a text model of transformers.
    """
    file = path / "config.json" if path.is_dir() else path
    _check_json(file)
    transformers = _transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(
            file, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise TargetError(
            f"{file}: transformers {transformers.__version__} cannot read this configuration: "
            f"{describe(error)}"
        ) from error
    try:
        skeleton = build_skeleton(partial(_build, transformers, config))
    except Exception as error:
        raise TargetError(
            f"{file}: transformers cannot build this model: {describe(error)}"
        ) from error
    model: nn.Module = skeleton.result
    target = Target(type(model).__name__, model, values=skeleton.values, notes=skeleton.notes)
    if model.config._attn_implementation != "sdpa":
        target.notes.append(
            f"transformers has no SDPA attention for {target.name}; it was built with its own "
            "code, where attention written out as matmul and softmax is not found"
        )
    target.kwargs = _inputs(model, config, file, request)
    return target


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise TargetError(
            "a Hugging Face target needs transformers, which cannot be imported "
            f"({describe(error)}); install it with: pip install 'transformers>=5.0'"
        ) from error
    return transformers


def _check_json(file: Path) -> None:
    """A readable JSON object with a ``model_type``: transformers' own errors hide what is wrong."""
    if not file.is_file():
        raise TargetError(
            f"{file}: no such file; expected the directory or config.json of a Hugging Face model"
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TargetError(f"{file}: not a readable JSON file: {describe(error)}") from error
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        raise TargetError(
            f"{file}: expected a JSON object with a 'model_type', as transformers writes it"
        )


def _build(transformers: Any, config: Any) -> nn.Module:
    """The class that ``architectures`` names, else the causal language model of this type."""
    names = [name for name in getattr(config, "architectures", None) or () if isinstance(name, str)]
    known = getattr(transformers, names[0], None) if names else None
    if known is None:
        causal = transformers.AutoModelForCausalLM
        known = causal if type(config) in causal._model_mapping else transformers.AutoModel
    from_config = getattr(known, "from_config", None) or known._from_config
    try:
        model: nn.Module = from_config(config, attn_implementation="sdpa", dtype=config.dtype)
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
        model = from_config(config, attn_implementation="eager", dtype=config.dtype)
    return model


def _inputs(model: nn.Module, config: Any, file: Path, request: Request) -> dict[str, Any]:
    parameters = inspect.signature(model.forward).parameters
    if "input_ids" not in parameters:
        raise TargetError(
            f"{file}: {type(model).__name__} takes {', '.join(list(parameters)[:3])}, ...; only "
            "text models (input_ids) can be read from a configuration: write a file.py whose "
            "build() returns (model, inputs)"
        )
    length = request.seq_len or own_length(config.get_text_config())
    ids = token_ids(request.batch or 1, length)
    inputs: dict[str, Any] = {"input_ids": ids}
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters:
        inputs["decoder_input_ids"] = ids
    if "use_cache" in parameters:
        inputs["use_cache"] = False
    return inputs
