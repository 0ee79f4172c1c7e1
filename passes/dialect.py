"""One canonical, read-only view of an fx node, whatever spelling the model used.

``torch.transpose(x, 1, 2)``, ``x.transpose(1, 2)``, ``x.swapaxes(dim0=1, dim1=2)`` and
``aten.transpose.int(x, 1, 2)`` are all ``Op("transpose", {"x": x, "dim0": 1, "dim1": 2})``.
Nothing is traced again and nothing is written to the graph.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx


@dataclass(frozen=True)
class Op:
    """A node in canonical form: what it computes and its arguments by canonical name."""

    name: str
    args: Mapping[str, Any]
    inplace: bool = False

    def __getitem__(self, name: str) -> Any:
        return self.args.get(name)


@dataclass(frozen=True)
class _Row:
    """One operator: its canonical parameters and every name it is spelled with.

    ``signature`` lists parameters in positional order; ``*sizes`` takes either one sequence or all
    remaining positional arguments. ``spellings`` are names in torch, torch.Tensor,
    torch.nn.functional, operator or aten; the canonical name is always one of them, and each may
    carry the trailing underscore of an in-place form.
    """

    name: str
    signature: str
    spellings: str = ""


_ROWS = (
    # attention
    _Row(
        "scaled_dot_product_attention",
        "query key value attn_mask dropout_p is_causal scale enable_gqa",
    ),
    # ... and what it calls inside, which answers with a tuple
    _Row(
        "_scaled_dot_product_attention_math",
        "query key value attn_mask dropout_p is_causal dropout_mask",
    ),
    _Row("_scaled_dot_product_flash_attention", "query key value dropout_p is_causal"),
    _Row("_scaled_dot_product_flash_attention_for_cpu", "query key value dropout_p is_causal"),
    _Row(
        "_scaled_dot_product_efficient_attention",
        "query key value attn_mask compute_log_sumexp dropout_p is_causal",
        "_scaled_dot_product_cudnn_attention",
    ),
    _Row(
        "_scaled_dot_product_fused_attention_overrideable",
        "query key value attn_mask dropout_p is_causal",
    ),
    _Row("softmax", "x dim", "_softmax _safe_softmax special_softmax"),
    _Row("log_softmax", "x dim", "_log_softmax special_log_softmax"),
    _Row("softmin", "x dim"),
    _Row("logsumexp", "x dim keepdim", "special_logsumexp"),
    # products
    _Row("matmul", "x y", "mm bmm __matmul__ linalg_matmul"),
    _Row("baddbmm", "x batch1 batch2 beta alpha"),
    _Row("addmm", "x mat1 mat2 beta alpha"),
    _Row("einsum", "equation *operands"),
    _Row("tensordot", "x y dims dims_other"),
    _Row("inner", "x y"),
    _Row("linear", "x weight bias"),
    # creation
    _Row("arange", "*range"),
    _Row("full", "*sizes fill_value"),
    _Row("ones", "*sizes"),
    _Row("zeros", "*sizes"),
    _Row("new_full", "x sizes fill_value"),
    _Row("new_ones", "x *sizes"),
    _Row("new_zeros", "x *sizes"),
    _Row("full_like", "x fill_value"),
    _Row("ones_like", "x"),
    _Row("zeros_like", "x"),
    _Row("tensor", "data", "as_tensor scalar_tensor"),
    # views
    _Row("expand", "x *sizes", "broadcast_to"),
    _Row("expand_as", "x other"),
    _Row("view", "x *sizes", "reshape _unsafe_view"),
    _Row("view_as", "x other", "reshape_as"),
    _Row("flatten", "x start_dim end_dim"),
    _Row("unflatten", "x dim sizes"),
    _Row("unsqueeze", "x dim"),
    _Row("squeeze", "x dim"),
    _Row("transpose", "x dim0 dim1", "swapaxes swapdims"),
    _Row("t", "x"),
    _Row("permute", "x *dims"),
    _Row("select", "x dim index"),
    _Row("slice", "x dim start end step"),
    _Row("narrow", "x dim start length"),
    _Row("getitem", "x index"),
    _Row("index", "x index"),
    _Row("repeat", "x *repeats"),
    _Row("tile", "x *repeats"),
    _Row("repeat_interleave", "x repeats dim"),
    _Row("contiguous", "x"),
    _Row("clone", "x"),
    _Row("detach", "x"),
    _Row("alias", "x"),
    _Row("lift_fresh_copy", "x"),
    # casts
    _Row("to", "x *target", "_to_copy"),
    _Row("type", "x dtype"),
    _Row("type_as", "x other"),
    *(_Row(name, "x") for name in ("bool", "int", "long", "float", "half", "bfloat16", "double")),
    # comparison and logic
    _Row("eq", "x y", "__eq__"),
    _Row("ne", "x y", "not_equal __ne__"),
    _Row("lt", "x y", "less __lt__"),
    _Row("le", "x y", "less_equal __le__"),
    _Row("gt", "x y", "greater __gt__"),
    _Row("ge", "x y", "greater_equal __ge__"),
    _Row("and", "x y", "and_ iand __and__ __rand__ __iand__ bitwise_and"),
    _Row("or", "x y", "or_ ior __or__ __ror__ __ior__ bitwise_or"),
    _Row("xor", "x y", "xor ixor __xor__ __rxor__ __ixor__ bitwise_xor"),
    _Row("rshift", "x y", "__rshift__ bitwise_right_shift"),
    _Row("not", "x", "invert inv __invert__ bitwise_not"),
    _Row("logical_and", "x y"),
    _Row("logical_or", "x y"),
    _Row("logical_xor", "x y"),
    _Row("logical_not", "x"),
    # arithmetic
    _Row("add", "x y", "iadd __add__ __radd__"),
    _Row("sub", "x y", "isub subtract __sub__"),
    _Row("rsub", "x y", "__rsub__"),
    _Row("mul", "x y", "imul multiply __mul__ __rmul__"),
    _Row("div", "x y", "truediv itruediv divide true_divide __truediv__"),
    _Row("floordiv", "x y", "ifloordiv floor_divide __floordiv__"),
    _Row("mod", "x y", "imod remainder __mod__"),
    _Row("neg", "x", "negative __neg__"),
    _Row("abs", "x", "absolute __abs__"),
    _Row("minimum", "x y"),
    _Row("maximum", "x y"),
    _Row("clamp", "x min max", "clip clamp_min clamp_max"),
    _Row("tanh", "x"),
    _Row("exp", "x"),
    _Row("sum", "x dim keepdim"),
    _Row("sqrt", "x"),
    _Row("max", "x dim keepdim", "amax"),
    _Row("min", "x dim keepdim", "amin"),
    _Row("any", "x dim keepdim"),
    _Row("log", "x"),
    _Row("sign", "x", "sgn"),
    _Row("relu", "x"),
    _Row("nan_to_num", "x nan posinf neginf"),
    _Row("dropout", "x p training", "native_dropout"),
    # selection and structure
    _Row("where", "condition x y"),
    _Row("masked_fill", "x mask value"),
    _Row("tril", "x diagonal"),
    _Row("triu", "x diagonal"),
    _Row("eye", "*sizes"),
    _Row("flip", "x *dims"),
    _Row("index_select", "x dim index"),
    _Row("pad", "x pad mode value"),
    _Row("constant_pad_nd", "x pad value"),
    _Row("fill_diagonal", "x value wrap"),
    _Row("diff", "x n dim prepend append"),
    _Row("cumsum", "x dim"),
    _Row("cat", "tensors dim", "concat concatenate"),
    _Row("stack", "tensors dim"),
    _Row("fill", "x value"),
    _Row("setitem", "x index value"),
    # sizes
    _Row("size", "x dim", "sym_size"),
)

# What torch calls a parameter that the rows above call x, y, dim, sizes.
_PARAMETERS = {
    "input": "x",
    "self": "x",
    "tensor": "x",
    "train": "training",
    "other": "y",
    "mat2": "y",
    "tensor2": "y",
    "axis": "dim",
    "attn_bias": "attn_mask",
    "size": "sizes",
    "shape": "sizes",
    "axis0": "dim0",
    "axis1": "dim1",
    "indices": "index",
}
_MODULES = (
    torch,
    torch.Tensor,
    torch.nn.functional,
    torch._C._nn,
    torch._C._special,
    torch._C._linalg,
    operator,
)


def _tables() -> tuple[dict[str, _Row], dict[Callable[..., Any], tuple[_Row, bool]]]:
    by_name: dict[str, _Row] = {}
    by_function: dict[Callable[..., Any], tuple[_Row, bool]] = {}
    for row in _ROWS:
        for name in (row.name, *row.spellings.split()):
            by_name[name] = row
            for spelled in (name, name + "_"):
                for module in _MODULES:
                    function = getattr(module, spelled, None)
                    if callable(function):
                        # operator.and_ is no in-place form; Tensor.add_ is.
                        inplace = spelled != name and module is not operator
                        by_function.setdefault(function, (row, inplace))
    return by_name, by_function


_BY_NAME, _BY_FUNCTION = _tables()
_INPLACE_NAMES = {
    f"i{name}"
    for name in (
        "add and concat floordiv lshift matmul mod mul or pow rshift sub truediv xor"
    ).split()
} | {"setitem", "delitem"}
_INPLACE_OPERATORS = {getattr(operator, name) for name in _INPLACE_NAMES}
_INPLACE_METHODS = {f"__{name}__" for name in _INPLACE_NAMES}


def view(node: fx.Node) -> Op | None:
    """The canonical form of ``node``, or None when the dialect has no row for it."""
    row, inplace, overload = _row(node)
    if row is None:
        return _attribute(node) if node.target is getattr else None
    args = list(node.args)
    if overload == "clamp_max" and len(args) == 2:
        args.insert(1, None)  # clamp_max(x, max)
    if row.name == "where" and _is_method(node) and len(args) == 3:
        args[:2] = args[1], args[0]  # x.where(condition, y)
    return Op(row.name, _bind(row, args, node.kwargs), inplace)


def _attribute(node: fx.Node) -> Op | None:
    """``x.mT`` and ``x.T`` are transpositions."""
    x, attribute = node.args[:2]
    if attribute in ("mT", "mH"):
        return Op("transpose", {"x": x, "dim0": -2, "dim1": -1})
    if attribute in ("T", "H"):
        return Op("t", {"x": x})
    return None


def written(node: fx.Node) -> list[fx.Node]:
    """The tensors that ``node`` writes to: in-place forms, ``out=``, mutable custom operators."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return _mutable_arguments(node, target) if target._schema.is_mutable else []
    out = node.kwargs.get("out")
    found = [] if out is None else list(out) if isinstance(out, (list, tuple)) else [out]
    if node.op in ("call_method", "call_function"):
        spelled = name(node)
        trailing = spelled.endswith("_") and not spelled.endswith("__")
        trailing = trailing or spelled in _INPLACE_METHODS
        # operator.and_, or_ and not_ write nothing.
        of_operator = getattr(target, "__module__", "") == "_operator"
        if (trailing and not of_operator) or target in _INPLACE_OPERATORS:
            found.append(node.args[0] if node.args else node.kwargs.get("input"))
    return [each for each in found if isinstance(each, fx.Node)]


