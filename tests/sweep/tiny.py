"""Build any architecture of transformers tiny: configuration fields shrunk by what they mean."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

VOCABULARY = 151
FIRST_PLAIN_TOKEN = 40  # smaller ids are the special tokens of some configuration
_WIDTH, _HEADS = 64, 4

# (field, value), first match wins. A callable is given the default value.
_RULES: tuple[tuple[str, Any], ...] = (
    (r"pad_token_id$", 0),
    (r"bos_token_id$", 1),
    (r"eos_token_id$", 2),
    (r"(_token_id|_token_index|_index)$", lambda n: 3 + n % 30),
    (r"pronunciation_vocab_size|shape_vocab_size|n_langs", lambda n: min(n, 32)),
    (r"(vocab_size|byte_group_vocab)$", VOCABULARY),
    (r"vocab_size_per_layer_input", VOCABULARY),
    (r"(max_position_embeddings|n_positions|max_seq_len|context_length|n_ctx)$", 256),
    (r"(max_target_positions|max_source_positions|max_2d_position_embeddings)$", 256),
    (r"^(local_attention|attention_window_size|window_size|.*sliding_window.*|swa_window)$", 24),
    (r"attention_chunk_size$", 32),
    (r"(num_key_value_heads|num_kv_heads|n_kv_heads?|num_query_groups|kv_heads|kv_n_heads)", "kv"),
    (r"(index_n_heads|index_num_heads)$", 4),
    (r"(index_head_dim)$", 16),
    (r"(index_topk|index_topk_tokens)$", 16),
    (r"index_topk_blocks$", 2),
    (r"index_block_size$", 16),
    (r"linear_num_key_heads|linear_num_value_heads", 2),
    (r"(mamba_n_heads|mamba_num_heads|n_mamba_heads|mamba_expand_heads)$", 4),
    (r"(mamba_d_head|mamba_head_dim|mamba_headdim)$", 32),
    (r"(mamba_d_ssm)$", 128),
    (r"(n_groups|num_expert_group|mamba_n_groups|mamba_ngroups|n_group|topk_group)$", 1),
    (r"(state_size|d_state|mamba_d_state|ssm_state_size)$", 8),
    (r"(num_experts_per_tok|moe_topk|moe_k|top_k_experts|experts_per_token|moe_top_k)", 2),
    (r"(num_shared_experts|n_shared_experts|moe_num_shared_experts)$", 1),
    (r"zero_expert_num$", 2),
    (r"(experts|num_local_experts|n_routed_experts|moe_num_experts)$", 4),
    (r"(first_k_dense_replace|num_dense_layers|moe_layer_start_index)$", 1),
    (
        r"(period|interval|_step|_pattern|_every_n_layers|layer_group_size)$",
        lambda n: 2 if n > 1 else n,
    ),
    (r"_offset$", lambda n: min(n, 1)),
    (r"(num_kv_shared_layers|num_nextn_predict_layers|num_global_layers)$", 0),
    (r"^(num_hidden_layers|n_layers?|num_layers|num_blocks|num_hidden_blocks)$", "layers"),
    (r"^(encoder_layers|decoder_layers|num_decoder_layers|num_encoder_layers)$", "layers"),
    (r"(attention_heads|n_heads?|num_heads|num_global_heads|attention_head_num)$", _HEADS),
    (r"lora_rank$", 16),
    (r"(qk_nope_head_dim|v_head_dim)$", 16),
    (r"qk_head_dim$", 24),
    (r"(qk_rope_head_dim|rotary_dim|rope_head_dim)$", 8),
    (r"(head_dim|kv_channels|attention_head_size|d_kv|head_size|d_head)$", 16),
    (r"(intermediate|ffn|feed_forward|inner|d_ff|hidden_dim|moe_dim|n_inner)", 64),
    (r"(hidden_size_per_layer_input|laurel_rank|router_hidden_size|prompt_mid_dim)$", 16),
    (r"(hidden_size|d_model|n_embd|emb_dim|embed_dim|embedding_dim|width|embedding_size)$", _WIDTH),
    (r"^dim$|dim_model_base|_proj_size$|_proj_dim$|_hidden_dimension$", _WIDTH),
)
# Fields whose default is None though the model does not run without them.
_WANTED = {
    "head_dim": 16,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_attention_heads": _HEADS,
    "num_key_value_heads": 2,
    "attn_layer_indices": [1],
    "axial_pos_embds_dim": [16, 48],
    "axial_pos_shape": [8, 32],
    "default_language": "en_XX",
}
_LAYER_LISTS = re.compile(
    r"layer_types|_types$|_layers$|_pattern$|per_layer|layer_rope_theta|size$"
)


class CannotBuild(Exception):
    """No shrunk configuration gives a model; the message is the first attempt's error."""


