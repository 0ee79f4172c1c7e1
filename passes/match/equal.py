"""Whether two nodes hold the same value: models compute one mask twice."""

from __future__ import annotations

from typing import Any

from torch import fx

from nsa_compile.passes import dialect

_DEEPEST = 6


def same_value(x: Any, y: Any, depth: int = 0) -> bool:
    """Whether ``x`` and ``y`` are one node, or the same pure operator on the same operands."""
    if not isinstance(x, fx.Node) or not isinstance(y, fx.Node):
        return type(x) is type(y) and _same_arguments(x, y, depth)
    if x is y:
        return True
    if (x.op, x.target) != (y.op, y.target) or depth > _DEEPEST:
        return False
    # Operators outside the dialect may be random.
    known = dialect.view(x) is not None and x.op in ("call_function", "call_method")
    if not known or _is_written(x) or _is_written(y):
        return False
    return _same_arguments((x.args, dict(x.kwargs)), (y.args, dict(y.kwargs)), depth + 1)


def _is_written(node: fx.Node) -> bool:
    return bool(dialect.written(node)) or any(dialect.written(user) for user in node.users)


def _same_arguments(x: Any, y: Any, depth: int) -> bool:
    if isinstance(x, (tuple, list)):
        return len(x) == len(y) and all(same_value(a, b, depth) for a, b in zip(x, y, strict=True))
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(same_value(x[key], y[key], depth) for key in x)
    if isinstance(x, slice):
        return same_value((x.start, x.stop, x.step), (y.start, y.stop, y.step), depth)
    return bool(x == y)
