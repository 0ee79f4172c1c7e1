"""Which kind of target a text names, and which options go with each kind."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from nsa_compile.targets.target import Request, Target, TargetError

EXPECTED = (
    "file.py[:callable], package.module:callable, the directory, config.json or model type of a "
    "Hugging Face model, a .pt2 exported program, or a pickled GraphModule with --trust"
)
_DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
_PICKLES = (".pkl", ".pickle", ".pt", ".pth")
_FLAGS = {
    "seq_len": "--seq-len", "batch": "--batch", "inputs": "--inputs", "attn": "--attn",
    "hf_config": "--hf-config", "trust": "--trust", "train": "--train",
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """One kind of target: its name in messages and the fields of a request that it heeds."""

    name: str
    heeds: frozenset[str]


_CODE = frozenset({"seq_len", "batch", "inputs", "train"})
SCRIPT = Kind("a Python file", _CODE)
DOTTED = Kind("a dotted name", _CODE)
HUGGING_FACE = Kind("a Hugging Face model", _CODE | {"attn", "hf_config"})
EXPORTED = Kind("an exported program", frozenset({"trust"}))
PICKLED = Kind("a pickled GraphModule", _CODE | {"trust"})
_ALL = (SCRIPT, DOTTED, HUGGING_FACE, EXPORTED, PICKLED)


def load(request: Request) -> Target:
    """The model that ``request.target`` names, on the meta device.

    Raises:
        TargetError: the target is not usable; the text says why and what to do.
    """
    path, name = _split(request.target)
    kind = _kind(path, name, request.target)
    _check_options(kind, request)
    return _load(kind, path, name, request)


def _load(kind: Kind, path: Path, name: str | None, request: Request) -> Target:
    if kind is SCRIPT:
        from nsa_compile.targets.script import load_script

        return load_script(path, name, request)
    if kind is DOTTED:
        from nsa_compile.targets.script import load_dotted

        return load_dotted(request)
    if kind is HUGGING_FACE:
        from nsa_compile.targets.huggingface import load_huggingface

        return load_huggingface(path, request)
    from nsa_compile.targets.exported import load_exported, load_pickled

    return load_exported(path, request) if kind is EXPORTED else load_pickled(path, request)


def _kind(path: Path, name: str | None, target: str) -> Kind:
    if path.suffix == ".py" and (name is not None or path.is_file()):
        if not path.exists():
            raise _missing(path)
        return SCRIPT
    if not path.exists():
        return _name(target)
    if path.is_dir() or path.suffix == ".json":
        return HUGGING_FACE
    if path.suffix == ".pt2":
        return EXPORTED
    if path.suffix in _PICKLES:
        return PICKLED
    raise TargetError(f"{path}: not something that can be looked at; expected {EXPECTED}")


def _name(target: str) -> Kind:
    """The kind of a target that is no path."""
    module, colon, attribute = target.partition(":")
    if colon and _DOTTED.fullmatch(module) and (not attribute or _DOTTED.fullmatch(attribute)):
        return DOTTED
    if re.fullmatch(r"[\w-]+", target, re.ASCII):
        from nsa_compile.targets.huggingface import model_types

        known = model_types()
        if target in known:
            return HUGGING_FACE
        raise _missing(target, get_close_matches(target, known, 1))
    raise _missing(target)


def _missing(target: object, near: Sequence[str] = ()) -> TargetError:
    hint = f"; did you mean the model type {near[0]!r}?" if near else f"; expected {EXPECTED}"
    return TargetError(f"{target}: no such file or directory{hint}")


def _check_options(kind: Kind, request: Request) -> None:
    """Refuse what would be ignored."""
    for field, flag in _FLAGS.items():
        if getattr(request, field) not in (None, False, {}) and field not in kind.heeds:
            takers = " or ".join(each.name for each in _ALL if field in each.heeds)
            raise TargetError(
                f"{flag} expects {takers} as TARGET, got {kind.name}: {request.target}"
            )


def path_of(target: str) -> Path:
    """The file or folder that ``target`` names, if it names one.

    Raises:
        TargetError: it can be no path.
    """
    return _split(target)[0]


def _split(target: str) -> tuple[Path, str | None]:
    """``"a/b.py:make"`` -> (a/b.py, "make"); a path that exists as it is keeps its colons."""
    path, name = Path(target), None
    head, colon, tail = target.rpartition(":")
    try:
        if colon and head.endswith(".py") and not path.exists():
            path, name = Path(head), tail
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # too long, or characters that no path can have
        raise TargetError(f"{target!r} cannot be a path: {error}; expected {EXPECTED}") from error
    return path, name
