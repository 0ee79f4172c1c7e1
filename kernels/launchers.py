"""The Triton launchers of an operator, imported when the first CUDA tensor arrives."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType


@functools.cache
def launchers(folder: str) -> ModuleType:
    """The module ``kernels/<folder>/triton_kernel.py``.

    Raises:
        RuntimeError: triton is not installed.
    """
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError(
            f"the CUDA kernels of nsa_compile ({folder}) are written in Triton, which is not "
            "installed; install triton, or move the tensors to the CPU"
        )
    return importlib.import_module(f"nsa_compile.kernels.{folder}.triton_kernel")
