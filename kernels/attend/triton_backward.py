"""The gradient of block-sparse attention on CUDA: the queries' side, then the keys'."""

from __future__ import annotations

import torch

from nsa_compile.kernels.attend import triton_few, triton_gathered
from nsa_compile.kernels.attend.site import Site
from nsa_compile.kernels.attend.triton_key_gradient import key_gradients
from nsa_compile.kernels.attend.triton_query_gradient import query_gradient
from nsa_compile.kernels.attend.triton_rows import order_blocks
from nsa_compile.kernels.attend.upstream import Upstream
from nsa_compile.kernels.layout import empty_token_major
from nsa_compile.kernels.triton_site import dense_rows, terms

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def backward(
    grad_out: torch.Tensor, grad_lse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor,
    v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, block_indices: torch.Tensor, site: Site,
) -> Gradients:  # fmt: skip
    """(dq, dk, dv), token-major, in the dtypes of q, k and v."""
    gradients = tuple(empty_token_major(x, *x.shape) for x in (q, k, v))
    if q.numel() == 0 or k.shape[2] == 0:
        for gradient in gradients:
            gradient.zero_()
        return gradients
    upstream = Upstream(dense_rows(grad_out), grad_lse, dense_rows(out))
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    differentiate(upstream, q, k, v, lse.contiguous(), block_indices, site, gradients)
    return gradients


def differentiate(
    upstream: Upstream, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lse: torch.Tensor,
    block_indices: torch.Tensor, site: Site, gradients: Gradients,
) -> None:  # fmt: skip
    """Fills (dq, dk, dv). The last dimension of inputs is dense, and so is all of lse."""
    dq, dk, dv = gradients
    extra = terms(site.visibility, site.modifiers, q)
    gate = upstream.gate
    delta = torch.empty_like(lse) if gate is None else gate.delta

    def tiled(lists, site, upstream=upstream):
        ordered = order_blocks(lists, q.shape[2], k.shape[2], site)
        query_gradient(upstream, q, k, v, lse, ordered, dq, delta, site, extra)
        return ordered[0]

    if triton_few.serves(q, k, v, site):
        parts = triton_few.parts_of(q, k, block_indices, site, True)
        tiled(*parts.shared)
        tiled(*parts.left, upstream._replace(added=(True, False), given=True))
        lists = parts.kept
    elif triton_gathered.serves(q, k, v, site):
        lists = triton_gathered.query_gradient(
            upstream.grad_out, q, k, v, lse, delta, gate, dq, block_indices, site, tiled
        )
    else:
        lists = tiled(block_indices, site)
    key_gradients(upstream, q, k, v, lse, lists, dk, dv, delta, site, extra)
