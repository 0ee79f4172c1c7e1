"""Spell out what a rewrite added as operators alone, the only calls that a saved program may hold.

A rewrite calls methods and functions where that is the simplest to say, which any compiler behind
torch.compile traces through. ``torch.export`` has operators (``torch.ops``) with fake values in
``meta["val"]`` and constants, and no Python.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from nsa_compile.passes import dialect
from nsa_compile.passes.masks.mutation import base

# Makes a tensor an input of the graph, and returns that.
Constant = Callable[[torch.Tensor], fx.Node]
_METADATA = ("nn_module_stack", "stack_trace", "source_fn_stack")


class NotAnOperator(Exception):
    """A call that cannot be spelled out: it needs values that a graph does not have."""


def to_operators(gm: fx.GraphModule, constant: Constant) -> None:
    """Replace, in ``gm`` and the bodies in it, every call that a rewrite added and is no operator.

    Skips what was there before: such nodes have no ``example_value``.

    Before::

        %size = call_method[size](%q, 2)        %gates = call_function[attend](...)

    After::

        %size = aten.sym_size.int(%q, 2)        %gates = the operators that attend calls

    Args:
        constant: makes a tensor an input of ``gm``, for functions that make tensors from numbers.

    Raises:
        NotAnOperator: a function reads values that are only known at run time, or makes tensors
            from numbers inside a body.
    """
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            given = {node for node in module.graph.nodes if "example_value" not in node.meta}
            for node in list(module.graph.nodes):
                if "example_value" in node.meta and not node._erased:
                    _spell_out(module, node, constant if module is gm else None)
            _relax_views(module.graph, given)
            module.graph.lint()
            module.recompile()


def _relax_views(graph: fx.Graph, given: Collection[fx.Node]) -> None:
    """Let a view of what was added copy where it must: dense attention may have other strides.

    Export leaves out a ``contiguous`` that had nothing to do, and a view then counts on it.
    """
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        if base(node) not in given:
            node.target = torch.ops.aten.reshape.default


def _spell_out(module: fx.GraphModule, node: fx.Node, constant: Constant | None) -> None:
    value = node.meta.pop("example_value")
    node.meta["val"] = value
    if _is_operator(node):
        return
    traced = _traced(node)
    known = dict(zip(traced.graph.find_nodes(op="placeholder"), node.all_input_nodes, strict=True))
    with module.graph.inserting_before(node):
        for each in traced.graph.nodes:
            if each.op == "get_attr":
                if constant is None:
                    raise NotAnOperator(f"{_called(node)} makes a tensor from numbers in a body")
                known[each] = constant(getattr(traced, str(each.target)))
            if each.op == "call_function":
                known[each] = module.graph.node_copy(each, known.__getitem__)
                known[each].meta = {
                    **{key: node.meta[key] for key in _METADATA if key in node.meta},
                    "val": each.meta["val"],
                }
    result = next(iter(traced.graph.find_nodes(op="output"))).args[0]
    replacement: Any = fx.map_arg(result, known.__getitem__)
    if isinstance(replacement, fx.Node):
        node.replace_all_uses_with(replacement)
    else:  # a tuple, which is taken apart, or a number
        _replace_by_parts(node, replacement)
    module.graph.erase_node(node)


def _is_operator(node: fx.Node) -> bool:
    if node.target is operator.getitem:  # an element of a tuple, not of a tensor
        source = node.args[0]
        return isinstance(source, fx.Node) and not isinstance(dialect.value(source), torch.Tensor)
    return node.op == "placeholder" or isinstance(node.target, torch._ops.OpOverload)


def _replace_by_parts(node: fx.Node, parts: Any) -> None:
    """Give every user of ``node`` what it reads of ``parts``: an element, or a number as it is."""
    if not isinstance(parts, (list, tuple)):
        for user in list(node.users):
            user.args, user.kwargs = fx.map_arg(
                (user.args, user.kwargs), lambda n: parts if n is node else n
            )
        return
    for user in list(node.users):
        part = parts[user.args[1]]
        user.replace_all_uses_with(part)
        user.graph.erase_node(user)


def _traced(node: fx.Node) -> fx.GraphModule:
    """The operators that ``node`` calls, as a graph of its inputs."""
    inputs = node.all_input_nodes
    values = [dialect.value(each) for each in inputs]

    def run(*given: Any) -> Any:
        known = dict(zip(inputs, given, strict=True))
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), known.__getitem__)
        if node.op == "call_method":
            return getattr(torch.Tensor, str(node.target))(*args, **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    mode = _mode([dialect.value(node), *values])
    try:
        with mode or nullcontext(), torch.no_grad():
            traced: fx.GraphModule = make_fx(run)(*values)
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise NotAnOperator(f"{_called(node)} cannot be traced: {text[:300]}") from error
    return traced


def _mode(values: list[Any]) -> FakeTensorMode | None:
    for value in tree_leaves(values):
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return None


def _called(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_method" else dialect.name(node)
