"""Sites: every argument form of SDPA, shapes that are refused, and where a site comes from."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from nsa_compile.passes.match import find_sites
from nsa_compile.passes.match.origin import clean_path
from tests.passes.checking import check, verdict

Tensor = torch.Tensor
sdpa = F.scaled_dot_product_attention
aten = torch.ops.aten.scaled_dot_product_attention.default


def qkv(shape: tuple[int, ...] = (2, 4, 12, 16), width: int = 16) -> tuple[Tensor, ...]:
    return torch.randn(shape), torch.randn(shape), torch.randn(*shape[:-1], width)


@pytest.mark.parametrize(
    ("call", "mask", "scale", "dropout"),
    [
        (lambda q, k, v: sdpa(q, k, v), "full", 0.25, 0.0),
        (lambda q, k, v: sdpa(q, key=k, value=v), "full", 0.25, 0.0),
        (lambda q, k, v: sdpa(value=v, key=k, query=q, is_causal=True), "causal", 0.25, 0.0),
        (lambda q, k, v: sdpa(q, k, v, None, 0.0, True), "causal", 0.25, 0.0),
        (lambda q, k, v: sdpa(q, k, v, None, 0.5, False), "full", 0.25, 0.5),
        (lambda q, k, v: sdpa(q, k, v, dropout_p=0.1), "full", 0.25, 0.1),
        (lambda q, k, v: sdpa(q, k, v, scale=1.0), "full", 1.0, 0.0),
        (lambda q, k, v: sdpa(q, k, v, scale=2), "full", 2.0, 0.0),
        (lambda q, k, v: sdpa(q, k, v, scale=1 / math.sqrt(3)), "full", 1 / math.sqrt(3), 0.0),
        (lambda q, k, v: torch._C._nn.scaled_dot_product_attention(q, k, v), "full", 0.25, 0.0),
        (lambda q, k, v: aten(q, k, v, None, 0.0, True, scale=0.5), "causal", 0.5, 0.0),
    ],
)
def test_argument_forms(
    call: Callable[..., Tensor], mask: str, scale: float, dropout: float
) -> None:
    site = check(call, qkv()).site
    assert (verdict(site), site.scale, site.dropout) == (mask, scale, dropout)
    assert site.spelling == "sdpa"


def test_what_a_site_reads() -> None:
    site = check(lambda q, k, v: sdpa(q, k, v), qkv((2, 4, 12, 16), width=24)).site
    assert (site.batch, site.q_heads, site.kv_heads) == (2, 4, 4)
    assert (site.q_len, site.kv_len, site.head_dim, site.value_dim) == (12, 12, 16, 24)
    assert site.dtype == torch.float32
    assert [n.op for n in (site.query, site.key, site.value)] == ["placeholder"] * 3


def test_sizes_of_a_dynamic_graph_are_symbols() -> None:
    q, k, v = qkv()
    for tensor in (q, k, v):
        torch._dynamo.mark_dynamic(tensor, 2)
    site = check(lambda q, k, v: sdpa(q, k, v, is_causal=True), (q, k, v)).site
    assert isinstance(site.q_len, torch.SymInt)
    assert isinstance(site.kv_len, torch.SymInt)
    assert (site.batch, site.q_heads, site.head_dim) == (2, 4, 16)


class Scaled(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        q = x.view(x.shape[0], x.shape[1], 2, 8).transpose(1, 2)
        return sdpa(q, q, q, scale=self.scale)


@pytest.mark.parametrize("dynamic", [None, True])
def test_scale_of_a_module(dynamic: bool | None) -> None:
    """Dynamo passes a module's float as the item of a lifted tensor under dynamic shapes."""
    site = check(Scaled(0.3), (torch.randn(2, 12, 16),), dynamic=dynamic).site
    if isinstance(site.scale, float):
        assert site.scale == 0.3
    else:
        assert site.scale.meta["example_value"].node.hint == 0.3


