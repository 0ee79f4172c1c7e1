"""Rewrite: replace a site by its NSA subgraph of torch.ops.nsa.* nodes; nothing else is touched."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from nsa_compile.passes import dialect
from nsa_compile.passes.config import NSAConfig
from nsa_compile.passes.emit import Caller
from nsa_compile.passes.erase import erase_unused
from nsa_compile.passes.gate import attend
from nsa_compile.passes.merges import SPARE_ROWS
from nsa_compile.passes.selectors import bound
from nsa_compile.passes.site import AttentionSite, Decision, Mask
from nsa_compile.passes.visibility import Visibility, row


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

    Around it stand the steps that bring q, k, v and out to ``[B, H, T, D]`` and back, casts to the
    dtype in which the site computes its logits, and ``out * sigmoid(lse - sink)`` for sinks. Nodes
    that only fed the replaced attention (the mask's program, repeated heads, scores written in
    place) are erased. A decision that keeps its site dense is skipped.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self._visibility = Visibility()
        self._outputs: list[tuple[fx.Node, fx.Node]] = []

    def apply(self, decisions: Iterable[Decision]) -> None:
        """Rewrite every converted site, then drop what became unused. Does not recompile."""
        dead: list[fx.Node] = []
        for decision in decisions:
            if decision.converted:
                dead += self._replace(decision)
        for old, new in self._outputs:
            # A site that reads an earlier site's output was found when that was still the old one.
            old.replace_all_uses_with(new)
            self.gm.graph.erase_node(old)
        erase_unused(self.gm.graph, dead)
        self.gm.graph.lint()

    def _replace(self, decision: Decision) -> list[fx.Node]:
        """Replace one site; returns the inputs that the old attention no longer uses."""
        site = decision.site
        with self.gm.graph.inserting_before(site.output):
            out, lse = self._subgraph(decision)
        out.meta["example_value"] = dialect.value(site.output)
        site.output.replace_all_uses_with(out)
        inputs: list[fx.Node] = site.output.all_input_nodes
        if site.lse is not None and lse is not None:
            site.lse.replace_all_uses_with(lse)
            _move_behind(lse, site.lse)
            inputs.append(site.lse)
        self._outputs.append((site.output, out))
        return inputs

    def _subgraph(self, decision: Decision) -> tuple[fx.Node, fx.Node | None]:
        """The nodes that replace the site's output and its log-sum-exp."""
        site, config = decision.site, decision.config
        mask = site.mask
        assert isinstance(mask, Mask)
        ops, call = torch.ops.nsa, Caller(self.gm.graph, site.output)
        q, k, v = _operands(site, call)
        *visible, causal = self._visibility.operands(mask, q, k, call)
        valid = visible[0]
        if site.mark is not None and config.merge == "gate":
            mark, where = site.mark, (valid, visible[1], site.scale, causal, mask.offset)
            held = (mark.template, mark.training, mark.hidden, mark.parameters)
            out = call(attend, *held, q, k, v, *where)
            out = call.steps(out, site.output_steps)
            return call.cast(out, dialect.value(site.output).dtype), None
        logits = (site.scale, site.modifiers.softcap, causal, mask.offset, mask.window)
        terms = (*visible, *_alibi(site, call))
        if config.selector == "nsa":
            blocks = _blocks(q, k, site.head_dim, config, terms, logits, call)
        else:
            blocks = call(bound(config), q, k, valid, site.scale, causal, mask.offset)
        attention = call(
            ops.selected_attention.default,
            q, k, v, blocks, *terms, *logits,
            config.query_tile, config.select_block, config.dense_len,
        )  # fmt: skip
        return _result(site, mask, attention, v, call), _lse(site, mask, attention, call)


