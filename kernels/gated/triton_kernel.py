"""The gated sum on CUDA: the window's kernel completes it; one backward for all branches.

The backward is one pass for the gates, then branch after branch:

dg_ib = do_i . o_ib, which is the delta of branch b before its gate
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from nsa_compile.kernels.attend import triton_kernel as attention
from nsa_compile.kernels.attend.gate import Gate
from nsa_compile.kernels.attend.triton_backward import differentiate
from nsa_compile.kernels.attend.upstream import Upstream
from nsa_compile.kernels.combine.triton_kernel import gate_gradients
from nsa_compile.kernels.gated import cpu as plain
from nsa_compile.kernels.gated.cpu import Found
from nsa_compile.kernels.gated.site import Site
from nsa_compile.kernels.layout import empty_token_major
from nsa_compile.kernels.triton_site import dense_rows
from nsa_compile.kernels.window.table import window_blocks

if TYPE_CHECKING:
    from nsa_compile.kernels.gated.op import Saved


def forward(
    gates: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    compressed: torch.Tensor, selected: torch.Tensor, site: Site, keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The sum; then the window's out and lse, without elements unless they are kept."""
    if q.numel() == 0 or k.shape[2] == 0:
        return plain.forward(gates, q, k, v, compressed, selected, site, keep)
    blocks, own = window_blocks(q, k, *site.windowed)
    branches = (compressed, selected)
    return attention.forward_and_sum(q, k, v, blocks, own, gates, *branches, keep)


def backward(grad_out: torch.Tensor, saved: Saved, site: Site) -> Found:
    """Everything behind the gates, branch after branch."""
    q, k, v, grad_out = (dense_rows(x) for x in (saved.q, saved.k, saved.v, grad_out))
    given = saved.blocks is None
    dgates, rows, dcompressed, dselected = gate_gradients(
        grad_out, saved.gates, saved.compressed, saved.selected, saved.window, given
    )
    dq = dk_cmp = dv_cmp = None
    if saved.k_cmp is not None:
        dq, dk_cmp, dv_cmp = torch.ops.nsa.compressed_attention_backward(
            dcompressed, None, q, saved.k_cmp, saved.v_cmp, saved.compressed,
            saved.compressed_lse, *site.compressed(k.shape[2]),
        )  # fmt: skip
        dcompressed = None
    work = [(2, saved.window_lse, *window_blocks(q, k, *site.windowed))]
    if saved.blocks is not None:
        tiles = -(-q.shape[2] // site.query_tile)
        blocks = saved.blocks.reshape(*saved.blocks.shape[:2], tiles, -1)
        work.insert(0, (1, saved.selected_lse, blocks, site.selected))
    dqkv = (
        empty_token_major(q, *q.shape) if dq is None else dq,
        *(empty_token_major(x, *x.shape) for x in (k, v)),
    )
    if q.numel() == 0 or k.shape[2] == 0:
        for gradient in dqkv[dq is not None :]:
            gradient.zero_()
        work = []
    for number, (branch, lse, blocks, own) in enumerate(work):
        added = (dq is not None or number > 0, number > 0)
        gate = Gate(*rows[:, branch])
        upstream = Upstream(grad_out, None, grad_out, gate, added, given=True)
        differentiate(upstream, q, k, v, lse, blocks, own, dqkv)
    return Found(dgates, dqkv, dk_cmp, dv_cmp, dcompressed, dselected)
