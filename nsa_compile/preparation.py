"""prepare and unprepare: give attention modules the parameters of Native Sparse Attention.

Which modules attend is read off the captured graph, never off class names.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

import nsa_compile.kernels.library  # noqa: F401
from nsa_compile.capture import Capture, capture
from nsa_compile.dynamo_text import describe
from nsa_compile.guards import ConversionWarning
from nsa_compile.nn import NSAParameters
from nsa_compile.passes import dialect
from nsa_compile.passes.config import NSAConfig, NSAConfigError
from nsa_compile.passes.marks import erase_marks, marks_of
from nsa_compile.passes.pipeline import analyse
from nsa_compile.passes.reasons import Reason
from nsa_compile.passes.site import AttentionSite, Decision
from nsa_compile.targets.skeleton import skeleton_of

_NAME = "nsa"
# Default token ids [2, 48]: sizes that nothing else in a model is likely to have.
_BATCH, _LENGTH = 2, 48
# They run all that they hold, so nothing may be added to them.
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def prepare(
    model: nn.Module,
    config: NSAConfig | Mapping[str, Any] | None = None,
    *,
    example_inputs: Any = None,
) -> nn.Module:
    """Add :class:`NSAParameters` to every attention module of ``model``, in place.

    They stand in ``state_dict`` under ``<attention module>.nsa.*`` and take part in nothing until
    the model is compiled: run eagerly it computes exactly what it did. After
    ``torch.compile(model, backend="nsa")`` a prepared layer computes the three gated branches with
    the sizes given here; of the backend's own options, ``include``, ``exclude``, ``strict`` and
    ``inner`` hold for it.

    Args:
        model: any model; it may be on the meta device. Wrap it for distributed training afterwards.
        config: ``merge="gate"`` and its options; ``include``, ``exclude`` and ``per_layer`` choose
            layers and sizes. None is the paper's sizes.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments, with which
            the forward is captured on the meta device; None is token ids [2, 48].

    Returns:
        ``model``. A layer that cannot be converted gets no parameters, and a
        :class:`ConversionWarning` says why.

    Raises:
        NSAConfigError: ``merge`` is not ``"gate"``.
        ValueError: the model is prepared already, does not run on the inputs, or has no attention
            that could be converted.
    """
    model = getattr(model, "_orig_mod", model)
    config = NSAConfig.from_options({"merge": "gate"} if config is None else config)
    if config.merge != "gate":
        raise NSAConfigError(f"prepare needs merge='gate', got merge={config.merge!r}")
    for path, module in model.named_modules():
        if _mark in module._forward_pre_hooks.values():
            raise ValueError(
                f"{path or 'the model'} is prepared already; call nsa_compile.unprepare(model) "
                "first"
            )
    decisions, inputs = _look(model, config, example_inputs)
    added = _added(model, config, decisions, inputs)
    for path in added:
        if hasattr(model.get_submodule(path), _NAME):
            raise ValueError(f"{path or 'the model'} has something of its own named {_NAME!r}")
    for path, parameters in added.items():
        owner = model.get_submodule(path)
        owner.add_module(_NAME, parameters)
        owner.register_forward_pre_hook(_mark, with_kwargs=True)
    return model


def unprepare(model: nn.Module) -> nn.Module:
    """Take out what :func:`prepare` added, parameters and hooks; returns ``model``."""
    model = getattr(model, "_orig_mod", model)
    for module in list(model.modules()):
        ours = [at for at, hook in module._forward_pre_hooks.items() if hook is _mark]
        for at in ours:
            del module._forward_pre_hooks[at]
            module._forward_pre_hooks_with_kwargs.pop(at, None)
        if ours:
            delattr(module, _NAME)
    return model


def _mark(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook: say in the graph what the attention of ``module`` may use."""
    if not torch.compiler.is_compiling():
        return
    own = module.nsa
    position, keyword = own.source
    if keyword in kwargs:
        hidden = kwargs[keyword]
    elif position is not None and position < len(args):
        hidden = args[position]
    else:
        return
    torch.ops.nsa.site(hidden, own.tensors(), own.template, own.training)


def _look(
    model: nn.Module, config: NSAConfig, example_inputs: Any
) -> tuple[list[Decision], dict[str, list[_Input]]]:
    """Verdicts on the model's attention with absolute module paths, and what modules are given."""
    skeleton = skeleton_of(model)
    twin: nn.Module = skeleton.result.eval()
    paths = {id(module): path for path, module in twin.named_modules()}
    args, kwargs = _arguments(example_inputs)
    _watch(twin)
    with torch.no_grad():
        captured = capture(twin, args, kwargs, values=skeleton.values)
        _check(captured, example_inputs is None)
    decisions: list[Decision] = []
    inputs: dict[str, list[_Input]] = {}
    for graph in captured.graphs:
        inputs |= _watched(graph.gm)
        prefix = paths.get(id(graph.root), "")
        everything = replace(config, include=(), exclude=())
        for decision in analyse(graph.gm, everything, values=graph.values).decisions:
            site = decision.site
            site.module = ".".join(part for part in (prefix, site.module) if part)
            decisions.append(decision)
    for path, module in twin.named_modules(remove_duplicate=False):
        inputs[path] = inputs.get(paths[id(module)], [])
    return decisions, inputs


def _check(captured: Capture, by_default: bool) -> None:
    if captured.error is None:
        return
    given = (
        "token ids [2, 48], the default; pass example_inputs" if by_default else "example_inputs"
    )
    raise ValueError(
        f"the model does not run on {given}: {describe(captured.error)}"
    ) from captured.error


