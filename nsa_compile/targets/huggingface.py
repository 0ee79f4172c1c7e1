"""A Hugging Face model as target: a local configuration or a model type, never the network."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Mapping
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from nsa_compile.dynamo_text import describe
from nsa_compile.targets.inputs import example_inputs
from nsa_compile.targets.pretrained import pretrained
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

    ``path`` is a directory, a ``config.json``, or (where it does not exist) a model type such as
    ``llama`` with the sizes that transformers gives it. ``--hf-config`` replaces values before the
    configuration is made, ``--seq-len`` defaults to the longest sequence that it names.

    Raises:
        TargetError: transformers is missing, the configuration cannot be read, or it does not
            describe a text model of transformers.
    """
    content: dict[str, Any] = {"model_type": str(path)}
    if path.exists():
        path = path / "config.json" if path.is_dir() else path
        content = _read(path)
    transformers = _transformers()
    config = _configuration(transformers, path, content, request.hf_config)
    try:
        if request.weights:
            skeleton = pretrained(_class(transformers, config), path, config, request.attn)
        else:
            skeleton = build_skeleton(partial(_build, transformers, config, request.attn))
    except TargetError:
        raise
    except Exception as error:
        raise TargetError(
            f"{path}: transformers cannot build this model: {describe(error)}"
        ) from error
    model: nn.Module = skeleton.result
    target = Target(type(model).__name__, model, values=skeleton.values, notes=skeleton.notes)
    if request.attn is None and model.config._attn_implementation != "sdpa":
        target.notes.append(
            f"transformers has no SDPA attention for {target.name}; it was built with its own "
            "code, where attention is written out"
        )
    if request.inputs is not None:
        target.args, target.kwargs = example_inputs(request)
        if "use_cache" in inspect.signature(model.forward).parameters:
            target.kwargs.setdefault("use_cache", False)
    else:
        target.kwargs = _inputs(model, config, path, request)
    return target


def model_types() -> list[str]:
    """What transformers can build; empty without transformers."""
    try:
        from transformers import CONFIG_MAPPING
    except ImportError:
        return []
    return list(CONFIG_MAPPING.keys())


def _configuration(
    transformers: Any, path: Path, content: dict[str, Any], changes: Mapping[str, Any]
) -> Any:
    """The configuration that ``content`` with ``changes`` describes."""
    known = f"transformers {transformers.__version__} cannot read this configuration"
    try:
        kind = transformers.CONFIG_MAPPING[content["model_type"]]
    except KeyError as error:
        near = get_close_matches(content["model_type"], model_types(), 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise TargetError(
            f"{path}: {known}: it has no model type {content['model_type']!r}{hint}"
        ) from error
    try:
        if changes:
            content = _changed(content, kind().to_dict(), changes)
        return kind.from_dict(content)
    except TargetError:
        raise
    except Exception as error:
        at_fault = " with these --hf-config values" if changes else ""
        raise TargetError(f"{path}: {known}{at_fault}: {_flat(error)}") from error


def _changed(
    content: dict[str, Any], default: dict[str, Any], changes: Mapping[str, Any]
) -> dict[str, Any]:
    """``content`` with ``changes``, whose keys may be paths such as ``text_config.hidden_size``."""
    content = copy.deepcopy(content)
    for key, value in changes.items():
        inner, names = content, default
        *outer, last = key.split(".")
        for part in outer:
            below = names.get(part)
            names = below if isinstance(below, dict) else {}
            inner = inner.setdefault(part, {})
            if not isinstance(inner, dict):
                raise TargetError(f"--hf-config {key}: {part} holds no further values")
        if last not in names and last not in inner:
            near = get_close_matches(last, [*names, *inner], 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TargetError(f"--hf-config: this configuration has no {key!r}{hint}")
        inner[last] = value
    return content


def _flat(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise TargetError(
            "a Hugging Face target needs transformers, which cannot be imported "
            f"({describe(error)}); install it with: pip install 'transformers>=5.0'"
        ) from error
    return transformers


def _read(file: Path) -> dict[str, Any]:
    """A JSON object with a ``model_type``: transformers' own errors hide what is wrong."""
    if not file.is_file():
        raise TargetError(
            f"{file}: no such file; expected the directory or config.json of a Hugging Face model"
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TargetError(f"{file}: not a readable JSON file: {describe(error)}") from error
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        raise TargetError(
            f"{file}: expected a JSON object with a 'model_type', as transformers writes it"
        )
    return content


def _class(transformers: Any, config: Any) -> Any:
    """The class that ``architectures`` names, else the causal language model of this type."""
    names = [name for name in getattr(config, "architectures", None) or () if isinstance(name, str)]
    known = getattr(transformers, names[0], None) if names else None
    if known is None:
        causal = transformers.AutoModelForCausalLM
        known = causal if type(config) in causal._model_mapping else transformers.AutoModel
    return known


def _build(transformers: Any, config: Any, attn: str | None) -> nn.Module:
    """The model without weights; ``attn=None`` is SDPA, or its own code where there is none."""
    known = _class(transformers, config)
    from_config = getattr(known, "from_config", None) or known._from_config
    try:
        model: nn.Module = from_config(
            config, attn_implementation=attn or "sdpa", dtype=config.dtype
        )
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
        if attn is not None:
            raise TargetError(
                f"--attn {attn}: transformers has no SDPA attention for this model; "
                "use --attn eager"
            ) from error
        model = from_config(config, attn_implementation="eager", dtype=config.dtype)
    return model


def _inputs(model: nn.Module, config: Any, file: Path, request: Request) -> dict[str, Any]:
    parameters = inspect.signature(model.forward).parameters
    if "input_ids" not in parameters:
        raise TargetError(
            f"{file}: {type(model).__name__} takes {', '.join(list(parameters)[:3])}, ...; only "
            "text models (input_ids) can be read from a configuration: pass --inputs, or write a "
            "file.py whose build() returns (model, inputs)"
        )
    length = request.seq_len or own_length(config.get_text_config())
    ids = token_ids(request.batch or 1, length)
    inputs: dict[str, Any] = {"input_ids": ids}
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters:
        inputs["decoder_input_ids"] = ids
    if "use_cache" in parameters:
        inputs["use_cache"] = False
    return inputs