def _blocks(
    q: fx.Node, k: fx.Node, head_dim: int, config: NSAConfig, terms: tuple[Any, ...],
    logits: tuple[Any, ...], call: Caller,
) -> fx.Node:  # fmt: skip
    """The blocks that the scorer chooses."""
    ops, valid, proposed = torch.ops.nsa, terms[0], config.proposed_blocks(head_dim)
    if config.scorer == "channels":
        r = config.channels(head_dim)
        summary = call(ops.channels.default, q, k, valid, r, config.dense_len)
    else:
        sizes = (config.compress_block, config.compress_stride)
        summary = call(ops.compress.default, k, valid, *sizes, SPARE_ROWS, config.dense_len)
    blocks = call(
        ops.select_blocks.default,
        q, k, summary, *terms, config.scorer, *logits,
        config.query_tile, config.select_block, proposed, config.init_blocks,
        config.window, config.compress_block, config.compress_stride, config.dense_len,
    )  # fmt: skip
    if proposed > (config.num_selected or 0):
        blocks = call(
            ops.refine_blocks.default,
            q, k, blocks, *terms, *logits,
            config.query_tile, config.select_block, config.num_selected, config.init_blocks,
            config.window, config.dense_len,
        )  # fmt: skip
    return blocks


def _operands(site: AttentionSite, call: Caller) -> tuple[fx.Node, fx.Node, fx.Node]:
    """q, k and v as ``[B, H, T, D]`` in the dtype of the site's logits.

    They differ from it under autocast, where attention casts what it reads.
    """
    q, k, v = (
        call.cast(call.steps(node, steps), site.dtype)
        for node, steps in (
            (site.query, site.query_steps),
            (site.key, site.key_steps),
            (site.value, site.value_steps),
        )
    )
    return q, k, v


def _alibi(site: AttentionSite, call: Caller) -> tuple[fx.Node | None, fx.Node | None]:
    """ALiBi slopes float32 [Hq] and key positions float32 [B, Tk], as the operators take them."""
    slopes, positions = site.modifiers.slopes, site.modifiers.positions
    if slopes is None:
        return None, None
    if isinstance(slopes, fx.Node):
        slopes = call.cast(call("reshape", slopes, -1), torch.float32)
        if site.modifiers.slope_factor != 1.0:
            slopes = call(torch.mul, slopes, site.modifiers.slope_factor)
    else:
        device = dialect.value(site.query).device
        slopes = call(torch.tensor, list(slopes), dtype=torch.float32, device=device)
    if positions is None:
        return slopes, None
    return slopes, call.cast(row(positions, call), torch.float32)


def _result(
    site: AttentionSite, mask: Mask, attention: fx.Node, v: fx.Node, call: Caller
) -> fx.Node:
    """The attention's output as the node that it replaces had it."""
    out = call(operator.getitem, attention, 0)
    if site.modifiers.sinks is not None:
        # The denominator exp(lse) grows by exp(sink): the output shrinks by sigmoid(lse - sink).
        lse = call(operator.getitem, attention, 1)
        sinks = call.cast(call("reshape", site.modifiers.sinks, 1, -1, 1), dialect.value(lse).dtype)
        share = call("unsqueeze", call("sigmoid", call("sub", lse, sinks)), -1)
        out = call(torch.mul, out, call.cast(share, dialect.value(out).dtype))
    elif mask.averages:
        # Nobody should read what padding attends to, but recurrent layers do.
        lse = call("unsqueeze", call(operator.getitem, attention, 1), -1)
        average = call("mean", v, 2, True)
        group = site.q_heads // site.kv_heads
        if group > 1:
            average = call("repeat_interleave", average, group, 1)
        out = call(torch.where, call(torch.eq, lse, -math.inf), average, out)
    out = call.steps(out, site.output_steps)
    return call.cast(out, dialect.value(site.output).dtype)


def _lse(site: AttentionSite, mask: Mask, attention: fx.Node, call: Caller) -> fx.Node | None:
    """The rows' log-sum-exp as the node that the model reads had it."""
    if site.lse is None:
        return None
    old = dialect.value(site.lse)
    lse = call("unsqueeze", call(operator.getitem, attention, 1), -1)
    lse = call.cast(call.steps(lse, site.lse_steps), old.dtype)
    # Where padding adds the lowest finite number, a row of nothing else has that, not -inf.
    return call("clamp", lse, torch.finfo(old.dtype).min) if mask.averages else lse


def _move_behind(new: fx.Node, old: fx.Node) -> None:
    """Move every reader of ``new`` that stands between ``old`` and it behind it, in order."""
    between, node = [], old.next
    while node is not new:
        if node.op == "root":
            return  # they stand behind it already
        between.append(node)
        node = node.next
    late, last = {new}, new
    for node in between:
        if late & set(node.all_input_nodes):
            late.add(node)
            last.append(node)
            last = node