def name(node: fx.Node) -> str:
    """The spelled name of a call: ``transpose``, ``iadd``, ``aten.view.default``."""
    target = node.target
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def _mutable_arguments(node: fx.Node, target: torch._ops.OpOverload) -> list[fx.Node]:
    arguments = target._schema.arguments
    given = {a.name: value for a, value in zip(arguments, node.args, strict=False)} | node.kwargs
    changed = [
        given.get(a.name) for a in arguments if a.alias_info is not None and a.alias_info.is_write
    ]
    return [each for each in changed if isinstance(each, fx.Node)]


def describe(node: fx.Node) -> str:
    """``%name (op)``, as refusals name a node."""
    kinds = {"placeholder": "graph input", "get_attr": "attribute"}
    return f"%{node.name} ({kinds.get(node.op) or name(node)})"


def value(node: fx.Node) -> Any:
    """The fake value of ``node``: Dynamo's ``example_value`` or export's ``val``."""
    meta = node.meta
    return meta["example_value"] if "example_value" in meta else meta.get("val")


def shape(node: fx.Node) -> tuple[int | sympy.Expr, ...] | None:
    """Sizes of ``node`` as ints and sympy expressions (no SymInt, so no comparison can guard)."""
    fake = value(node)
    if not isinstance(fake, torch.Tensor):
        return None
    return tuple(extent(s) for s in fake.shape)