def test_default_scale_of_a_dynamic_graph() -> None:
    def f(x: Tensor) -> Tensor:
        q = x.view(x.shape[0], x.shape[1], 2, 16).transpose(1, 2)
        return sdpa(q, q, q)

    assert check(f, (torch.randn(2, 12, 32),), dynamic=True).site.scale == 0.25


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = sdpa(x, x, x, is_causal=True)
        return y + sdpa(x, x, x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.layers[0](x)


def test_module_paths_and_ordinals() -> None:
    sites = check(Model(), (torch.randn(1, 2, 12, 8),)).sites
    path = "layers.{}.attn".format
    expected = [(path(0), 0), (path(0), 1), (path(1), 0), (path(1), 1), (path(0), 2), (path(0), 3)]
    assert [(s.module, s.ordinal) for s in sites] == expected
    assert {s.module_class for s in sites} == {"Attention"}
    assert [verdict(s) for s in sites[:2]] == ["causal", "full"]


def test_the_compiled_module_itself_has_an_empty_path() -> None:
    site = check(Attention(), (torch.randn(1, 2, 12, 8),)).sites[0]
    assert (site.module, site.module_class, site.ordinal) == ("", "", 0)


@pytest.mark.parametrize(
    ("path", "clean"),
    [
        ("L['self'].model.layers.0.self_attn", "model.layers.0.self_attn"),
        ("L['self']", ""),
        ("L['fn'].blocks.3", "blocks.3"),
        ('L["m"].blocks[3].attn', "blocks.3.attn"),
        ("L['self']._modules['layers']._modules['0']", "layers.0"),
        ("G['model'].attn", "attn"),
        ("model.attn", "model.attn"),
        ("", ""),
    ],
)
def test_prefixes_are_stripped(path: str, clean: str) -> None:
    assert clean_path(path) == clean


def test_source_is_the_line_of_the_model() -> None:
    site = check(Block(), (torch.randn(1, 2, 12, 8),)).sites[0]
    file, _, line = site.source.rpartition(":")
    assert file.endswith("tests/passes/test_sites.py")
    assert not file.startswith("/")
    text = open(__file__).read().splitlines()[int(line) - 1]  # noqa: PTH123
    assert "y = sdpa(x, x, x, is_causal=True)" in text


def test_an_exported_program_has_the_same_sites() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.key = nn.Linear(32, 16)

        def forward(self, x: Tensor, padding: Tensor) -> Tensor:
            t = x.shape[1]
            q = x.view(x.shape[0], t, 4, 8).transpose(1, 2)
            k = self.key(x).view(x.shape[0], t, 2, 8).transpose(1, 2)
            k = k.unsqueeze(2).expand(-1, -1, 2, -1, -1).flatten(1, 2)
            causal = torch.arange(t)[None] <= torch.arange(t)[:, None]
            mask = causal & padding[:, None, None, :].bool()
            return sdpa(q, k, k, attn_mask=mask)

    x, padding = torch.randn(2, 12, 32), torch.ones(2, 12, dtype=torch.long)
    sizes = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    program = torch.export.export(Masked(), (x, padding), dynamic_shapes=(sizes, sizes))
    (site,) = find_sites(program.graph_module)
    assert verdict(site) == "causal & padding"
    assert (site.q_heads, site.kv_heads, site.spelling) == (4, 2, "sdpa")
    assert isinstance(site.q_len, torch.SymInt)
    assert site.source.startswith("tests/passes/test_sites.py:")


def test_checkpointed_attention_is_captured() -> None:
    """The body of a checkpoint is its own graph: its sites are found when that graph is read."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(gm: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(gm)
        return gm.forward

    def f(x: Tensor) -> Tensor:
        return checkpoint(lambda y: sdpa(y, y, y, is_causal=True), x, use_reentrant=False)

    torch._dynamo.reset()
    torch.compile(f, backend=backend)(torch.randn(1, 2, 12, 8, requires_grad=True))
    bodies = [m for g in graphs for m in g.modules() if isinstance(m, torch.fx.GraphModule)]
    assert [verdict(s) for body in bodies for s in find_sites(body)] == ["causal"]
