"""NSAParameters: gates, compression and memory of one attention layer."""

from __future__ import annotations

import copy
import functools
import hashlib
import uuid
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import nsa_compile.kernels.library  # noqa: F401
from nsa_compile.nn import compression
from nsa_compile.passes import templates
from nsa_compile.passes.config import NSAConfig, NSAConfigError
from nsa_compile.passes.merges import SPARE_ROWS
from nsa_compile.passes.templates import Learned

# Compressed, selected, window: sigmoid gives 0.12, 0.12, 0.88, so training starts from the window.
_BIAS = (-2.0, -2.0, 2.0)


class NSAParameters(nn.Module):
    """What Native Sparse Attention learns for one layer (arXiv 2502.11089, section 3).

    Gates are the sigmoid of a linear map of the layer's hidden states, for each query head and each
    of the branches compressed, selected and window. Keys and values are compressed by
    ``config.compression``:

    - ``"mean"``: the mean of the block, no weights;
    - ``"weighted"``: a learned weighted mean, a weight for each place in the block;
    - ``"linear"``: a linear map of the block's l * D numbers;
    - ``"mlp"``: the paper's: position embedding within the block, one hidden layer of
      ``compress_expand`` * l * D;
    - ``"conv"``: a depthwise convolution;
    - ``"attention"``: a weighted mean whose weights a linear map of the tokens decides;
    - any module that maps [B, Hkv, Nc, l, D] to [B, Hkv, Nc, D].

    Args:
        config: ``merge="gate"``; ``compression``, ``compress_expand``, ``num_mem_kv``, ``gate`` and
            the sizes.
        width: C, of the hidden states.
        q_heads, kv_heads: Hq and Hkv.
        head_dim: D; ``value_dim``: Dv, D where None.
        sequence_first: hidden states are [T, B, C] instead of [B, T, C].
        source: position and keyword of the hidden states among the attention module's arguments.
        site: path of the module that computes the attention, from the one that holds this.

    Raises:
        NSAConfigError: ``config.merge`` is not ``"gate"``.
    """

    def __init__(
        self, config: NSAConfig | Mapping[str, Any] | None, *, width: int, q_heads: int,
        kv_heads: int, head_dim: int, value_dim: int | None = None, sequence_first: bool = False,
        source: tuple[int | None, str | None] = (0, None), site: str = "",
    ) -> None:  # fmt: skip
        super().__init__()
        config = NSAConfig.from_options({"merge": "gate"} if config is None else config)
        if config.merge != "gate":
            raise NSAConfigError(f"NSAParameters needs merge='gate', got merge={config.merge!r}")
        self.config = config
        self.q_heads, self.kv_heads = q_heads, kv_heads
        self.head_dim, self.value_dim = head_dim, head_dim if value_dim is None else value_dim
        self.sequence_first, self.source, self.site = sequence_first, source, site
        if not config.num_selected:
            warnings.warn(
                "num_selected=0 leaves out the selected branch: only compressed keys and the "
                "window are read",
                stacklevel=2,
            )
        self.gate = _gate(config, width, q_heads)
        self.compress_k = compression.build(_own(config), kv_heads, self.head_dim)
        self.compress_v = compression.build(_own(config), kv_heads, self.value_dim)
        self.memory_k = _memory(config, kv_heads, self.head_dim)
        self.memory_v = _memory(config, kv_heads, self.value_dim)
        tensors = (*self.named_parameters(), *self.named_buffers())
        self.names = tuple(name for name, _ in tensors)
        self.template = self._describe()
        self._register()

    def forward(self, hidden: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Learned:
        """The learned part of one call.

        Args:
            hidden: [B, Tq, C] (or [Tq, B, C]).
            k, v: [B, Hkv, Tk, D] and [B, Hkv, Tk, Dv].
            valid: bool [B, Tk], True for a real key; None says all are.
        """
        memory_k, memory_v = self.memory_k, self.memory_v
        return Learned(
            self._gates(hidden, k.shape[0]),
            self._compressed(k, valid, self.compress_k),
            self._compressed(v, valid, self.compress_v),
            None if memory_k is None else memory_k.to(k.dtype),
            None if memory_v is None else memory_v.to(v.dtype),
        )

    def tensors(self) -> list[Tensor]:
        """Parameters and buffers in the order of ``names``, as parametrizations make them."""
        return [functools.reduce(getattr, name.split("."), self) for name in self.names]

    def apply_to(self, tensors: Sequence[Tensor], training: bool, *inputs: Any) -> Learned:
        """:meth:`forward` with other values of the parameters."""
        self.train(training)
        named = dict(zip(self.names, tensors, strict=True))
        learned: Learned = functional_call(self, named, inputs)
        return learned

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._register()

    def extra_repr(self) -> str:
        heads = f"{self.q_heads}/{self.kv_heads} heads x {self.head_dim}"
        return f"{heads}, compression={self.config.sizes()['compression']}"

    def _gates(self, hidden: Tensor, batch: int) -> Tensor:
        if self.sequence_first:
            hidden = hidden.transpose(0, 1)
        hidden = hidden.reshape(batch, -1, hidden.shape[-1])
        if isinstance(self.gate, nn.Linear):  # under autocast the hidden states may be narrower
            hidden = hidden.to(self.gate.weight.dtype)
        logits: Tensor = self.gate(hidden)
        if list(logits.shape) != [*hidden.shape[:2], 3 * self.q_heads]:
            raise ValueError(
                f"gate must map [B, Tq, C] = {list(hidden.shape)} to [B, Tq, {3 * self.q_heads}], "
                f"got {list(logits.shape)}"
            )
        shape = (hidden.shape[0], hidden.shape[1], self.q_heads, 3)
        return torch.sigmoid(logits.reshape(shape)).transpose(1, 2)

    def _compressed(self, x: Tensor, valid: Tensor | None, module: nn.Module | None) -> Tensor:
        block, stride = self.config.compress_block, self.config.compress_stride
        if module is None:
            mean: Tensor = torch.ops.nsa.compress(x, valid, block, stride, SPARE_ROWS)
            return mean
        wide = next((p.dtype for p in module.parameters() if p.is_floating_point()), x.dtype)
        real = None
        if valid is not None:
            column = valid[:, None, :, None]
            x = x.masked_fill(~column, 0.0)
            real = compression.cut(column, block, stride)
        out: Tensor = module(compression.cut(x.to(wide), block, stride), real)
        return out.to(x.dtype)

    def _describe(self) -> str:
        """A name that equal modules have in common; modules of the user's are never equal."""
        config = self.config
        own = [x for x in (config.gate, config.compression, config.selector) if callable(x)]
        shapes = [
            (name, tuple(x.shape)) for name, x in zip(self.names, self.tensors(), strict=True)
        ]
        heads = (self.q_heads, self.kv_heads, self.head_dim, self.value_dim)
        where = (self.sequence_first, self.site)
        text = repr((config.sizes(), heads, where, shapes, [_name(module) for module in own]))
        kind = config.sizes()["compression"]
        return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def _register(self) -> None:
        templates.register(self.template, self._without_values)

    def _without_values(self) -> NSAParameters:
        """A copy on the meta device."""
        memo: dict[int, Any] = {}
        for tensor in (*self.parameters(), *self.buffers()):
            meta = tensor.detach().to("meta")
            memo[id(tensor)] = nn.Parameter(meta) if isinstance(tensor, nn.Parameter) else meta
        bare = NSAParameters.__new__(NSAParameters)
        nn.Module.__init__(bare)
        bare.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return bare


def prepared_sites(root: nn.Module | None) -> set[str]:
    """Paths, from ``root``, of the modules whose attention has parameters, by all their names."""
    found = set()
    every_name = () if root is None else root.named_modules(remove_duplicate=False)
    for path, module in every_name:
        own = getattr(module, "nsa", None)
        if isinstance(own, NSAParameters):
            found.add(".".join(part for part in (path, own.site) if part))
    return found


def _gate(config: NSAConfig, width: int, q_heads: int) -> nn.Module:
    if config.gate is not None:
        own: nn.Module = copy.deepcopy(config.gate)
        return own
    gate = nn.Linear(width, 3 * q_heads)
    nn.init.zeros_(gate.weight)
    with torch.no_grad():
        gate.bias.copy_(torch.tensor(_BIAS).repeat(q_heads))
    return gate


def _own(config: NSAConfig) -> NSAConfig:
    return copy.deepcopy(config)


def _memory(config: NSAConfig, heads: int, dim: int) -> nn.Parameter | None:
    if not config.num_mem_kv:
        return None
    return nn.Parameter(torch.randn(heads, config.num_mem_kv, dim) * 0.02)


def _name(module: Any) -> str:
    """A name of the user's module or function that its copies keep, in other processes too."""
    if not hasattr(module, "__dict__"):  # a built-in function
        return str(module.__qualname__)
    if not hasattr(module, "_nsa_name"):
        module._nsa_name = uuid.uuid4().hex
    name: str = module._nsa_name
    return name
