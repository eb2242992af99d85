"""Models whose ``config.json`` names the kind of every layer: one reader, for which a family only maps its names.

What layers are of which kind is read from any of the fields by which families state it, and what a kind looks like from
the fields of that kind. So a new family is a row of names in `hetis.formats.models.families`, or nothing: an
architecture without a row is read if all of its fields that describe a shape are known here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hetis.formats.models.config_json import Config, LinearLayers
from hetis.formats.models.layer_kinds import (
    ATTENTION,
    BOTH,
    CONVOLUTION,
    CONVOLVED,
    CONVOLVED_WINDOW,
    NAMES,
    NONE,
    STATE,
    WINDOWED,
    kinds_of_attention,
    layers_with_experts,
    mlps_alone,
    named,
    number,
)
from hetis.formats.models.linear_attention import LinearLayer, delta_attention, gated_delta_rule, lightning_layer
from hetis.solver.model import Dense, Experts, Grouped, Indexer, Latent, Layer, Mixer, Mlp, Recurrent

_STRUCTURE = re.compile(
    r"(size|dim|heads?|layers?|experts?|rank|state|kernel|window|pattern|freq|types?|expand|latent|groups|period|offset"
    r"|index|block|repeat|shar|loop|multi_query|depth|width|lora|ratio|multiplier|streams|ngram|n_gram|chunk)"
)
# Fields that look as if they described a shape, and change nothing that is counted; by expressions.
_HARMLESS = re.compile(
    r"(rope|rotary|token_(id|index)|initializer|dropout|norm|router|routed_scaling|aux_loss|pretraining|quantization"
    r"|vocab_size|_id$|_ids$|transformers|use_cache|logits|loss|bias|mtp|nextn|draft|beam|length_penalty|no_repeat|output_"
    r"|topk_group|n_group|swiglu|embedding_multiplier|residual_multiplier|attention_multiplier|ssm_multipliers"
    r"|mlp_multipliers|lm_head_multiplier|key_multiplier|out_multiplier|in_multiplier|time_step|mamba_dt|moe_norm"
    r"|mamba_chunk_size|chunk_size$|chunk_size_feed|group_size|dtype|cache_dtype|model_type|type_vocab|position_emb"
    r"|use_mamba|num_logits|activation|hidden_act|image|video|audio|vision|encoder|is_decoder|tie_|architectures"
    r"|layer_id|expert_parallel|ep_size|zero_expert|moe_layer_end_index|attn_implementation|bos|eos|pad|overlap|max_"
    r"|partial_|yarn|theta|scal|attention_value_scale|attn_value_scale|qk_|use_qk|_type$|moe_implementation|num_nextn"
    r"|attention_chunk_size|problem_type|id2label|label2id|pruned_heads|finetuning|cross_attention|num_return|top_k$)"
)
# Fields, also switches, of parts beside attention and MLP: tables of n-grams, loops, MLPs beside experts.
_FURTHER_PARTS = re.compile(
    r"(?<!repeat_)n_?gram|engram|num_recurr|^use_residual$|attn_mlp_res|cross_attention_layers|memory_token"
)
# Fields that tell a shape of its own, not covered by the names above.
_READ = {
    *("hidden_size", "num_attention_heads", "head_dim", "v_head_dim", "global_head_dim", "num_global_key_value_heads"),
    *("layer_types", "layers_block_type", "hybrid_override_pattern", "hybrid_layer_pattern", "sliding_window_pattern"),
    *("attn_layer_period", "attn_layer_offset", "attn_layer_indices", "full_attn_idxs", "expert_layer_period"),
    *("expert_layer_offset", "moe_layer_freq", "mlp_layer_types", "moe_layers_enum", "mlp_only_layers"),
    *("decoder_sparse_step", "moe_layer_interval", "interleave_moe_layer_step", "use_sliding_window", "conv_L_cache"),
    *("block_multiple_of", "block_ffn_dim_multiplier", "block_auto_adjust_ff_dim", "mamba_d_ssm", "mamba_dt_rank"),
    *("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "qk_head_dim", "num_kv_shared_layers"),
    *("hidden_size_per_layer_input", "use_double_wide_mlp", "enable_moe_block", "attention_k_eq_v", "block_configs"),
    *("swa_num_attention_heads", "swa_num_key_value_heads", "swa_head_dim", "swa_v_head_dim"),
    *("attention_other_setting", "sparse_attention_config", "layer_group_size", "index_n_heads", "index_head_dim"),
    *("index_block_size", "index_topk_blocks", "linear_conv_kernel_dim", "per_layer_config"),
    *("linear_attn_config", "attention_bias", "vocab_size_per_layer_input", "mamba_ssm_cache_dtype", "no_rope_layers"),
    *("no_rope_layer_interval", "max_window_layers", "embedding_size", "rope_parameters", "index_local_blocks"),
    *("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"),
    *("num_attention_heads_per_layer", "global_attn_every_n_layers", "mla_use_output_gate", "cla_share_factor"),
    *("use_cla", "use_mixed_mlp_moe", "attn_res_block_size", "q_head_dim", "dim_model_base", "scale_depth"),
    *("expansion_ratio", "num_expert_group", "n_layers_per_attn_res_block"),
}
_KNOWN = _READ | {name for names in NAMES.values() for name in names}


@dataclass(slots=True)
class Shapes:
    """The layers of a model, and what is counted beside them."""

    layers: tuple[Layer, ...]
    beside_params: int = 0  # tables of the first stage
    matrices: Mapping[str, int] = field(default_factory=dict)  # of layers with states, by their names in checkpoints


def unknown_fields(config: Config) -> list[str]:
    """Return the fields that may describe a shape and are not known here."""
    found = []
    for name, value in config.data.items():
        is_empty = value in (None, False, 0, 1, 1.0, "", [], {}) or (isinstance(value, str) and name not in _KNOWN)
        is_shape = name not in _KNOWN and _STRUCTURE.search(name) and not _HARMLESS.search(name)
        if (is_shape and not is_empty) or (value and _FURTHER_PARTS.search(name)):
            found.append(name)
    return found


def read_layers(config: Config, num_layers: int, *, gated_mlp: bool = True, gated_attention: bool = False) -> Shapes:
    """Return the layers that a config describes."""
    kinds = kinds_of_attention(config, num_layers)
    gated_attention = gated_attention or config.data.get("gating") == "per-element"  # Laguna
    mlps, alone = _mlps(config, num_layers, gated=gated_mlp), mlps_alone(config, num_layers)
    makers: dict[str, Callable[[Config], tuple[Mixer, ...]]] = {
        ATTENTION: lambda own: (_attention(own, gated=gated_attention),),
        WINDOWED: lambda own: (_windowed(own, gated=gated_attention),),
        "sparse": lambda own: (_sparse(own),),
        STATE: lambda own: (_state(own)[0],),
        CONVOLUTION: lambda own: (_convolution(own)[0],),
        BOTH: lambda own: (_attention(own, gated=gated_attention), _state(own)[0]),
        CONVOLVED: lambda own: _convolved(own, _attention(own, gated=gated_attention)),
        CONVOLVED_WINDOW: lambda own: _convolved(own, _windowed(own, gated=gated_attention)),
        NONE: lambda own: (),
    }
    numbered = _in_layers(config, num_layers)
    alike = dict(zip(zip(kinds, map(repr, numbered), strict=True), numbered, strict=True))
    makes = {
        key: makers[key[0]](config if not own else replace(config, data=config.data | own))
        for key, own in alike.items()
    }
    layers = [Layer(mixers=makes[kind, repr(numbered[layer])], mlps=mlps[layer]) for layer, kind in enumerate(kinds)]
    made = set(kinds)
    if alone is not None:
        layers = [replace(one, mlps=() if one.mixers else one.mlps) for one in layers]
    shapes = Shapes(tuple(layers))
    if STATE in made or BOTH in made:
        shapes.matrices = _state(config)[1]
    elif CONVOLUTION in made:
        shapes.matrices = _convolution(config)[1]
    if config.flag("use_cla", False):  # Hunyuan-Large: the first of every few layers has KV
        every = config.whole("cla_share_factor", 2)
        shapes.layers = tuple(_sharing(one) if n % every else one for n, one in enumerate(layers))
    if config.data.get("num_kv_shared_layers"):
        shapes.layers = _with_shared_kv(config, shapes.layers)
    if per_layer := config.whole("hidden_size_per_layer_input", 0, least=0):
        vocab = config.whole("vocab_size_per_layer_input", config.whole("vocab_size"))
        hidden = config.whole("hidden_size")
        shapes.beside_params = num_layers * per_layer * (vocab + 3 * hidden)
    numbers = tuple(n for n, layer in enumerate(layers) if any(isinstance(one, Recurrent) for one in layer.mixers))
    config.linear = LinearLayers(numbers, shapes.matrices)
    return shapes


def _in_layers(config: Config, num_layers: int) -> list[dict[str, Any]]:
    """Return the fields of every layer that differ from those of the model.

    Transformers 5 writes them by the numbers of layers in ``per_layer_config``; Laguna lists the heads of each layer.
    """
    found: list[dict[str, Any]] = [{} for _ in range(num_layers)]
    if (by_number := config.inner("per_layer_config")) is not None:
        for number, fields in by_number.data.items():
            if not (number.isdecimal() and int(number) < num_layers and isinstance(fields, dict)):
                by_number.refuse(number, f"must be a layer from 0 to {num_layers - 1}, with a mapping of its fields")
                continue
            found[int(number)] = fields
    heads = config.for_layers("num_attention_heads_per_layer", num_layers) or [None] * num_layers
    return [
        own if own_heads is None else {"num_attention_heads": own_heads} | own
        for own, own_heads in zip(found, heads, strict=True)
    ]


# --- shapes


def _heads(config: Config) -> tuple[int, int, int]:
    hidden, q_heads = config.whole("hidden_size"), config.whole("num_attention_heads")
    kv_heads = number(config, "num_key_value_heads", q_heads)
    has_own_size = any(config.data.get(name) is not None for name in (*NAMES["head_dim"], "kv_lora_rank"))
    if not has_own_size and not config.problems and hidden % q_heads:
        config.refuse("hidden_size", f"is {hidden}, must be a multiple of num_attention_heads ({q_heads})")
    return q_heads, kv_heads, number(config, "head_dim", max(1, hidden // q_heads))


def _attention(config: Config, *, gated: bool) -> Mixer:
    """Return attention to the whole context, which is latent where there is a rank of KV."""
    q_heads, kv_heads, head_dim = _heads(config)
    if config.data.get("kv_lora_rank") is not None:
        return Latent(
            query_heads=q_heads,
            kv_lora_rank=config.whole("kv_lora_rank"),
            qk_rope_head_dim=config.whole("qk_rope_head_dim"),
            qk_nope_head_dim=config.whole("qk_nope_head_dim"),
            v_head_dim=config.whole("v_head_dim"),
            q_lora_rank=config.optional("q_lora_rank"),
            # Ling 3 has a gate for every number, or one for each head, of which the weights are negligible.
            gated=gated or config.flag("mla_use_output_gate", False) or config.data.get(_GRANULARITY) == "element_wise",
        )
    if config.data.get("layer_types") is not None or config.data.get("global_head_dim") is not None:  # Gemma 4
        kv_heads = config.whole("num_global_key_value_heads", kv_heads)
        head_dim = config.whole("global_head_dim", head_dim)
    return _grouped(
        config, q_heads, kv_heads, head_dim, config.optional("v_head_dim"),
        gated=gated, key_is_value=config.flag("attention_k_eq_v", False),
    )  # fmt: skip


_GRANULARITY = "gated_attention_proj_granularity_type"


def _windowed(config: Config, *, gated: bool) -> Mixer:
    q_heads, kv_heads, head_dim = _heads(config)
    other = config.inner("attention_other_setting")  # Step
    if other is not None:
        q_heads = other.whole("num_attention_heads", q_heads)
        kv_heads = number(other, "num_key_value_heads", kv_heads)
    q_heads = config.whole("swa_num_attention_heads", q_heads)
    kv_heads, head_dim = config.whole("swa_num_key_value_heads", kv_heads), config.whole("swa_head_dim", head_dim)
    value_dim = config.optional("swa_v_head_dim") or config.optional("v_head_dim")
    one = _grouped(config, q_heads, kv_heads, head_dim, value_dim, gated=gated, key_is_value=False)
    return replace(one, window=number(config, "window"))


def _grouped(
    config: Config, q_heads: int, kv_heads: int, head_dim: int, value_dim: int | None, *, gated: bool,
    key_is_value: bool,
) -> Grouped:  # fmt: skip
    if q_heads % kv_heads:
        heads = f"num_attention_heads ({q_heads}) must be a multiple of the KV heads ({kv_heads})"
        config.refuse_all(heads)
        kv_heads = q_heads
    return Grouped(
        query_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=None if value_dim == head_dim else value_dim,
        gated=gated,
        key_is_value=key_is_value,
    )


def _sparse(config: Config) -> Mixer:
    """Return MiniMax-M3's attention, where an indexer chooses blocks of tokens. Its key has 16 bits in the KV cache."""
    own = config.inner("sparse_attention_config")

    def given(name: str, legacy: str) -> int:
        return config.whole(name) if own is None or own.data.get(legacy) is None else own.whole(legacy)

    block, size = given("index_block_size", "sparse_block_size"), given("index_head_dim", "sparse_index_dim")
    local = 0 if own is None else own.whole("sparse_local_block", 0, least=0)
    top = given("index_topk_blocks", "sparse_topk_blocks") + local
    full = _attention(config, gated=False)
    heads = given("index_n_heads", "sparse_num_index_heads")
    indexer = Indexer(top_tokens=top * block, heads=heads, head_dim=size, key_bytes=2.0 * size)
    return replace(full, indexer=indexer) if isinstance(full, Grouped) else full


