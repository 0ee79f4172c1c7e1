"""Dynamo's messages in one line: what went wrong and where, without hints, links and stacks."""

from __future__ import annotations

import re
from pathlib import PurePath

_CAUSE = re.compile(r"got (\w+)\((['\"])(.*)\2,?\)\s*$", re.MULTILINE)
_USER_CODE = re.compile(r"from user code:\s*File \"([^\"]+)\", line (\d+)")


def headline(message: str) -> str:
    """The first line of a graph break's message, with its explanation."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    explanations = [
        line.removeprefix("Explanation: ") for line in lines if line.startswith("Explanation: ")
    ]
    return ": ".join([*lines[:1], *explanations[:1]])


def describe(error: BaseException) -> str:
    """An exception in one line; under Dynamo's wrapping, the model's own error and its place."""
    text = _text(error)
    cause, place = _CAUSE.search(text), _USER_CODE.search(text)
    if cause is not None:
        line = f"{cause[1]}: {cause[3]}"
    elif type(error).__module__.startswith("torch."):
        line = f"{type(error).__name__}: {headline(text)}"
    else:
        first = next((line.strip() for line in text.splitlines() if line.strip()), "")
        line = f"{type(error).__name__}: {first}" if first else type(error).__name__
    if place is not None:
        line = f"{line.rstrip('.')} ({PurePath(place[1]).name}:{place[2]})"
    return line


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # the model's own class of error, which cannot even say what happened
        return ""


def needs_data(error: BaseException) -> bool:
    """Whether a forward failed because it reads tensor values, which meta tensors do not have."""
    text = _text(error)
    return (
        "DataDependent" in type(error).__name__
        or "data-dependent" in text.lower()
        or "data-independent" in text  # of torch.nonzero on the meta device
        or "on meta tensors" in text
        or "out of meta tensor" in text
    )


def mixes_devices(error: BaseException) -> bool:
    """Whether an operator was given tensors of different devices."""
    text = _text(error)
    return "two different devices" in text or "same device" in text
