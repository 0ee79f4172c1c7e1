"""A Dynamo backend that finds sites and compares their proven masks with the real ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx, nn

from nsa_compile.passes import dialect
from nsa_compile.passes.masks.evaluate import evaluate
from nsa_compile.passes.match import find_sites
from nsa_compile.passes.site import AttentionSite, Mask

MASKED = -1e4


@dataclass
class Checker:
    """``torch.compile(f, backend=checker)`` runs f eagerly and checks every proof against the run.

    Attributes:
        graphs: the captured graphs.
        sites: their sites, in order of capture.
        checked: how many (call, site) pairs were compared element by element.
    """

    graphs: list[fx.GraphModule] = field(default_factory=list)
    sites: list[AttentionSite] = field(default_factory=list)
    checked: int = 0

    may_guard: ClassVar[bool] = False

    def recorder(self, gm: fx.GraphModule, sites: Sequence[AttentionSite]) -> Any:
        """Runs the graph, then compares its sites."""
        return _Recorder(gm, sites)

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        before, guards = str(gm.graph), _guards(gm)
        sites = find_sites(gm, values=buffers(gm, inputs))
        assert str(gm.graph) == before, "find_sites changed the graph"
        assert self.may_guard or _guards(gm) == guards, "find_sites installed a guard"
        self.graphs.append(gm)
        self.sites += sites

        def run(*args: Any) -> Any:
            recorder = self.recorder(gm, sites)
            result = recorder.run(*args)
            for site in sites:
                if isinstance(site.mask, Mask):
                    recorder.compare(site)
                    self.checked += 1
            return result

        return run

    @property
    def site(self) -> AttentionSite:
        """The only site."""
        (site,) = self.sites
        return site

    @property
    def masks(self) -> list[str]:
        """Mask class or reason code of every site."""
        return [verdict(site) for site in self.sites]


def verdict(site: AttentionSite) -> str:
    """``"causal & padding"`` or a reason code."""
    return site.mask.describe() if isinstance(site.mask, Mask) else site.mask.code


def check(f: Callable[..., Any], *calls: tuple[Any, ...], dynamic: bool | None = None) -> Checker:
    """Compile ``f`` with a Checker, call it with each of ``calls``, return what was found."""
    torch._dynamo.reset()
    checker = Checker()
    compiled = torch.compile(f, backend=checker, dynamic=dynamic, fullgraph=True)
    with torch.no_grad():
        for call in calls:
            compiled(*call)
    return checker


def buffers(gm: fx.GraphModule, inputs: Sequence[Any]) -> dict[fx.Node, torch.Tensor]:
    """The graph inputs that are buffers of a module."""
    return {
        node: value
        for node, value in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True)
        if isinstance(value, torch.Tensor)
        and not isinstance(value, nn.Parameter)
        and "_dynamo_static_input_type" in (node.meta.get("tensor_dict") or {})
    }


def compare(site: AttentionSite, seen: dict[fx.Node, Any]) -> None:
    """Assert that the proven mask of ``site`` is the mask that this run used."""
    mask = site.mask
    assert isinstance(mask, Mask)
    if any(((seen[node] != 0) & (seen[node] != 1)).any() for node in mask.binary):
        return  # the run-time check finds this, and the dense graph runs
    q_len, kv_len = seen[site.query].shape[-2], seen[site.key].shape[-2]
    proven = evaluate(
        mask,
        q_len,
        kv_len,
        valid=None if mask.valid is None else seen[mask.valid],
        hidden=None if mask.hidden is None else seen[mask.hidden],
        offset=seen[mask.offset] if isinstance(mask.offset, fx.Node) else None,
        prefix=seen[mask.prefix] if isinstance(mask.prefix, fx.Node) else None,
        segments=mask.segments and (seen[mask.segments[0]], seen[mask.segments[1]]),
    )
    real = torch.ones(q_len, kv_len, dtype=torch.bool)
    op = dialect.view(site.output)
    assert op is not None
    if op["is_causal"]:
        real = real.tril()
    real = real[None, None]
    if site.mask_node is not None:
        real = real & kept(seen[site.mask_node])
    proven, real = torch.broadcast_tensors(proven, real)
    assert torch.equal(proven, real), f"{mask.describe()} is not the mask of %{site.output.name}"
    if mask.segments is not None and mask.segments_sorted:
        queries, keys = (
            seen[ids].reshape(-1, length)
            for ids, length in zip(mask.segments, (q_len, kv_len), strict=True)
        )
        assert (keys.diff(dim=-1) >= 0).all(), "ids that were proven sorted are not"
        assert q_len != kv_len or torch.equal(queries, keys)


def kept(mask: torch.Tensor) -> torch.Tensor:
    """Where a real mask lets keys through, 4-d."""
    if mask.dtype != torch.bool:
        assert ((mask == 0) | (mask <= MASKED)).all()
        mask = mask == 0
    return mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))


def _guards(gm: fx.GraphModule) -> int:
    """How many shape guards the graph's shape environment holds."""
    for node in gm.graph.nodes:
        fake = node.meta.get("example_value")
        for size in fake.shape if isinstance(fake, torch.Tensor) else (fake,):
            if isinstance(size, torch.SymInt):
                return len(size.node.shape_env.guards)
    return 0


def _needed(site: AttentionSite) -> list[fx.Node]:
    nodes = [site.query, site.key, site.mask_node]
    if isinstance(site.mask, Mask):
        mask = site.mask
        nodes += [
            mask.valid,
            mask.hidden,
            mask.offset,
            mask.prefix,
            *(mask.segments or ()),
            *mask.binary,
        ]
    return [n for n in nodes if isinstance(n, fx.Node)]


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps, for every site, what it reads as it is when the attention runs."""

    def __init__(self, gm: fx.GraphModule, sites: Sequence[AttentionSite]) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.sites = {site.output: site for site in sites}
        self.seen: dict[fx.Node, dict[fx.Node, Any]] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n in self.sites:
            read = {node: self.env[node] for node in _needed(self.sites[n])}
            self.seen[n] = {
                node: value.clone() if isinstance(value, torch.Tensor) else value
                for node, value in read.items()
            }
        return super().run_node(n)

    def compare(self, site: AttentionSite) -> None:
        compare(site, self.seen[site.output])