def _state(config: Config) -> LinearLayer:
    """Return a layer of Mamba, Mamba-2 or Kimi delta attention, and its matrices by their names."""
    if config.data.get("linear_attn_config") is not None:
        return _delta_attention(config)
    if config.data.get("linear_num_value_heads") is not None:
        return _delta_rule(config)
    if config.data.get("layer_group_size") is not None:
        is_delta = config.data.get("no_kda_lora") or config.data.get("linear_num_heads") is not None
        return _delta_attention(config) if is_delta else _lightning_attention(config)
    hidden, state = config.whole("hidden_size"), number(config, "mamba_state")
    kernel, expand = number(config, "mamba_kernel", 4), number(config, "mamba_expand", 2)
    if config.data.get(named(config, "mamba_heads")) is None:
        return _first_mamba(config, expand * hidden, state, kernel)
    heads, groups = number(config, "mamba_heads"), number(config, "mamba_groups", 1)
    stated = config.data.get(named(config, "mamba_head_dim"))
    inner = config.whole("mamba_d_ssm", expand * hidden)
    size = max(1, inner // heads) if stated in (None, "auto") else number(config, "mamba_head_dim")
    inner = heads * size
    channels = inner + 2 * groups * state
    element = 4.0 if config.data.get("mamba_ssm_cache_dtype") == "float32" else 2.0
    chunk = config.whole("mamba_chunk_size", config.whole("chunk_size", 256))
    matrices = {"in_proj": hidden * (inner + channels + heads), "out_proj": inner * hidden}
    # A token in one head: its key and value into the state and its query with it; then the tokens of its chunk.
    flops = heads * (4 * size * state + 2 * chunk * size) + groups * 2 * chunk * state
    one = Recurrent(
        weights=sum(matrices.values()) + channels * kernel,
        request_bytes=element * inner * state + 2.0 * channels * (kernel - 1),
        flops=float(flops),
        heads=heads,
    )
    return one, {f"mixer.{name}": size for name, size in matrices.items()}


def _delta_rule(config: Config) -> LinearLayer:
    """Return a gated delta rule (Qwen3-Next, OLMo-Hybrid)."""
    found = gated_delta_rule(config, config.num_layers())
    shape = found.shape or {}
    one = Recurrent(
        weights=shape.get("params", 1),
        request_bytes=shape.get("state_bytes", 1.0),
        flops=shape.get("token_flops", 0.0),
        heads=config.whole("linear_num_value_heads"),
    )
    return one, dict(found.matrices)


def _lightning_attention(config: Config) -> LinearLayer:
    """Return Ling's and Ring's linear attention: queries, keys and values together, a gate, and the output.

    The state is a matrix per head in 16 bits, as in MiniMax-Text-01 (vLLM 0.32, bailing_moe_linear.py).
    """
    q_heads, _, size = _heads(config)
    names = ("attention.query_key_value", "attention.g_proj", "attention.dense")
    return lightning_layer(config.whole("hidden_size"), q_heads, size, names)


def _first_mamba(config: Config, inner: int, state: int, kernel: int) -> LinearLayer:
    """Return a layer of the first Mamba (Jamba), whose state has a scalar decay per channel."""
    hidden = config.whole("hidden_size")
    stated = config.data.get("mamba_dt_rank")
    rank = math.ceil(hidden / 16) if stated in (None, "auto") else config.whole("mamba_dt_rank")
    matrices = {
        "mamba.in_proj": 2 * hidden * inner,
        "mamba.x_proj": inner * (rank + 2 * state),
        "mamba.dt_proj": rank * inner,
        "mamba.out_proj": inner * hidden,
    }
    one = Recurrent(
        weights=sum(matrices.values()) + inner * (kernel + state),
        request_bytes=2.0 * inner * (state + kernel - 1),
        flops=6.0 * inner * state,
    )
    return one, matrices


def _convolution(config: Config) -> LinearLayer:
    """Return a layer of LFM2's short convolution with its two gates."""
    hidden, kernel = config.whole("hidden_size"), config.whole("conv_L_cache", 3)
    matrices = {"conv.in_proj": 3 * hidden * hidden, "conv.out_proj": hidden * hidden}
    one = Recurrent(
        weights=sum(matrices.values()) + hidden * kernel,
        request_bytes=2.0 * hidden * (kernel - 1),
        flops=2.0 * hidden * kernel,
    )
    return one, matrices


def _convolved(config: Config, attention: Mixer) -> tuple[Mixer, ...]:
    """Return Inkling's attention beside short convolutions of its keys and values, its output and the MLP's output.

    Of each the last inputs stay in 16 bits (``InklingSconv`` in vLLM 0.32's models/inkling/nvidia/sconv_swa_attn.py).
    A projection of the hidden size to ``d_rel`` numbers per query head gives the positions.
    """
    hidden, kernel = config.whole("hidden_size"), number(config, "short_conv_kernel", 4)
    channels = 2 * attention.num_kv_heads * attention.key_dim + 2 * hidden
    convolutions = Recurrent(
        weights=hidden * attention.q_heads * config.whole("d_rel") + channels * kernel,
        request_bytes=2.0 * channels * (kernel - 1),
        flops=2.0 * channels * kernel,
    )
    return attention, convolutions


def _delta_attention(config: Config) -> LinearLayer:
    """Return Kimi's delta attention, with an output gate of low or of full rank; or Ling 3's, with both gates of full
    rank and as many heads as attention has.
    """
    own, hidden = config.inner("linear_attn_config"), config.whole("hidden_size")
    if own is None:
        heads, size = number(config, "kda_heads"), number(config, "kda_head_dim")
        return delta_attention(hidden, heads, size, number(config, "short_conv_kernel", 4), low_rank="")
    heads, size, kernel = own.whole("num_heads"), own.whole("head_dim"), own.whole("short_conv_kernel_size", 4)
    return delta_attention(hidden, heads, size, kernel, "f" if own.flag("use_full_rank_gate", False) else "fg")


def _mlps(config: Config, num_layers: int, *, gated: bool) -> list[tuple[Mlp, ...]]:
    having = layers_with_experts(config, num_layers)
    dense = Dense(width=dense_width(config), gated=gated)
    if not any(having):
        shared = config.data.get("shared_intermediate_size")
        if config.data.get("num_local_experts") == 0 and shared:  # Granite 4 without experts
            dense = Dense(width=config.whole("shared_intermediate_size"), gated=gated)
        return [(dense,)] * num_layers
    experts = _experts(config, gated=gated)
    beside: tuple[Mlp, ...] = (dense,) if config.flag("enable_moe_block", False) else ()  # Gemma 4 has both
    return [(*beside, experts) if has else (dense,) for has in having]


def dense_width(config: Config) -> int:
    name = named(config, "intermediate_size")
    default = config.data.get(named(config, "moe_intermediate_size"))
    if config.data.get(name) is None and config.data.get("expansion_ratio") is not None:  # MPT, GPT-2
        default = config.whole("hidden_size") * config.whole_ratio("expansion_ratio", 1)
    width = config.whole(name, default if isinstance(default, int) and default > 0 else None)
    if config.flag("block_auto_adjust_ff_dim", False):  # LFM2
        multiple = config.whole("block_multiple_of", 256)
        factor = config.data.get("block_ffn_dim_multiplier", 1.0)
        width = int((factor if isinstance(factor, int | float) else 1.0) * int(2 * width / 3))
        width = multiple * -(-width // multiple)
    return width


def _experts(config: Config, *, gated: bool) -> Experts:
    count, width = number(config, "num_experts"), number(config, "moe_intermediate_size")
    active_name, active = named(config, "num_experts_per_tok"), number(config, "num_experts_per_tok")
    if active > count:
        config.refuse(active_name, f"is {active}, must be at most {named(config, 'num_experts')} ({count})")
        active = count
    zero = config.whole("zero_expert_num", 0, least=0)  # of LongCat: a choice among experts may be of one of these
    active = max(1, round(active * count / (count + zero)))
    shared, own = number(config, "n_shared_experts", 0, least=0), named(config, "shared_width")
    # A width of all shared experts, or one of each; a number alone is of experts as wide as routed ones.
    of_all = config.whole(own, shared * width, least=0)
    if own == "moe_shared_expert_intermediate_size" and config.data.get(own):  # of each
        of_all *= max(1, shared)
    # Hunyuan has a shared expert as wide as the MLP, Grok an MLP beside the experts.
    if (config.flag("use_mixed_mlp_moe", False) and not shared) or config.flag("residual_moe", False):
        of_all = dense_width(config)
    latent = config.optional(named(config, "moe_latent_size"))
    return Experts(count=count, active=active, width=width, shared_width=of_all, latent=latent, gated=gated)


def _with_shared_kv(config: Config, layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """Return layers of which the last attend to the KV of earlier ones, perhaps with MLPs twice as wide (Gemma 4)."""
    number_shared = config.whole("num_kv_shared_layers", 0, least=0)
    factor = 2 if config.flag("use_double_wide_mlp", False) else 1
    first = len(layers) - min(number_shared, len(layers) - 1)
    return (*layers[:first], *(_sharing(layer, factor) for layer in layers[first:]))


def _sharing(layer: Layer, factor: int = 1) -> Layer:
    """Return a layer that attends to the KV of another, with a dense MLP so many times as wide."""
    mixers = tuple(replace(one, has_own_kv=False) if isinstance(one, Grouped) else one for one in layer.mixers)
    mlps = [replace(one, width=factor * one.width) if isinstance(one, Dense) else one for one in layer.mlps]
    return Layer(mixers=mixers, mlps=tuple(mlps))
