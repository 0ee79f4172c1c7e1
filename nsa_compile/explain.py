"""nsa_compile.explain: the report on a model and its inputs, without compiling anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

import nsa_compile.kernels.library  # noqa: F401  (the rewriter names its operators)
from nsa_compile.backend import constant_inputs
from nsa_compile.capture import capture
from nsa_compile.passes.config import NSAConfig
from nsa_compile.report import RewriteReport
from nsa_compile.verdicts import verdicts


def explain(
    model: Callable[..., Any],
    *args: Any,
    options: Mapping[str, Any] | NSAConfig | None = None,
    **kwargs: Any,
) -> RewriteReport:
    """What ``torch.compile(model, backend="nsa", options=options)`` would do in this call.

    Runs ``model(*args, **kwargs)`` once, dense, with Dynamo capturing its graphs. Nothing is
    compiled and the model is left as it is: training mode, gradients and inputs are the caller's.
    The inputs' sizes are taken as they are, never as symbols.

    Returns:
        The report, as :func:`nsa_compile.report` gives it for a compiled model.

    Raises:
        NSAConfigError: unknown or impossible options.
        Exception: what the model itself raised.
    """
    config = NSAConfig.from_options(options)
    model = getattr(model, "_orig_mod", model)
    captured = capture(model, args, kwargs, known=constant_inputs)
    if captured.error is not None:
        raise captured.error
    is_module = isinstance(model, nn.Module)
    name = type(model).__name__ if is_module else getattr(model, "__qualname__", repr(model))
    return verdicts(str(name), captured, config)
