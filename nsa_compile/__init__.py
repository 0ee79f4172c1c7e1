"""nsa_compile: find attention in any torch graph and rewrite it into Native Sparse Attention."""

from __future__ import annotations

from pathlib import Path as _Path

_root = _Path(__file__).resolve().parent.parent
if (_root / "passes" / "config.py").is_file() and (_root / "pyproject.toml").is_file():
    # A source checkout: passes/ and kernels/ stand beside this package, not inside it.
    __path__.append(str(_root))