def extent(size: int | torch.SymInt | sympy.Expr) -> int | sympy.Expr:
    """A size as an int where it is one, else as its sympy expression."""
    expression = size.node.expr if isinstance(size, torch.SymInt) else size
    if isinstance(expression, sympy.Expr) and expression.is_Integer:
        return int(expression)
    return expression


def integer(argument: Any) -> int | sympy.Expr | None:
    """An int, SymInt or SymInt-valued node as an int or sympy expression, else None."""
    if isinstance(argument, fx.Node):
        argument = value(argument)
    if isinstance(argument, bool) or not isinstance(argument, (int, torch.SymInt)):
        return None
    return extent(argument)


def _row(node: fx.Node) -> tuple[_Row | None, bool, str]:
    target = node.target
    if node.op == "call_method" and isinstance(target, str):
        return _named(target)
    if node.op != "call_function":
        return None, False, ""
    if isinstance(target, torch._ops.OpOverload):
        return _named(target._overloadpacket.__name__) if target.namespace == "aten" else _NONE
    if isinstance(target, torch._ops.OpOverloadPacket):
        return _named(target.__name__)
    found = _BY_FUNCTION.get(target) if callable(target) else None
    if found is None:
        return _NONE
    return found[0], found[1] or target in _INPLACE_OPERATORS, getattr(target, "__name__", "")


