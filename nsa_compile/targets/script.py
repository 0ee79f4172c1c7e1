"""Python code as target: its callable returns a model, or a model and example inputs."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from nsa_compile.dynamo_text import describe
from nsa_compile.targets.inputs import example_inputs
from nsa_compile.targets.skeleton import made
from nsa_compile.targets.target import (
    Request,
    Target,
    TargetError,
    ids_for,
)

DEFAULT_CALLABLE = "build"
_SIZES = ("seq_len", "batch")


def load_script(path: Path, name: str | None, request: Request) -> Target:
    """Import ``path``, call its callable ``name`` without making weights, and read what it returns.

    The callable may take ``seq_len`` and ``batch``: the user's ``--seq-len`` and ``--batch`` are
    passed when given. It returns a model (then its input is taken to be token ids), or
    ``(model, inputs)`` with inputs a tensor, a tuple of arguments or a dict of keyword arguments.

    Raises:
        TargetError: the file cannot be imported, or the callable is missing, fails or returns
            something else.
    """
    name = DEFAULT_CALLABLE if name is None else name
    with _beside(path):
        return _built(_callable(_import(path), name, path), f"{path}:{name}", path, request)


def load_dotted(request: Request) -> Target:
    """Like :func:`load_script` for ``package.module:callable``, imported as Python imports it.

    The current directory comes first on the path, as under ``python -m``.

    Raises:
        TargetError: as :func:`load_script` does.
    """
    dotted, _, name = request.target.partition(":")
    name = name or DEFAULT_CALLABLE
    with _beside(Path("module.py")):
        try:
            module = importlib.import_module(dotted)
        except (Exception, SystemExit) as error:
            raise TargetError(
                f"{dotted} cannot be imported: {describe(error)}; expected package.module:callable"
            ) from error
        path = Path(getattr(module, "__file__", None) or dotted)
        return _built(_callable(module, name, Path(dotted)), request.target, path, request)


def _built(builder: Callable[..., Any], where: str, path: Path, request: Request) -> Target:
    """What ``builder`` makes, with its inputs or those of ``--inputs``."""
    arguments = _arguments(builder, where, request)
    try:
        skeleton = made(partial(builder, **arguments), request)
    except (Exception, SystemExit) as error:
        raise TargetError(f"{where} raised {describe(error)}{_line(error, path)}") from error
    model, inputs = _unpack(skeleton.result, where)
    target = Target(type(model).__name__, model, values=skeleton.values, notes=skeleton.notes)
    if request.inputs is not None:
        target.args, target.kwargs = example_inputs(request)
    elif inputs is None:
        target.args = (ids_for(model, where, request),)
    else:
        _refuse_unused_sizes(request, arguments, where)
        target.args, target.kwargs = _call(inputs, where)
    return target


@contextmanager
def _beside(path: Path) -> Iterator[None]:
    """Imports see the file's own folder first, as they do under ``python file.py``."""
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _import(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    previous = sys.modules.get(path.stem)
    sys.modules[path.stem] = module  # dataclasses and pickles look their module up by name
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise TargetError(
            f"{path} cannot be imported: {describe(error)}{_line(error, path)}"
        ) from error
    finally:
        if previous is not None:
            sys.modules[path.stem] = previous
    return module


def _callable(module: ModuleType, name: str, path: Path) -> Callable[..., Any]:
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if callable(found):
        return found  # type: ignore[no-any-return]
    problem = "does not exist" if found is None else "is not callable"
    functions = [
        key
        for key, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", None) == module.__name__
    ]
    listed = f"; the file has: {', '.join(functions)}" if functions else ""
    raise TargetError(
        f"{path}: {name!r} {problem}; expected a callable that returns a model, or (model, example "
        f"inputs): name it as {path}:callable{listed}"
    )


def _arguments(builder: Callable[..., Any], where: str, request: Request) -> dict[str, Any]:
    """The sizes that ``builder`` takes and the user gave."""
    try:
        parameters = inspect.signature(builder).parameters
    except (TypeError, ValueError):
        return {}
    given = {name: getattr(request, name) for name in _SIZES}
    arguments = {name: given[name] for name in parameters if given.get(name) is not None}
    missing = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and name not in arguments
    ]
    if missing:
        flags = [f"--{name.replace('_', '-')}" for name in missing if name in _SIZES]
        todo = f"pass {' and '.join(flags)}" if len(flags) == len(missing) else "give defaults"
        raise TargetError(
            f"{where} needs arguments that nsa-convert does not have: {', '.join(missing)}; {todo}"
        )
    return arguments


def _unpack(result: Any, where: str) -> tuple[nn.Module, Any]:
    """-> model, inputs or None."""
    model, inputs = result, None
    if isinstance(result, (tuple, list)):
        if len(result) != 2:
            raise TargetError(
                f"{where} returned {len(result)} values; expected a model, or (model, inputs)"
            )
        model, inputs = result
        if inputs is None:
            raise TargetError(f"{where} returned (model, None); expected inputs, or just the model")
    if not isinstance(model, nn.Module):
        raise TargetError(
            f"{where} returned {_kind(result)}; expected a torch.nn.Module, or (model, inputs)"
        )
    return getattr(model, "_orig_mod", model), inputs


def _call(inputs: Any, where: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, torch.Tensor):
        return (inputs,), {}
    if isinstance(inputs, dict) and all(isinstance(key, str) for key in inputs):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    raise TargetError(
        f"{where} returned inputs of type {_kind(inputs)}; expected a tensor, a tuple of arguments "
        "or a dict of keyword arguments"
    )


def _refuse_unused_sizes(request: Request, arguments: dict[str, Any], where: str) -> None:
    unused = [
        name for name in _SIZES if getattr(request, name) is not None and name not in arguments
    ]
    if unused:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in unused)
        raise TargetError(
            f"{where} returns its own inputs, so {flags} has no effect; let it take "
            f"{' and '.join(unused)} as parameters, or drop the option"
        )


def _line(error: BaseException, path: Path) -> str:
    """Where in the user's file it happened, if it did."""
    if isinstance(error, SyntaxError) and error.lineno:
        return f" (line {error.lineno})"
    own = str(path.resolve())
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if str(Path(frame.filename).resolve()) == own
    ]
    return f" (line {lines[-1]})" if lines else ""


def _kind(value: object) -> str:
    return type(value).__name__
