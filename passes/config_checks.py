"""What the options of NSAConfig must be, each alone and with one another."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nsa_compile.passes.config import NSAConfig

MERGES = ("softmax", "gate")
SCORERS = ("channels", "mean")
INNERS = ("inductor", "aot_eager", "eager")
SELECTORS = ("nsa", "local", "strided", "block_diagonal", "topk")
COMPRESSIONS = ("mean", "weighted", "linear", "mlp", "conv", "attention")
IMPORTANCES = ("overlap", "interpolate")
# Fields of merge "gate" alone: what is learned, and the switches of its selection.
GATED: dict[str, Any] = {
    "compression": "mean", "compress_expand": 1.0, "num_mem_kv": 0, "gate": None,
    "share_selection": True, "importance": "overlap", "sel_scale": False,
}  # fmt: skip


class NSAConfigError(ValueError):
    """An option that does not exist, has a wrong type, or cannot work with another one."""


def check(config: NSAConfig) -> None:
    """Refuse what cannot be computed.

    Raises:
        NSAConfigError: naming the option, or the two options that do not go together.
    """
    for each in _CHECKS:
        each(config)


def plain(value: Any) -> Any:
    """A field's value as JSON has it: a module or function by its name."""
    return type(value).__name__ if callable(value) else value


def one_of(name: str, value: object, allowed: Iterable[str]) -> None:
    if value not in tuple(allowed):
        raise NSAConfigError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def check_names(given: Iterable[str], known: list[str], what: str) -> None:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)
            raise NSAConfigError(
                f"unknown {what} {name!r}; did you mean {near[0]!r}? Valid: {', '.join(known)}"
            )


def _booleans(config: NSAConfig) -> None:
    for name in ("strict", "share_selection", "sel_scale"):
        value = getattr(config, name)
        if not isinstance(value, bool):
            raise NSAConfigError(f"{name} must be True or False, got {value!r}")


def _choices(config: NSAConfig) -> None:
    one_of("scorer", config.scorer, SCORERS)
    if isinstance(config.selector, str) or not callable(config.selector):
        one_of("selector", config.selector, (*SELECTORS, "a function"))
    if isinstance(config.compression, str) or not callable(config.compression):
        one_of("compression", config.compression, (*COMPRESSIONS, "a module"))
    if config.gate is not None and not callable(config.gate):
        raise NSAConfigError(f"gate must be a module or None, got {config.gate!r}")
    one_of("importance", config.importance, IMPORTANCES)


def _integers(config: NSAConfig) -> None:
    least = {
        "query_tile": 1, "compress_block": 1, "compress_stride": 1, "select_block": 1,
        "num_selected": 1, "init_blocks": 0, "window": 1, "dense_len": 0, "score_channels": 1,
        "candidates": 1, "num_mem_kv": 0,
    }  # fmt: skip
    for name, minimum in least.items():
        value = getattr(config, name)
        if value is None and name in ("score_channels", "candidates"):
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise NSAConfigError(f"{name} must be an integer, got {value!r}")
        if name == "num_selected" and config.merge == "gate":
            minimum = 0  # without the selected branch
        if value < minimum:
            raise NSAConfigError(f"{name} must be at least {minimum}, got {value}")


def _sizes(config: NSAConfig) -> None:
    for name, least in (("select_block", 2), ("query_tile", 1)):
        value = getattr(config, name)
        if value & (value - 1) or not least <= value <= 256:
            raise NSAConfigError(
                f"{name} must be a power of two between {least} and 256, got {value}"
            )
    if config.compress_block < config.compress_stride:
        raise NSAConfigError(
            f"compress_block must be at least compress_stride, or tokens lie in no block, got "
            f"compress_block={config.compress_block} and compress_stride={config.compress_stride}"
        )
    if config.candidates is not None and config.candidates < (config.num_selected or 0):
        raise NSAConfigError(
            f"candidates must be at least num_selected, got candidates={config.candidates} and "
            f"num_selected={config.num_selected}"
        )


def _budget(config: NSAConfig) -> None:
    """The forced blocks must fit: with gates at every alignment, else decided by each mask."""
    if config.selector != "nsa" or (config.merge == "gate" and not config.num_selected):
        return
    gated = config.merge == "gate"
    forced = config.forced_blocks(None if gated else 0)
    if forced <= (config.num_selected or 0):
        return
    why = f"window={config.window} touches for a tile of {config.query_tile} queries make {forced}"
    if gated:
        why = f"a tile of query_tile={config.query_tile} queries lies in make {forced}"
    raise NSAConfigError(
        f"num_selected={config.num_selected} cannot hold the forced blocks: init_blocks="
        f"{config.init_blocks} and the {forced - config.init_blocks} blocks of "
        f"{config.select_block} that {why}; raise num_selected to at least {forced} or lower "
        + ("init_blocks or query_tile" if gated else "window")
    )


def _gated(config: NSAConfig) -> None:
    for name, default in GATED.items():
        value = getattr(config, name)
        if config.merge != "gate" and value != default:
            raise NSAConfigError(f"{name}={value!r} needs merge='gate', got merge={config.merge!r}")
    expand = config.compress_expand
    if isinstance(expand, bool) or not isinstance(expand, (int, float)) or not expand > 0:
        raise NSAConfigError(f"compress_expand must be a positive number, got {expand!r}")
    if expand != 1.0 and config.compression != "mlp":
        raise NSAConfigError(
            f"compress_expand={expand!r} is the hidden layer of compression='mlp', got "
            f"compression={config.compression!r}"
        )


def _scored(config: NSAConfig) -> None:
    """Switches that look at the probabilities of compressed keys."""
    for name in ("importance", "sel_scale"):
        value = getattr(config, name)
        if value == GATED[name]:
            continue
        if config.selector != "nsa":
            raise NSAConfigError(
                f"{name}={value!r} is about scores, which selector='nsa' computes, got selector="
                f"{plain(config.selector)!r}"
            )
        if config.scorer != "mean":
            raise NSAConfigError(
                f"{name}={value!r} is about compressed keys and needs scorer='mean', got scorer="
                f"{config.scorer!r}"
            )


_CHECKS: tuple[Callable[[NSAConfig], None], ...] = (
    _booleans, _choices, _integers, _sizes, _budget, _gated, _scored,
)  # fmt: skip
