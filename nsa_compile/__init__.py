"""nsa_compile: find attention in any torch graph and rewrite it into Native Sparse Attention."""

from __future__ import annotations

import sys as _sys
from importlib.machinery import ModuleSpec as _Spec
from importlib.util import module_from_spec as _module
from pathlib import Path as _Path

_root = _Path(__file__).resolve().parent.parent
if (_root / "passes" / "config.py").is_file() and (_root / "pyproject.toml").is_file():
    # A source checkout: passes/ and kernels/ stand beside this package, not inside it. The root is
    # kept off __path__, where a walk over submodules (TORCH_LOGS makes one) would find this package
    # inside itself, without end.
    for _name in ("passes", "kernels"):
        _spec = _Spec(f"{__name__}.{_name}", None, is_package=True)
        _spec.submodule_search_locations = [str(_root / _name)]
        globals()[_name] = _sys.modules.setdefault(_spec.name, _module(_spec))

from nsa_compile.backend import StrictError, nsa  # noqa: E402
from nsa_compile.buckets import convert_before_the_cut  # noqa: E402
from nsa_compile.compilations import report  # noqa: E402
from nsa_compile.explain import explain  # noqa: E402
from nsa_compile.export import ConvertError, convert  # noqa: E402
from nsa_compile.guards import ConversionWarning  # noqa: E402
from nsa_compile.nn import NativeSparseAttention, NSAParameters  # noqa: E402
from nsa_compile.passes.config import NSAConfig, NSAConfigError  # noqa: E402
from nsa_compile.preparation import prepare, unprepare  # noqa: E402
from nsa_compile.report import RewriteReport  # noqa: E402
from nsa_compile.verify import verify  # noqa: E402

__version__ = "0.1.0"
__all__ = [
    "ConversionWarning",
    "ConvertError",
    "NSAConfig",
    "NSAConfigError",
    "NSAParameters",
    "NativeSparseAttention",
    "RewriteReport",
    "StrictError",
    "convert",
    "explain",
    "nsa",
    "prepare",
    "report",
    "unprepare",
    "verify",
]


def _register() -> None:
    """Make ``backend="nsa"`` known where its entry point is not installed; give it whole graphs."""
    from importlib.metadata import entry_points

    from torch._dynamo.backends import registry

    if (
        not entry_points(group="torch_dynamo_backends", name="nsa")
        and "nsa" not in registry._BACKENDS
    ):
        registry.register_backend(nsa)
    convert_before_the_cut(nsa)


_register()
