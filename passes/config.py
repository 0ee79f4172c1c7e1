"""NSAConfig: every size and switch of a conversion, checked before anything is compiled."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nsa_compile.passes.config_checks import (
    COMPRESSIONS,
    GATED,
    INNERS,
    MERGES,
    NSAConfigError,
    check,
    check_names,
    one_of,
    plain,
)

__all__ = ["COMPRESSIONS", "NSAConfig", "NSAConfigError", "window_blocks"]

# Fields left as None take the value of their merge. "gate" has the paper's sizes (arXiv 2502.11089,
# section 4.1); "softmax" converts without training and needs a larger budget.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "softmax": {
        "scorer": "channels",
        "query_tile": 64,
        "num_selected": 64,
        "window": 1024,
        "dense_len": 8192,
    },
    "gate": {
        "scorer": "mean",
        "query_tile": 1,
        "num_selected": 16,
        "window": 512,
        "dense_len": 8192,
    },
}
# Channels that scorer "channels" reads by default. What is retrieved may be told by channels of
# little energy: all 128 of a common head are read. On a GPU 64 in 8 bits cost what 32 in 16 do.
DEFAULT_CHANNELS = 128
_NOT_PER_LAYER = ("include", "exclude", "per_layer", "strict", "inner")


@dataclass(frozen=True)
class NSAConfig:
    """Options of ``torch.compile(model, backend="nsa", options={...})``.

    Sizes are in tokens unless said otherwise; ``None`` means the default of ``merge``.

    Args:
        merge: ``"softmax"`` attends once over init, window and selected blocks (no new weights);
            ``"gate"`` is the NSA paper's three gated branches (needs trained weights).
        scorer: who chooses blocks: ``"channels"`` (the strongest channels of full-resolution keys)
            or ``"mean"`` (mean-pooled keys, the paper).
        selector: ``"nsa"`` leaves the choice to ``scorer``; ``"local"``, ``"strided"`` and
            ``"block_diagonal"`` choose by position alone, ``"topk"`` by exact attention (as much
            work as dense attention); or a function ``(q, k, *, config, offset, valid)`` that
            returns block indices [B, Hkv, ceil(Tq / query_tile), n]. All but ``"nsa"`` force no
            block: ``init_blocks``, ``scorer`` and, without gates, ``window`` have no part in it.
        score_channels: channels that ``"channels"`` keeps; None is all of them, at most 128.
        query_tile: queries that share one selection; 1 is the paper's token-granular form.
        compress_block: l, tokens in a compressed block (scorer ``"mean"``, merge ``"gate"``).
        compress_stride: d, tokens between the starts of compressed blocks.
        select_block: l', tokens in a selected block.
        num_selected: n, blocks a query tile reads, forced ones included.
        candidates: blocks that scorer ``"channels"`` proposes; the exact logits choose
            ``num_selected`` of them. None is half as many again, up to 32 (a larger budget needs no
            second look, nor does a scorer that has read all channels); ``num_selected`` itself
            switches the second look off.
        init_blocks: blocks at the start of the sequence that are always read.
        window: w, most recent tokens that are always read, the query's own included.
        dense_len: up to this many keys the operator computes dense attention, decided at run time.
        compression: how merge ``"gate"`` compresses the keys and values of a block:
            ``nsa_compile.NSAParameters`` says what each name is; or a module that maps
            [B, Hkv, Nc, l, D] to [B, Hkv, Nc, D], of which keys and values get a copy each.
        compress_expand: width of the hidden layer of compression ``"mlp"``, in block lengths times
            head width.
        num_mem_kv: learned keys and values that every query of the compressed branch sees.
        gate: module that maps hidden states [B, Tq, C] to [B, Tq, 3 * Hq] logits of the gates, of
            which each layer gets a copy; None is a linear layer.
        share_selection: whether the query heads of a group share one choice of blocks (merge
            ``"gate"``); False lets each query head choose its own.
        importance: how scorer ``"mean"`` carries the probabilities of compressed blocks over to
            selection blocks (merge ``"gate"``): ``"overlap"`` by the tokens they share;
            ``"interpolate"`` linearly between their centres, which tells selection blocks apart
            that are smaller than compressed ones.
        sel_scale: differentiable selection (merge ``"gate"``): the logits of a chosen block are
            scaled by 1 in the forward pass, and its importance receives that factor's gradient.
        include, exclude: globs over module paths; a layer is converted when it matches an include
            glob (or there is none) and no exclude glob.
        per_layer: ``{glob: {field: value}}``; later globs win over earlier ones.
        strict: raise, listing every site that was kept dense and why.
        inner: compiler of the rewritten graph: ``"inductor"``, ``"aot_eager"`` or ``"eager"``.

    Raises:
        NSAConfigError: an unknown name, a wrong type, or sizes that cannot work together.
    """

    merge: str = "softmax"
    scorer: str | None = None
    selector: Any = "nsa"
    score_channels: int | None = None
    query_tile: int | None = None
    compress_block: int = 32
    compress_stride: int = 16
    select_block: int = 64
    num_selected: int | None = None
    candidates: int | None = None
    init_blocks: int = 1
    window: int | None = None
    dense_len: int | None = None
    compression: Any = "mean"
    compress_expand: float = 1.0
    num_mem_kv: int = 0
    gate: Any = None
    share_selection: bool = True
    importance: str = "overlap"
    sel_scale: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    per_layer: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    strict: bool = False
    inner: str = "inductor"

    def __post_init__(self) -> None:
        one_of("merge", self.merge, MERGES)
        one_of("inner", self.inner, INNERS)
        for name in ("include", "exclude"):
            object.__setattr__(self, name, _globs(name, getattr(self, name)))
        for name, value in _DEFAULTS[self.merge].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        check(self)
        self._check_per_layer()

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | NSAConfig | None) -> NSAConfig:
        """The config that ``options`` describes; an unknown name is refused, naming the nearest."""
        if isinstance(options, NSAConfig):
            return options
        options = dict(options or {})
        check_names(options, [f.name for f in dataclasses.fields(cls)], "option")
        return cls(**options)

    def for_layer(self, module: str) -> NSAConfig:
        """This config with the ``per_layer`` fields whose glob matches the path ``module``."""
        changes: dict[str, Any] = {}
        for glob, fields in self.per_layer.items():
            if fnmatch.fnmatchcase(module, glob):
                changes.update(fields)
        return self._override(changes) if changes else self

    def selects(self, module: str) -> bool:
        """Whether ``include`` and ``exclude`` let the layer at path ``module`` be converted."""
        included = not self.include or any(fnmatch.fnmatchcase(module, g) for g in self.include)
        return included and not any(fnmatch.fnmatchcase(module, g) for g in self.exclude)

    def channels(self, head_dim: int) -> int:
        """r, the channels that scorer ``"channels"`` reads of ``head_dim``."""
        if self.score_channels is not None:
            return min(self.score_channels, head_dim)
        return min(head_dim, DEFAULT_CHANNELS)

    def proposed_blocks(self, head_dim: int) -> int:
        """Blocks that the scorer proposes to a tile; ``num_selected`` when nobody looks again."""
        budget = self.num_selected or 0
        if self.scorer != "channels" or self.selector != "nsa":
            return budget
        if self.candidates is not None:
            return self.candidates
        if self.channels(head_dim) == head_dim:
            return budget
        return max(budget, min(budget + budget // 2, 32))

    def local_window(self) -> int:
        """Most recent keys that a choice of blocks always holds: ``window``.

        With gates the window is a branch of its own. The selection holds the query's own block and
        the one before (arXiv 2502.11089, section 4.1), or the own alone where ``num_selected``
        would leave nothing to choose.
        """
        if self.merge != "gate":
            return self.window or 0
        both = self.select_block + 1
        return both if self._forced(both, None) < (self.num_selected or 0) else 1

    def forced_blocks(self, offset: int | None = 0, causal: bool = True) -> int:
        """Most blocks that are forced on one tile: the first ones and those of local_window."""
        return self._forced(self.local_window(), offset, causal)

    def _forced(self, window: int, offset: int | None, causal: bool = True) -> int:
        tile = self.query_tile or 1
        return self.init_blocks + window_blocks(window, tile, self.select_block, offset, causal)

    def sizes(self) -> dict[str, Any]:
        """The fields that shape one layer's conversion, for reports."""
        skip = {"selector"} if self.selector == "nsa" else set()
        skip |= {*_NOT_PER_LAYER, *(() if self.merge == "gate" else GATED)}
        return {
            f.name: plain(getattr(self, f.name))
            for f in dataclasses.fields(self)
            if f.name not in skip
        }

    def _override(self, changes: Mapping[str, Any]) -> NSAConfig:
        """Replace fields; a changed ``merge`` brings its defaults for fields still at theirs."""
        current = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if "merge" in changes:
            for name, value in _DEFAULTS[self.merge].items():
                if current[name] == value:
                    current[name] = None
            if changes["merge"] != "gate":
                current.update(GATED)
        return NSAConfig(**{**current, "per_layer": {}, **changes})

    def _check_per_layer(self) -> None:
        if not isinstance(self.per_layer, Mapping):
            raise NSAConfigError(f"per_layer must map globs to options, got {self.per_layer!r}")
        known = [f.name for f in dataclasses.fields(self) if f.name not in _NOT_PER_LAYER]
        for glob, fields in self.per_layer.items():
            if not isinstance(glob, str) or not isinstance(fields, Mapping):
                raise NSAConfigError(
                    f"per_layer must map a glob to a dict of options, got {glob!r}: {fields!r}"
                )
            check_names(fields, known, f"option in per_layer[{glob!r}]")
            try:
                self._override(fields)
            except NSAConfigError as error:
                raise NSAConfigError(f"per_layer[{glob!r}]: {error}") from None


def window_blocks(
    window: int, query_tile: int, block: int, offset: int | None = 0, causal: bool = True
) -> int:
    """Most blocks of ``block`` keys that the local window touches for one tile of queries.

    Tile t holds positions ``[t * query_tile + offset, (t + 1) * query_tile + offset)``. A causal
    window reaches ``window - 1`` keys back; a bidirectional one is centred (docs/semantics.md).
    ``offset`` None means unknown: the worst alignment counts.
    """
    back, ahead = (window - 1, 0) if causal else ((window - 1) // 2, window // 2)
    step = 1 if offset is None else math.gcd(query_tile, block)
    starts = range((offset or 0) % step, block, step)
    return max((p + query_tile - 1 + ahead) // block - (p - back) // block + 1 for p in starts)


def _globs(name: str, value: object) -> tuple[str, ...]:
    globs = (value,) if isinstance(value, str) else value
    if not isinstance(globs, Iterable) or not all(isinstance(g, str) for g in globs):
        raise NSAConfigError(f"{name} must be a glob or a list of globs, got {value!r}")
    return tuple(globs)
