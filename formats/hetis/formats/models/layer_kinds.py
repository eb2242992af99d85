"""Which layers of a ``config.json`` are of which kind, by any of the fields with which families state it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hetis.formats.errors import shown
from hetis.formats.models.config_json import NUM_EXPERTS, Config

# Names of one thing in different families, the usual one first.
NAMES = {
    "num_hidden_layers": ("num_hidden_layers", "num_layers", "n_layer", "n_layers"),
    "hidden_size": ("hidden_size", "n_embd", "n_embed", "d_model"),
    "num_attention_heads": ("num_attention_heads", "n_head", "n_heads", "attention_heads"),
    "vocab_size": ("padded_vocab_size", "vocab_size"),
    "intermediate_size": (
        *("dense_intermediate_size", "block_ff_dim", "intermediate_size", "ffn_hidden_size"),
        *("n_inner", "ffn_dim", "dff"),
    ),
    "head_dim": ("head_dim", "attention_head_dim", "kv_channels", "hidden_size_per_head"),
    "max_position_embeddings": (
        *("max_position_embeddings", "model_max_length", "max_sequence_length", "max_seq_len", "seq_length"),
        *("n_positions", "max_position_embedding"),
    ),
    "num_experts": NUM_EXPERTS,
    "num_experts_per_tok": (
        *("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k", "moe_k"),
    ),
    "moe_intermediate_size": (
        *("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size", "ffn_hidden_size"),
    ),
    "n_shared_experts": ("n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts"),
    "shared_width": (
        *("moe_shared_expert_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"),
        *("share_expert_dim", "share_expert_dims", "moe_shared_intermediate_size"),
    ),
    "moe_latent_size": ("moe_latent_size", "routed_expert_hidden_size", "moe_hidden_size"),
    "num_key_value_heads": (
        *("num_key_value_heads", "num_attention_groups", "multi_query_group_num", "num_kv_heads", "kv_n_heads"),
    ),
    "mamba_heads": ("mamba_num_heads", "mamba_n_heads"),
    "mamba_head_dim": ("mamba_head_dim", "mamba_d_head"),
    "mamba_groups": ("n_groups", "mamba_n_groups"),
    "mamba_state": ("ssm_state_size", "mamba_d_state"),
    "mamba_kernel": ("conv_kernel", "mamba_d_conv"),
    "mamba_expand": ("expand", "mamba_expand"),
    "first_dense": ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "dense_mlp_idx"),
    "kda_heads": ("linear_num_heads", "num_attention_heads"),
    "kda_head_dim": ("linear_head_dim", "head_dim"),
    "short_conv_kernel": ("short_conv_kernel_size", "conv_kernel_size", "sconv_kernel_size"),
    "window": ("sliding_window", "sliding_window_size", "window_size"),
    "kv_lora_rank": ("kv_lora_rank", "attention_kv_lora_dim"),
    "q_lora_rank": ("q_lora_rank", "attention_q_lora_dim"),
    "qk_nope_head_dim": ("qk_nope_head_dim", "attention_qk_dim"),
    "qk_rope_head_dim": ("qk_rope_head_dim", "attention_qk_rope_dim"),
    "v_head_dim": ("v_head_dim", "attention_v_dim"),
}
# Things of every layer, which readers look up by their usual name.
_LATENT = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_BASIC = (
    *("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size", "head_dim"),
    *_LATENT,
)


def basic_names(data: Mapping[str, Any]) -> dict[str, str]:
    """Return the names under which fields have the basic things, by the usual ones."""
    stated = {thing: next((name for name in NAMES[thing] if data.get(name) is not None), "") for thing in _BASIC}
    return {thing: name for thing, name in stated.items() if name}


def in_usual_names(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields with the basic ones by their usual names, too, whatever name they have."""
    found = {thing: data[name] for thing, name in basic_names(data).items()}
    if data.get("multi_query") is True and not data.get("new_decoder_architecture"):  # Falcon, StarCoder
        found["num_key_value_heads"] = 1
    elif data.get("multi_query_attention") is False:  # ChatGLM
        found["num_key_value_heads"] = found.get("num_attention_heads")
    if data.get("use_mla") is False:  # DeepSeek-OCR
        data = {name: value for name, value in data.items() if name not in _LATENT}
        found = {thing: value for thing, value in found.items() if thing not in _LATENT}
    return {**data, **{thing: value for thing, value in found.items() if value is not None}}