def _arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the forward, tensors on the meta device."""
    if example_inputs is None:
        example_inputs = torch.zeros(_BATCH, _LENGTH, dtype=torch.long, device="meta")
    given = tree_map_only(Tensor, lambda x: x.detach().to("meta"), example_inputs)
    if isinstance(given, Mapping):
        return (), dict(given)
    return (tuple(given), {}) if isinstance(given, (tuple, list)) else ((given,), {})


class _Input:
    """An argument that may be hidden states: its shape, and where it stands in the call."""

    def __init__(self, value: Tensor, position: int | None, keyword: str | None) -> None:
        self.shape, self.where = tuple(value.shape), (position, keyword)

    def layout(self, site: AttentionSite) -> bool | None:
        """Whether the sequence comes first; None: these are no hidden states of ``site``."""
        *rows, _ = self.shape
        batch, length = int(site.batch), int(site.q_len)
        if rows == [length, batch] and batch != length:
            return True
        return False if rows in ([batch, length], [batch * length], [1, batch * length]) else None


def _watch(model: nn.Module) -> None:
    """Let every module of ``model`` that may attend mark its floating-point arguments."""
    for path, module in model.named_modules():
        if isinstance(module, _CONTAINERS):
            continue
        if next(module.children(), None) is not None or not type(module).__module__.startswith(
            "torch.nn."
        ):
            module.register_forward_pre_hook(_watcher(path, _names(module)), with_kwargs=True)


def _watcher(path: str, names: list[str]) -> Any:
    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [(names[i] if i < len(names) else "", x) for i, x in enumerate(args)]
        for name, x in (*given, *kwargs.items()):
            if isinstance(x, Tensor) and x.is_floating_point() and x.ndim in (2, 3):
                position = names.index(name) if name in names else -1
                torch.ops.nsa.site(x, [], f"{path}:{position}:{name}", False)

    return watch


def _watched(gm: fx.GraphModule) -> dict[str, list[_Input]]:
    """What the modules were given whose calls ``gm`` holds, by their paths; takes the marks out."""
    seen: dict[str, list[_Input]] = {}
    for node in marks_of(gm):
        value, _, text, _ = node.args
        path, position, name = str(text).split(":")
        where = (None if position == "-1" else int(position), name or None)
        shown = dialect.value(value)
        seen.setdefault(path, []).append(_Input(shown, *where))
    erase_marks(gm)
    return seen


def _names(module: nn.Module) -> list[str]:
    """Positional parameters of the module's forward."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(module.forward).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind in kinds]


def _added(
    model: nn.Module,
    config: NSAConfig,
    decisions: list[Decision],
    inputs: Mapping[str, list[_Input]],
) -> dict[str, NSAParameters]:
    """The parameters to add, by the path of the module that gets them."""
    added: dict[str, NSAParameters] = {}
    kept: dict[str, str] = {}
    names = {id(module): path for path, module in model.named_modules()}
    for decision in decisions:
        site, refusal = decision.site, decision.refusal
        layer = config.for_layer(site.module)
        if layer.merge != "gate" or not config.selects(site.module):
            continue
        if refusal is not None and refusal.reason is not Reason.NOT_PREPARED:
            kept[site.module] = f"{refusal.code}: {refusal.text}"
            continue
        found = _hidden_states(site, inputs)
        if found is None:
            kept[site.module] = "no module around it is given its hidden states [B, T, C]"
            continue
        owner = names[id(model.get_submodule(found[0]))]
        if owner not in added:
            added[owner] = _parameters(model, layer, site, *found)
        elif added[owner].site != _below(site.module, found[0]):
            kept[site.module] = f"{owner or 'the model'} holds several attentions"
    _tell(model, kept, bool(added))
    return added


def _tell(model: nn.Module, kept: Mapping[str, str], any_added: bool) -> None:
    lines = "".join(f"\n  {path or '(no module path)'}: {why}" for path, why in kept.items())
    if not any_added:
        raise ValueError(
            f"{type(model).__name__} has no attention that could be prepared; expected at least "
            f"one that torch.compile captures and include/exclude let through{lines}"
        )
    if kept:
        text = f"{len(kept)} attention modules got no parameters and stay dense:{lines}"
        warnings.warn(text, ConversionWarning, stacklevel=4)


def _below(path: str, owner: str) -> str:
    return path[len(owner) :].strip(".")


def _hidden_states(
    site: AttentionSite, inputs: Mapping[str, list[_Input]]
) -> tuple[str, _Input, bool] | None:
    """The innermost module around ``site`` that is given its hidden states; sequence first?"""
    path = site.module
    while True:
        for candidate in inputs.get(path, ()):
            layout = candidate.layout(site)
            if layout is not None:
                return path, candidate, layout
        if not path:
            return None
        path = path.rpartition(".")[0]


def _parameters(
    model: nn.Module, config: NSAConfig, site: AttentionSite, path: str, hidden: _Input, first: bool
) -> NSAParameters:
    parameters = NSAParameters(
        replace(config, include=(), exclude=(), per_layer={}),
        width=hidden.shape[-1],
        q_heads=site.q_heads,
        kv_heads=site.kv_heads,
        head_dim=site.head_dim,
        value_dim=site.value_dim,
        sequence_first=first,
        source=hidden.where,
        site=_below(site.module, path),
    )
    owner = model.get_submodule(path)
    for tensor in (*owner.parameters(), *model.parameters()):
        if tensor.is_floating_point():
            parameters.to(tensor.device, tensor.dtype)
            break
    return parameters
