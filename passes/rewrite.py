"""Rewrite: replace a site by its NSA subgraph of torch.ops.nsa.* nodes; nothing else is touched."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from nsa_compile.passes.site import Decision, Mask

# Two rows past the compressed blocks keep their number from ever being 0 or 1, sizes that torch
# compiles separately for: one dynamic compilation serves short sequences too.
_SPARE_ROWS = 2
_METADATA = ("nn_module_stack", "stack_trace", "source_fn_stack")
_BINARY = "add and concat floordiv lshift matmul mod mul or pow rshift sub truediv xor"
_IN_PLACE_OPERATORS = {f"i{name}" for name in _BINARY.split()} | {"setitem", "delitem"}


class Rewriter:
    """Rewrites the converted sites of one graph, sharing what they share (padding masks).

    Before::

        %out = scaled_dot_product_attention(%q, %k_repeated, %v_repeated, attn_mask=%mask)

    After (scorer "channels"; "mean" has nsa.compress in its first line)::

        %summary = nsa.channels(%q, %k, %valid, r, dense_len)
        %candidates = nsa.select_blocks(%q, %k, %summary, %valid, ...)
        %blocks = nsa.refine_blocks(%q, %k, %candidates, %valid, ...)  # if config asks
        %attention = nsa.selected_attention(%q, %k, %v, %blocks, %valid, ...)
        %out = %attention[0]

    Nodes that only fed the replaced attention (the mask's program, repeated heads) are erased when
    they are pure. A decision that keeps its site dense is skipped.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self._valid: dict[fx.Node, fx.Node] = {}

    def apply(self, decisions: Iterable[Decision]) -> None:
        """Rewrite every converted site, then drop what became unused and recompile the graph."""
        dead: list[fx.Node] = []
        for decision in decisions:
            if decision.converted:
                dead += self._replace(decision)
        erase_unused(self.gm.graph, dead)
        self.gm.graph.lint()
        self.gm.recompile()

    def _replace(self, decision: Decision) -> list[fx.Node]:
        """Replace one site; returns the inputs that the old attention no longer uses."""
        site = decision.site
        with self.gm.graph.inserting_before(site.output):
            out = self._subgraph(decision)
        out.meta["example_value"] = site.output.meta.get("example_value")
        site.output.replace_all_uses_with(out)
        inputs: list[fx.Node] = site.output.all_input_nodes
        self.gm.graph.erase_node(site.output)
        return inputs

    def _subgraph(self, decision: Decision) -> fx.Node:
        site, config = decision.site, decision.config
        mask = site.mask
        assert isinstance(mask, Mask)
        ops, q, k, v = torch.ops.nsa, site.query, site.key, site.value
        call = _Caller(self.gm.graph, site.output)
        valid = self._valid_keys(mask.valid, q, call)
        if config.scorer == "channels":
            r = config.channels(site.head_dim)
            summary = call(ops.channels.default, q, k, valid, r, config.dense_len)
        else:
            sizes = (config.compress_block, config.compress_stride)
            summary = call(ops.compress.default, k, valid, *sizes, _SPARE_ROWS)
        visibility = (site.scale, mask.causal, mask.offset, mask.window)
        blocks = call(
            ops.select_blocks.default,
            q, k, summary, valid, config.scorer, *visibility,
            config.query_tile, config.select_block, config.proposed_blocks(), config.init_blocks,
            config.window, config.compress_block, config.compress_stride, config.dense_len,
        )  # fmt: skip
        if config.proposed_blocks() > (config.num_selected or 0):
            blocks = call(
                ops.refine_blocks.default,
                q, k, blocks, valid, *visibility,
                config.query_tile, config.select_block, config.num_selected, config.init_blocks,
                config.window, config.dense_len,
            )  # fmt: skip
        attention = call(
            ops.selected_attention.default,
            q, k, v, blocks, valid, *visibility,
            config.query_tile, config.select_block, config.dense_len,
        )  # fmt: skip
        return call(operator.getitem, attention, 0)

    def _valid_keys(self, valid: fx.Node | None, q: fx.Node, call: _Caller) -> fx.Node | None:
        """``valid`` as bool [B, Tk], converted once for all the layers that share it."""
        if valid is None:
            return None
        if valid not in self._valid:
            value, keys = valid.meta["example_value"], valid
            if value.dtype != torch.bool:
                keys = call(torch.ne, keys, 0)
            if isinstance(value.shape[0], int) and value.shape[0] == 1:
                batch = call("size", q, 0)
                keys = call("expand", keys, batch, -1)
            self._valid[valid] = keys
        return self._valid[valid]


class _Caller:
    """Appends call nodes that carry the origin's metadata and a fake value."""

    def __init__(self, graph: fx.Graph, origin: fx.Node) -> None:
        self.graph = graph
        self.metadata = {key: origin.meta[key] for key in _METADATA if key in origin.meta}

    def __call__(self, target: Callable[..., Any] | str, *args: Any) -> fx.Node:
        if isinstance(target, str):
            node = self.graph.call_method(target, args)
        else:
            node = self.graph.call_function(target, args)
        node.meta.update(self.metadata)
        node.meta["example_value"] = _fake_value(target, args)
        return node


def _fake_value(target: Callable[..., Any] | str, args: tuple[Any, ...]) -> Any:
    """What the call returns on the fake values of its arguments: shapes and dtypes, no data."""
    values = fx.node.map_arg(args, lambda node: node.meta["example_value"])
    mode = next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None)
    call = getattr(torch.Tensor, target) if isinstance(target, str) else target
    with mode or nullcontext(), torch.no_grad():
        return call(*values)


def erase_unused(graph: fx.Graph, candidates: Iterable[fx.Node]) -> None:
    """Erase ``candidates`` that nobody uses any more, and then their inputs likewise.

    Skips placeholders, in-place and other impure nodes: those have effects without users.
    """
    pending = list(candidates)
    while pending:
        node = pending.pop()
        if node.graph is not graph or node._erased or node.users or not _is_pure(node):
            continue
        pending += node.all_input_nodes
        graph.erase_node(node)


def _is_pure(node: fx.Node) -> bool:
    if node.op == "get_attr":
        return True
    if node.op == "call_method":
        return isinstance(node.target, str) and not node.target.endswith("_")
    if node.op != "call_function" or node.is_impure() or "out" in node.kwargs:
        return False
    name = getattr(node.target, "__name__", "")
    module = getattr(node.target, "__module__", "")
    in_place = name.endswith("_") or (module == "_operator" and name in _IN_PLACE_OPERATORS)
    return not in_place