# What families call the kinds of attention of a layer, and the letters of Nemotron's pattern.
ATTENTION, WINDOWED, STATE, CONVOLUTION, BOTH, NONE = "full", "windowed", "state", "convolution", "both", "none"
CONVOLVED, CONVOLVED_WINDOW = "convolved", "convolved window"  # attention beside short convolutions (Inkling)
_KINDS = {
    **dict.fromkeys(("full_attention", "attention", "global_attention", "global", "*"), ATTENTION),
    **dict.fromkeys(("indexed_attention", "deepseek_sparse_attention"), ATTENTION),  # transformers 5 has renamed it
    **dict.fromkeys(("sliding_attention", "sliding", "local_attention", "local", "sliding_window"), WINDOWED),
    **dict.fromkeys(("linear_attention", "mamba", "mamba2", "M"), STATE),
    **dict.fromkeys(("conv", "short_conv"), CONVOLUTION),
    "hybrid": BOTH,
    **dict.fromkeys(("mlp", "moe", "-", "E"), NONE),
    **dict.fromkeys(("minimax_m3_sparse", "sparse_attention"), "sparse"),
}
_MLP_ALONE = {"-": "dense", "mlp": "dense", "E": "experts", "moe": "experts"}  # layers that have nothing else


def named(config: Config, thing: str) -> str:
    """Return the name under which a config has a thing; its usual one if it has none."""
    names = NAMES.get(thing, (thing,))
    usual = thing if thing in names else names[0]
    return next((name for name in names if config.data.get(name) is not None), usual)


def number(config: Config, thing: str, default: int | None = None, *, least: int = 1) -> int:
    """Return a whole number by any of its names; some families write it for every layer."""
    name = named(config, thing)
    stated = config.data.get(name)
    if isinstance(stated, list) and stated and all(one == stated[0] for one in stated):
        return Config({name: stated[0]}, config.source, config.problems, config.at).whole(name, default, least=least)
    return config.whole(name, default, least=least)


def stated_layers(config: Config) -> int | None:
    """Return the number of layers whose kinds are stated, or None if they are not."""
    for name in ("hybrid_override_pattern", "layers_block_type", "layer_types"):
        if isinstance(stated := config.data.get(name), str | list) and stated:
            return len(stated)
    return None


def kinds_of_attention(config: Config, num_layers: int) -> list[str]:
    if config.data.get("d_rel") is not None:
        return _convolved_kinds(config, num_layers)
    for name in ("layer_types", "layers_block_type", "hybrid_override_pattern"):
        if (stated := config.data.get(name)) is not None:
            return _named_kinds(config, name, stated, num_layers)
    if (every := config.whole("layer_group_size", 0, least=0)) > 1:  # Ling and Ring: the last of each group is full
        rest = num_layers // every * every if config.data.get("no_kda_lora") else num_layers  # in Ling 3 full, too
        return [ATTENTION if (layer + 1) % every == 0 or layer >= rest else STATE for layer in range(num_layers)]
    if (flags := config.data.get("hybrid_layer_pattern")) is not None:  # MiMo: 1 slides
        slides = _for_layers(config, "hybrid_layer_pattern", flags, num_layers)
        return [WINDOWED if flag else ATTENTION for flag in slides]
    own = config.inner("linear_attn_config")
    if own is not None and isinstance(own.data.get("full_attn_layers"), list):  # Kimi: from 1
        full = set(own.data["full_attn_layers"])
        return [ATTENTION if layer + 1 in full else STATE for layer in range(num_layers)]
    sparse = config.inner("sparse_attention_config")
    if sparse is not None and isinstance(flags := sparse.data.get("sparse_attention_freq"), list):
        chooses = _for_layers(sparse, "sparse_attention_freq", flags, num_layers)
        return ["sparse" if flag else ATTENTION for flag in chooses]
    for name in ("attn_layer_indices", "full_attn_idxs"):
        if name in config.data and isinstance(indices := config.data[name] or [], list):
            other = CONVOLUTION if name == "full_attn_idxs" else STATE
            return [ATTENTION if layer in indices else other for layer in range(num_layers)]
    if config.data.get("attn_layer_period") is not None:
        period, offset = config.whole("attn_layer_period"), config.whole("attn_layer_offset", 0, least=0)
        return [ATTENTION if layer % period == offset else STATE for layer in range(num_layers)]
    if _has_states(config):
        return [BOTH] * num_layers
    window, pattern = config.data.get(named(config, "window")), config.data.get("sliding_window_pattern")
    if window in (None, -1) or config.data.get("use_sliding_window") is False:
        return [ATTENTION] * num_layers
    if isinstance(pattern, str) and pattern:  # EXAONE: L slides, G does not
        return [WINDOWED if pattern[layer % len(pattern)] == "L" else ATTENTION for layer in range(num_layers)]
    if config.data.get("max_window_layers") is not None:  # Qwen, as transformers reads it
        first = config.whole("max_window_layers", least=0)
        return [WINDOWED if layer >= first else ATTENTION for layer in range(num_layers)]
    every = config.whole("sliding_window_pattern", 0, least=0)
    return [ATTENTION if every and layer % every == every - 1 else WINDOWED for layer in range(num_layers)]


