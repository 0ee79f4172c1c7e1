"""Runs Triton kernels on the CPU: in Triton's interpreter, in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Callable[..., Any]]:
    """``interpreted(function, *args, **kwargs)``: the call, made where kernels are interpreted.

    Triton decides when it is first imported whether it interprets, and Dynamo imports it early, so
    a process that already runs other tests cannot be switched.
    """
    pytest.importorskip("triton")
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            yield lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result()
    finally:
        del os.environ["TRITON_INTERPRET"]
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before