def model(model_type: str, implementation: str, task: str = "causal") -> nn.Module:
    """An eval model with seeded weights, large enough that attention is far from uniform.

    Raises:
        CannotBuild: with the error of the first configuration that was tried.
    """
    import transformers

    auto = {
        "causal": transformers.AutoModelForCausalLM,
        "masked": transformers.AutoModelForMaskedLM,
    }[task]
    first: Exception | None = None
    for config in _configs(model_type):
        if task == "causal" and getattr(config, "is_decoder", None) is False:
            config.is_decoder = True
        torch.manual_seed(0)
        try:
            built = auto.from_config(config, attn_implementation=implementation).eval()
            _check(built)
        except Exception as failure:
            first = first or failure
        else:
            return _spread(built)
    text = f"{type(first).__name__}: {first}" if first else "no shrunk configuration is accepted"
    raise CannotBuild(" ".join(text.split())[:300])


def _configs(model_type: str) -> Iterator[Any]:
    """Shrunk configurations, the most thorough first."""
    from transformers import CONFIG_MAPPING

    cls = CONFIG_MAPPING[model_type]
    plans = itertools.product((2, 4, 7), (True, False), (False, True), ((), ("head_dim",)))
    for layers, keep_lists, fill, skipped in plans:
        try:
            values = shrunk(cls(), layers, keep_lists=keep_lists, fill=fill, skipped=skipped)
            yield cls(**values)
        except Exception:
            continue


def shrunk(
    config: Any, layers: int, *, keep_lists: bool, fill: bool, skipped: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Constructor arguments that make ``config`` tiny; nested configurations are shrunk as well.

    Lists with one entry a layer keep one layer of each kind (``keep_lists``), or are left to the
    constructor to derive. ``fill`` gives values to fields that are None.
    """
    chosen = _one_layer_of_each_kind(config, layers) if keep_lists else list(range(layers))
    values: dict[str, Any] = {}
    for name, value in vars(config).items():
        if name.startswith("_") or name in skipped:
            continue
        if hasattr(value, "to_dict"):
            inner = shrunk(value, layers, keep_lists=keep_lists, fill=fill, skipped=skipped)
            values[name] = {**inner, "model_type": value.model_type}
        elif _is_layer_list(name, value, config):
            if keep_lists:
                values[name] = type(value)(value[i] for i in chosen)
                values[name] = [_number(name, v, config, chosen) for v in values[name]]
        elif isinstance(value, int) and not isinstance(value, bool):
            small = _number(name, value, config, chosen)
            if small != value:
                values[name] = small
        elif name == "eos_token_id" and isinstance(value, list):
            values[name] = 2
    return {**values, **_filled(config, values, chosen)} if fill else values


def _filled(config: Any, values: dict[str, Any], chosen: list[int]) -> dict[str, Any]:
    """Values for fields that are None, and one layer of full attention in a hybrid."""
    names = [name for name in _WANTED if getattr(config, name, 0) is None]
    filled = {name: _WANTED[name] for name in names}
    if hasattr(config, "axial_pos_embds_dim"):
        filled |= {name: _WANTED[name] for name in ("axial_pos_embds_dim", "axial_pos_shape")}
    if hasattr(config, "layer_types"):
        kinds = values.get("layer_types") or ["full_attention"] * len(chosen)
        filled["layer_types"] = [*kinds[:-1], "full_attention"]
    return filled


def _number(name: str, value: Any, config: Any, chosen: list[int]) -> Any:
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    for pattern, small in _RULES:
        if re.search(pattern, name):
            if small == "layers":
                return len(chosen)
            if small == "kv":
                return _kv_heads(value, config)
            return small(value) if callable(small) else min(small, value) if value > 0 else value
    return value


def _kv_heads(value: int, config: Any) -> int:
    heads = getattr(config, "num_attention_heads", value)
    return _HEADS if value == heads else min(value, 2)


def _is_layer_list(name: str, value: Any, config: Any) -> bool:
    layers = getattr(config, "num_hidden_layers", None)
    return (
        isinstance(value, (list, tuple))
        and isinstance(layers, int)
        and len(value) == layers
        and bool(_LAYER_LISTS.search(name))
    )


def _one_layer_of_each_kind(config: Any, layers: int) -> list[int]:
    """Indices of layers that between them show every entry of every list with one a layer."""
    lists = [v for n, v in vars(config).items() if _is_layer_list(n, v, config)]
    kinds = list(zip(*lists, strict=True))
    chosen = sorted({kinds.index(kind) for kind in kinds}, key=int)[:6]
    rest = [i for i in range(getattr(config, "num_hidden_layers", layers)) if i not in chosen]
    return sorted(chosen + rest[: max(0, layers - len(chosen))])


def _check(built: nn.Module) -> None:
    """One forward: a configuration may build and still not run."""
    size = sum(p.numel() for p in built.parameters())
    if size > 40_000_000:
        raise CannotBuild(f"{size} parameters: a size was not shrunk")
    with torch.no_grad():
        built(torch.randint(FIRST_PLAIN_TOKEN, VOCABULARY, (2, 70)))


def _spread(built: nn.Module) -> nn.Module:
    """Weights five times as wide as usual, so that attention prefers some keys."""
    with torch.no_grad():
        for weight in built.parameters():
            if weight.dim() > 1 and weight.is_floating_point():
                weight.normal_(std=0.1)
    return built