def _convolved_kinds(config: Config, num_layers: int) -> list[str]:
    """Return the kinds of Inkling's layers, of which the publisher numbers those that slide."""
    if isinstance(local := config.data.get("local_layer_ids"), list):
        return [CONVOLVED_WINDOW if layer in local else CONVOLVED for layer in range(num_layers)]
    kinds = config.kinds_of_layers(num_layers, ("hybrid", "hybrid_sliding")) or ["hybrid"] * num_layers
    return [CONVOLVED_WINDOW if kind == "hybrid_sliding" else CONVOLVED for kind in kinds]


def _has_states(config: Config) -> bool:
    return config.data.get(named(config, "mamba_state")) is not None


def _named_kinds(config: Config, name: str, stated: Any, num_layers: int) -> list[str]:
    before = len(config.problems)
    entries = list(stated) if isinstance(stated, str) else _for_layers(config, name, stated, num_layers)
    if len(config.problems) > before:
        return [ATTENTION] * num_layers
    if isinstance(stated, str) and len(entries) != num_layers:
        config.refuse(name, f"has {len(entries)} letters, must have {num_layers}, one for each layer")
        return [ATTENTION] * num_layers
    for kind in dict.fromkeys(map(str, entries)):
        if kind not in _KINDS:
            config.refuse(name, f"has {shown(kind)}, only {', '.join(_KINDS)} are modelled")
            return [ATTENTION] * num_layers
    return [_KINDS[str(kind)] for kind in entries]


def _for_layers(config: Config, name: str, value: Any, num_layers: int) -> list[Any]:
    """Return a list with an item for each layer; drafting layers may follow."""
    drafting = max(config.whole(each, 0, least=0) for each in ("num_nextn_predict_layers", "num_mtp_layers"))
    if not isinstance(value, list) or len(value) not in (num_layers, num_layers + drafting):
        found = f"has {len(value)} items" if isinstance(value, list) else f"is {shown(value)}"
        config.refuse(name, f"{found}, must be a list of {num_layers} items, one for each layer")
        return [0] * num_layers
    return value[:num_layers]


def mlps_alone(config: Config, num_layers: int) -> list[str] | None:
    """Return the MLP of layers that have nothing else, by the letters or words for it; None: layers have both."""
    for name in ("hybrid_override_pattern", "layers_block_type", "layer_types"):
        stated = config.data.get(name)
        if isinstance(stated, str | list) and any(str(one) in _MLP_ALONE for one in stated):
            return [_MLP_ALONE.get(str(one), "") for one in list(stated)[:num_layers]]
    return None


def layers_with_experts(config: Config, num_layers: int) -> list[bool]:
    """Return which layers have experts."""
    if (alone := mlps_alone(config, num_layers)) is not None:
        return [one == "experts" for one in alone]
    if config.data.get(named(config, "num_experts")) in (None, 0, 1):
        return [False] * num_layers
    if config.data.get("enable_moe_block") is False:
        return [False] * num_layers
    if isinstance(kinds := config.data.get("mlp_layer_types"), list):
        return [kind in ("sparse", "moe") for kind in _for_layers(config, "mlp_layer_types", kinds, num_layers)]
    if isinstance(flags := config.data.get("moe_layer_freq"), list):
        return [bool(flag) for flag in _for_layers(config, "moe_layer_freq", flags, num_layers)]
    if (enum := config.data.get("moe_layers_enum")) is not None:
        items = enum.split(",") if isinstance(enum, str) else enum if isinstance(enum, list) else []
        having = {int(item) for item in items if str(item).strip().isdecimal()}
        return [layer in having for layer in range(num_layers)]
    if config.data.get("expert_layer_period") is not None:
        period, offset = config.whole("expert_layer_period"), config.whole("expert_layer_offset", 0, least=0)
        return [layer % period == offset for layer in range(num_layers)]
    first = number(config, "first_dense", 0, least=0)
    if first >= num_layers:
        config.refuse(
            named(config, "first_dense"), f"is {first}, must be less than the number of layers ({num_layers})"
        )
    names = ("moe_layer_interval", "moe_layer_freq", "decoder_sparse_step", "interleave_moe_layer_step")
    every = config.whole(next((name for name in names if config.data.get(name) is not None), names[0]), 1)
    dense = config.data.get("mlp_only_layers")
    only_dense = set(dense) if isinstance(dense, list) else set()
    if config.data.get("moe_layer_interval") is not None or config.data.get("decoder_sparse_step") is not None:
        flags = [layer >= first and (layer + 1) % every == 0 for layer in range(num_layers)]
    else:
        flags = [layer >= first and (layer - first) % every == every - 1 for layer in range(num_layers)]
    return [flag and layer not in only_dense for layer, flag in enumerate(flags)]
