"""Where a site comes from: module path and class, file and line."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import fx

# Dynamo names a module by the local it was reached from: L['self'].model, L['fn'].layers.0.
_LOCAL = re.compile(r"^[LG]\[(?P<quote>['\"])(?P<name>.*?)(?P=quote)\]\.?")
_ITEM = re.compile(r"\[['\"]?(.*?)['\"]?\]")
_MODULES_OF = re.compile(r"(?:^|\.)_(?:modules|parameters|buffers)(?=[.\[])")
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')
_TORCH = str(Path(torch.__file__).parent) + "/"


def module(node: fx.Node) -> tuple[str, str]:
    """Dotted path and class name of the innermost module that ``node`` was traced in.

    Both are empty at the top of a graph: a compiled module that calls attention itself, or code
    after a graph break.
    """
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return "", ""
    path, cls = list(stack.values())[-1]
    return clean_path(path), _class_name(cls)


def clean_path(path: str) -> str:
    """``L['self'].model.layers.0`` as ``model.layers.0``; ``L['fn'].layers[0]`` as ``layers.0``."""
    path = _LOCAL.sub("", path)
    path = _MODULES_OF.sub("", path)
    return _ITEM.sub(r".\1", path).strip(".")


def source(node: fx.Node) -> str:
    """``file.py:123`` of the model's own line that computes ``node``; empty when not recorded.

    Models often call attention through a shared function, so the last frame says little: this is
    the innermost frame in the file that defines the module's class, else outside torch.
    """
    frames = [
        (match["file"], match["line"])
        for match in _FRAME.finditer(node.meta.get("stack_trace") or "")
    ]
    if not frames:
        return ""
    own = _defining_file(node)
    chosen = [f for f in frames if f[0] == own]
    chosen = chosen or [f for f in frames if not f[0].startswith(_TORCH)] or frames
    file, line = chosen[-1]
    return f"{_short(file)}:{line}"


def _class_name(cls: Any) -> str:
    return cls.__name__ if inspect.isclass(cls) else str(cls).rpartition(".")[2]


def _defining_file(node: fx.Node) -> str | None:
    """File of the class of the innermost module (export records the class by name)."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    cls = list(stack.values())[-1][1]
    name = cls.__module__ if inspect.isclass(cls) else str(cls).rpartition(".")[0]
    return getattr(sys.modules.get(name), "__file__", None)


def _short(file: str) -> str:
    """Relative to the working directory, or to the site-packages folder that holds it."""
    for marker in ("/site-packages/", "/dist-packages/"):
        if marker in file:
            return file.rpartition(marker)[2]
    try:
        return str(Path(file).relative_to(Path.cwd()))
    except ValueError:
        return file
