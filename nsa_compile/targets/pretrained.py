"""The weights of a Hugging Face directory: read from its files, never from the network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nsa_compile.targets.skeleton import Skeleton
from nsa_compile.targets.target import TargetError

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def pretrained(known: Any, path: Path, config: Any, attn: str | None) -> Skeleton:
    """The model of class ``known`` with the weights that stand beside ``path``, a config.json.

    A weight that the files lack is random in transformers: a note says how many are.

    Raises:
        TargetError: there are no weights.
    """
    folder = path.parent
    if not path.exists() or not any(file for glob in _WEIGHTS for file in folder.glob(glob)):
        raise TargetError(
            f"{path}: describes a model without its weights, which this needs: expected a "
            "directory with model.safetensors beside config.json, or a file.py whose build() "
            "loads the model"
        )
    with _no_progress():
        model, loading = known.from_pretrained(
            folder,
            config=config,
            attn_implementation=attn or "sdpa",
            dtype=config.dtype,
            local_files_only=True,
            output_loading_info=True,
        )
    missing = sorted(loading["missing_keys"])
    if not missing:
        return Skeleton(model)
    shown = ", ".join(missing[:3]) + ", ..." * (len(missing) > 3)
    return Skeleton(
        model,
        notes=[
            f"{len(missing)} weights are not in the files of {folder} and are random: {shown}; "
            "what is measured says nothing about a trained model"
        ],
    )


@contextmanager
def _no_progress() -> Iterator[None]:
    """transformers draws a bar for a model of any size."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