_NONE: tuple[_Row | None, bool, str] = (None, False, "")


def _is_method(node: fx.Node) -> bool:
    return node.op == "call_method" or node.target is torch.Tensor.where


def _named(name: str) -> tuple[_Row | None, bool, str]:
    if name in _BY_NAME:
        inplace = name.startswith("__i") and name != "__invert__"
        return _BY_NAME[name], inplace, name
    if name.endswith("_") and name[:-1] in _BY_NAME:
        return _BY_NAME[name[:-1]], True, name[:-1]
    return _NONE


def _bind(row: _Row, args: list[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    bound: dict[str, Any] = {}
    parameters = row.signature.split()
    for position, parameter in enumerate(parameters):
        if position >= len(args):
            break
        if parameter.startswith("*"):
            rest = args[position:]
            trailing = parameters[position + 1 :]
            if len(rest) >= 1 and isinstance(rest[0], (list, tuple, torch.Size)):
                bound[parameter[1:]] = tuple(rest[0])
                bound.update(zip(trailing, rest[1:], strict=False))
            else:
                bound[parameter[1:]] = tuple(rest)
            break
        bound[parameter] = args[position]
    plain = {p.lstrip("*") for p in parameters}
    for name, argument in kwargs.items():
        canonical = name if name in plain else _PARAMETERS.get(name, name)
        bound[canonical] = argument
    return bound
