"""Under autocast the operators read q, k and v in its dtype; lse and slopes stay as given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_compile import NSAConfig, functional
from nsa_compile.kernels.autocast import autocast_dtype, register_autocast

SIZES = {"compress_block": 8, "compress_stride": 4, "select_block": 16, "num_selected": 4}
GATED = {**SIZES, "merge": "gate", "window": 20, "query_tile": 1}
PLAIN = {**SIZES, "window": 20, "query_tile": 16, "dense_len": 0}


def tensors(q_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    shapes = (2, 4, 96, 16), (2, 2, 96, 16), (2, 2, 96, 16)
    q, k, v = (torch.randn(shape, requires_grad=True) for shape in shapes)
    return q.to(q_dtype), k, v


def compressed(q: Tensor, k: Tensor, v: Tensor) -> Any:
    pooled = (functional.compress(x, block=8, stride=4) for x in (k, v))
    return functional.compressed_attention(q, *pooled, block=8, stride=4, return_lse=True)


def selected(q: Tensor, k: Tensor, v: Tensor) -> Any:
    blocks = torch.arange(6, dtype=torch.int32).expand(2, 2, 6, 6).contiguous()
    return functional.selected_attention(
        q, k, v, blocks, block=16, query_tile=16, slopes=torch.tensor([0.5, 0.25, 0.1, 0.0]),
        return_lse=True,
    )  # fmt: skip


def switched(q: Tensor, k: Tensor, v: Tensor) -> Any:
    options = {"share_selection": False, "importance": "interpolate", "sel_scale": True}
    gates = torch.ones(2, 4, 96, 3) / 3
    return functional.nsa_attention(q, k, v, gates=gates, config={**GATED, **options})


def gated(q: Tensor, k: Tensor, v: Tensor) -> Any:
    return functional.nsa_attention(q, k, v, gates=torch.ones(2, 4, 96, 3) / 3, config=GATED)


PATHS: dict[str, Callable[..., Any]] = {
    "compressed": compressed,
    "selected": selected,
    "window": lambda *x: functional.sliding_window_attention(*x, window=20, return_lse=True),
    "softmax": lambda *x: functional.nsa_attention(*x, config=PLAIN),
    "topk": lambda *x: functional.nsa_attention(*x, config={**PLAIN, "selector": "topk"}),
    "gate": gated,
    "gate, switches": switched,
}


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "mixed"])
@pytest.mark.parametrize("path", PATHS)
def test_casts_what_attention_reads(path: str, mixed: bool) -> None:
    given = tensors(torch.bfloat16 if mixed else torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        results = PATHS[path](*given)
    exact = PATHS[path](*(x.to(torch.bfloat16) for x in given))
    if isinstance(results, tuple):
        assert results[1].dtype == torch.float32  # the log-sum-exp
        torch.testing.assert_close(results[1], exact[1], rtol=1e-2, atol=1e-2)
        results, exact = results[0], exact[0]
    assert results.dtype == torch.bfloat16
    torch.testing.assert_close(results, exact, rtol=2e-2, atol=2e-2)
    results.float().sum().backward()


@pytest.mark.parametrize("scorer", ["channels", "mean"])
def test_selection_under_autocast(scorer: str) -> None:
    q, k, _ = (x.detach() for x in tensors())
    sizes: dict[str, Any] = {
        "block": 16, "query_tile": 16, "num_selected": 4, "local_window": 20, "compress_block": 8,
        "compress_stride": 4,
    }  # fmt: skip
    with torch.autocast("cpu", torch.bfloat16):
        blocks = functional.select_blocks(q, k, scorer=scorer, **sizes)
    exact = functional.select_blocks(q.bfloat16(), k.bfloat16(), scorer=scorer, **sizes)
    torch.testing.assert_close(blocks, exact)


def test_double_precision_is_left_alone() -> None:
    q, k, v = (x.double() for x in tensors())
    with torch.autocast("cpu", torch.bfloat16):
        assert autocast_dtype(q) == torch.float64
        assert functional.nsa_attention(q, k, v, config=PLAIN).dtype == torch.float64


def test_a_function_compiles_under_autocast() -> None:
    given = tensors()
    config = NSAConfig.from_options(PLAIN)  # a mapping cannot be checked inside a graph

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.nsa_attention(q, k, v, config=config)

    fast = torch.compile(attend, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fast(*given), PATHS["softmax"](*given))


def test_an_unknown_argument_is_named() -> None:
    lib = torch.library.Library("nsa", "FRAGMENT")
    with pytest.raises(ValueError, match=r"nsa::channels has no arguments \['keys'\]"):
        register_autocast(lib, "channels", "q", "keys")
