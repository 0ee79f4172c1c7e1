"""prepare and unprepare: give attention modules the parameters of Native Sparse Attention.

Which modules attend is read off the captured graph, never off class names.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import nsa_compile.kernels.library  # noqa: F401
from nsa_compile.backend import constant_inputs
from nsa_compile.capture import Capture, capture
from nsa_compile.dynamo_text import describe, needs_data
from nsa_compile.guards import ConversionWarning
from nsa_compile.hidden_states import Input, hidden_states, watch, watched
from nsa_compile.nn import NSAParameters
from nsa_compile.passes.config import NSAConfig, NSAConfigError
from nsa_compile.passes.pipeline import analyse
from nsa_compile.passes.reasons import Reason
from nsa_compile.passes.site import AttentionSite, Decision
from nsa_compile.targets.skeleton import skeleton_of

_NAME = "nsa"
# Default token ids [2, 48]: sizes that nothing else in a model is likely to have.
_BATCH, _LENGTH = 2, 48
_META = torch.device("meta")


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
            the forward is captured; None is token ids [2, 48]. Nothing is computed but where the
            model reads tensor values: a copy of it runs once then.

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
) -> tuple[list[Decision], dict[str, list[Input]]]:
    """Verdicts on the model's attention with absolute module paths, and what modules are given."""
    twin, captured = _captured(model, example_inputs)
    _check(captured, example_inputs is None)
    paths = {id(module): path for path, module in twin.named_modules()}
    decisions: list[Decision] = []
    inputs: dict[str, list[Input]] = {}
    for graph in captured.graphs:
        inputs |= watched(graph.gm)
        prefix = paths.get(id(graph.root), "")
        everything = replace(config, include=(), exclude=())
        for decision in analyse(graph.gm, everything, values=graph.values).decisions:
            site = decision.site
            site.module = ".".join(part for part in (prefix, site.module) if part)
            decisions.append(decision)
    for path, module in twin.named_modules(remove_duplicate=False):
        inputs[path] = inputs.get(paths[id(module)], [])
    return decisions, inputs


def _captured(model: nn.Module, example_inputs: Any) -> tuple[nn.Module, Capture]:
    """A copy of the model whose calls are marked, and its graphs.

    The copy is on the meta device; of a model that reads tensor values (``item``, ``nonzero``) it
    is a real one, where there are values to read.
    """
    skeleton = skeleton_of(model)
    captured = _run(skeleton.result, example_inputs, "meta", values=skeleton.values)
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if captured.error is None or not needs_data(captured.error) or _META in devices:
        return skeleton.result, captured
    twin, device = copy.deepcopy(model), next(iter(devices), torch.device("cpu"))
    with torch.random.fork_rng():
        return twin, _run(twin, example_inputs, device, known=constant_inputs)


def _run(twin: nn.Module, example_inputs: Any, device: Any, **given: Any) -> Capture:
    watch(twin.eval())
    args, kwargs = _arguments(example_inputs, device)
    with torch.no_grad():
        return capture(twin, args, kwargs, **given)


def _check(captured: Capture, by_default: bool) -> None:
    if captured.error is None:
        return
    given = "token ids [2, 48], the default; pass example_inputs"
    if not by_default:
        given = "example_inputs"
    if needs_data(captured.error):
        given += " without its weights, because it reads tensor values: load them before"
    raise ValueError(
        f"the model does not run on {given}: {describe(captured.error)}"
    ) from captured.error


def _arguments(example_inputs: Any, device: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the forward, tensors on ``device``."""
    if example_inputs is None:
        example_inputs = torch.zeros(_BATCH, _LENGTH, dtype=torch.long)
    given = tree_map_only(Tensor, lambda x: x.detach().to(device), example_inputs)
    if isinstance(given, Mapping):
        return (), dict(given)
    return (tuple(given), {}) if isinstance(given, (tuple, list)) else ((given,), {})


def _added(
    model: nn.Module,
    config: NSAConfig,
    decisions: list[Decision],
    inputs: Mapping[str, list[Input]],
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
        found = hidden_states(site, inputs)
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


def _parameters(
    model: nn.Module, config: NSAConfig, site: AttentionSite, path: str, hidden: Input, first: bool
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
