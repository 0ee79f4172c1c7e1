"""What nsa-convert can look at: Python files and Hugging Face configurations."""

from __future__ import annotations

from pathlib import Path

from nsa_compile.targets.target import Request, Target, TargetError

__all__ = ["Request", "Target", "TargetError", "load"]


def load(request: Request) -> Target:
    """The model that ``request.target`` names, on the meta device.

    Raises:
        TargetError: the target is not usable; the text says why and what to do.
    """
    path, callable_name = _split(request.target)
    if not path.exists():
        raise TargetError(
            f"{path}: no such file or directory; expected file.py[:callable], or the directory or "
            "config.json of a Hugging Face model"
        )
    if path.suffix == ".py" and path.is_file():
        from nsa_compile.targets.script import load_script

        return load_script(path, callable_name, request)
    if callable_name is not None:
        raise TargetError(f"{path}: ':{callable_name}' only goes with a Python file (file.py:name)")
    if path.is_dir() or path.suffix == ".json":
        from nsa_compile.targets.huggingface import load_huggingface

        return load_huggingface(path, request)
    raise TargetError(
        f"{path}: not something that can be looked at; expected file.py[:callable], or the "
        "directory or config.json of a Hugging Face model"
    )


def _split(target: str) -> tuple[Path, str | None]:
    """``"a/b.py:make"`` -> (a/b.py, "make"); a path that exists as it is keeps its colons."""
    head, colon, tail = target.rpartition(":")
    if colon and head.endswith(".py") and not Path(target).exists():
        return Path(head), tail
    return Path(target), None
