"""blocks_from_mask against the BlockMask of flex_attention and against masked attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from nsa_compile import functional

MASKS: dict[str, Callable[..., Any]] = {
    "causal": lambda b, h, i, j: i >= j,
    "window": lambda b, h, i, j: (i >= j) & (i - j < 20),
    "strided": lambda b, h, i, j: (i >= j) & ((i - j) // 16 % (h + 2) == 0),
    "documents": lambda b, h, i, j: i // 37 == j // 37 + b,
    "none": lambda b, h, i, j: i < j - 1000,
}


@pytest.mark.parametrize(("q_len", "kv_len"), [(96, 96), (33, 130), (1, 7)])
@pytest.mark.parametrize("name", MASKS)
def test_equals_the_block_mask_of_flex_attention(name: str, q_len: int, kv_len: int) -> None:
    mod, tile, block = MASKS[name], 16, 32
    extents = [torch.arange(size) for size in (2, 3, q_len, kv_len)]
    dense = mod(*torch.meshgrid(*extents, indexing="ij"))
    blocks = functional.blocks_from_mask(dense, block, query_tile=tile)
    flex = create_block_mask(mod, 2, 3, q_len, kv_len, device="cpu", BLOCK_SIZE=(tile, block))
    listed = flex.to_dense().bool()
    tiles, columns = -(-q_len // tile), -(-kv_len // block)
    found = torch.zeros(*blocks.shape[:3], columns + 1, dtype=torch.bool)
    found.scatter_(3, blocks.long() % (columns + 1), True)
    assert torch.equal(found[..., :columns], listed[:, :, :tiles, :columns])
    ends = torch.where(blocks < 0, columns, blocks)
    assert (ends.diff(dim=-1) >= 0).all()


def test_attention_over_the_blocks_is_attention_under_the_mask() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 96, 16) for heads in (4, 2, 2))
    strips = torch.rand(4, 6, 6) < 0.5
    strips |= torch.eye(6, dtype=torch.bool)
    strips = strips.unflatten(0, (2, 2)).any(1)  # a group shares its blocks
    mask = (
        strips.repeat_interleave(16, 1).repeat_interleave(16, 2)[None]
        & torch.ones(96, 96, dtype=torch.bool).tril()
    )
    blocks = functional.blocks_from_mask(mask, 16, query_tile=16)
    out = functional.selected_attention(q, k, v, blocks, block=16, query_tile=16)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, mask.repeat_interleave(2, 1), enable_gqa=True
    )
    torch.testing.assert_close(out, expected)


def test_heads_of_a_group_share_what_either_sees() -> None:
    mask = torch.zeros(1, 4, 1, 8, dtype=torch.bool)
    mask[0, 0, 0, 1] = mask[0, 1, 0, 7] = mask[0, 3, 0, 4] = True
    blocks = functional.blocks_from_mask(mask, 2, kv_heads=2)
    assert blocks.tolist() == [[[[0, 3]], [[2, -1]]]]
    one = functional.blocks_from_mask(mask[0, 0], 2, kv_heads=3, num_selected=2)
    assert one.tolist() == [[[[0, -1]]] * 3]


@pytest.mark.parametrize(
    ("mask", "given", "text"),
    [
        (torch.ones(4, 4), {}, r"mask must be bool \[Tq, Tk\].*float32 \[4, 4\]"),
        (torch.ones(1, 4, 4).bool(), {}, r"got torch.bool \[1, 4, 4\]"),
        (torch.ones(4, 4).bool(), {"query_tile": 0}, "query_tile must be a positive integer"),
        (torch.ones(1, 3, 4, 4).bool(), {"kv_heads": 2}, "multiple of kv_heads, got 3 and 2"),
        (torch.ones(4, 4).bool(), {"num_selected": 1}, "sees more than num_selected=1 blocks"),
    ],
)
def test_wrong_arguments(mask: Tensor, given: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        functional.blocks_from_mask(mask, 2, **given)


def test_a_given_budget_is_compiled_whole_and_known_without_values() -> None:
    def blocks(mask: Tensor) -> Tensor:
        return functional.blocks_from_mask(mask, 16, query_tile=16, num_selected=4)

    mask = torch.ones(50, 60, dtype=torch.bool).tril()
    whole = torch.compile(blocks, backend="aot_eager", fullgraph=True, dynamic=True)
    assert torch.equal(whole(mask), blocks(mask))
    assert blocks(mask.to("meta")).shape == (1, 1, 4, 4)
    with pytest.raises(RuntimeError, match="sees more than num_selected=4 blocks"):
        whole(torch.ones(50, 90, dtype=torch.bool))
