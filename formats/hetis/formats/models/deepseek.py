"""DeepSeek and families built like it: latent, sparse and compressed attention, experts behind dense layers."""

from __future__ import annotations

from dataclasses import replace

from hetis.formats.errors import shown
from hetis.formats.layers import Shape
from hetis.formats.models.common import common_fields, default_width, leading_dense_layers, spec_of
from hetis.formats.models.compressed_attention import compressed_attention
from hetis.formats.models.config_json import MAX_STREAMS, Config
from hetis.formats.models.layered import Shapes
from hetis.formats.models.linear_attention import kimi_delta_attention
from hetis.solver.model import Indexer, Latent, Mixer, ModelSpec


def kimi_linear(config: Config, name: str) -> ModelSpec | None:
    """Read Kimi Linear: Kimi delta attention in most layers, latent attention in the others, which has no rotation but
    caches the dimensions for it; experts after some dense layers. Fields that only Kimi K3 sets are refused.
    """
    for own in ("mla_use_output_gate", "routed_expert_hidden_size", "attn_res_block_size"):
        if config.data.get(own):
            config.refuse(own, f"is {shown(config.data[own])}, but what it adds to Kimi Linear is not modelled")
    common, mla, moe = common_fields(config, name), mla_of(config), None
    if config.data.get(config.experts_name("num_experts")) is not None:
        if config.whole("moe_layer_freq", 1) != 1:
            config.refuse("moe_layer_freq", "only models with experts in every layer after the first (1) are supported")
        moe = dict(
            **config.experts("num_experts", "num_experts_per_token"),
            expert_intermediate=config.whole("moe_intermediate_size"),
            shared_experts=config.whole("num_shared_experts", 0, least=0),
            first_dense_layers=leading_dense_layers(config, common["num_layers"]),
        )
    config.linear = kimi_delta_attention(config, common["num_layers"])
    common |= {
        "linear": config.linear.shape,
        "head_dim": mla["qk_nope_head_dim"] + mla["qk_rope_head_dim"],
        "max_position": config.whole("model_max_length", common["max_position"]),
    }
    return spec_of(config, **common, mla=mla, moe=moe)


def routed_experts(config: Config) -> Shape:
    """Return the experts of DeepSeek: routed and shared ones."""
    return dict(
        **config.experts("n_routed_experts", "num_experts_per_tok"),
        expert_intermediate=config.whole("moe_intermediate_size"),
        shared_experts=config.whole("n_shared_experts", 0, least=0),
    )


def mla_of(config: Config) -> Shape:
    sizes = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    return dict(**{name: config.whole(name) for name in sizes}, q_lora_rank=config.optional("q_lora_rank"))


def with_indexer(config: Config, shapes: Shapes) -> Shapes:
    """Return DeepSeek-V3.2's and GLM 5's layers: DeepSeek-V3's with an indexer, whose keys have 8 bits and a scale of
    32. Some layers of GLM 5.2 attend to what an earlier one chose.
    """
    if config.data.get("q_lora_rank") is None:
        config.refuse("q_lora_rank", "is missing, but the indexer computes its queries from compressed ones")
        return shapes
    size = config.whole("index_head_dim")
    heads, tokens = config.whole("index_n_heads"), config.whole("index_topk")
    indexer = Indexer(top_tokens=tokens, heads=heads, head_dim=size, key_bytes=size + 4.0)
    owns = _indexers(config, len(shapes.layers))

    def chosen(mixer: Mixer, own: bool) -> Mixer:
        return replace(mixer, indexer=indexer, has_own_indexer=own) if isinstance(mixer, Latent) else mixer

    layers = [
        replace(layer, mixers=tuple(chosen(one, own) for one in layer.mixers))
        for layer, own in zip(shapes.layers, owns, strict=True)
    ]
    return replace(shapes, layers=tuple(layers))


def deepseek_v4(config: Config, name: str) -> ModelSpec | None:
    """Read DeepSeek-V4: compressed attention, several streams of the residual, and experts in every layer.

    The first layers route by a table of tokens (``num_hash_layers``), with as many experts per token. KV has 8 bits
    unless it is set otherwise, as in vLLM's kernels (``_resolve_dsv4_kv_cache_dtype`` in vllm/models/deepseek_v4).
    """
    if vision := config.data.get("vision_n_layers"):
        config.refuse("vision_n_layers", f"is {shown(vision)}, but its vision tower is not modelled")
    moe = routed_experts(config)
    common = common_fields(config, name, defaults={"num_key_value_heads": 1} | default_width(moe))
    compressed = compressed_attention(config, common["num_layers"])
    streams = config.whole("hc_mult", most=MAX_STREAMS)
    return spec_of(config, **common, moe=moe, compressed=compressed, residual_streams=streams, kv_bytes=1.0)


def _indexers(config: Config, num_layers: int) -> list[bool]:
    """Return whether each layer has an indexer of its own; the others share an earlier choice.

    As in transformers 5.23 (``GlmMoeDsaConfig.__post_init__``), ``indexer_types`` precedes ``index_topk_pattern``,
    which precedes ``index_topk_freq`` with ``index_skip_topk_offset``. vLLM (``skip_topk`` in
    models/deepseek_v32/attention.py) reads the last three alike; layers that share have neither indexer nor its cache.
    """
    every, offset = config.whole("index_topk_freq", 1), config.whole("index_skip_topk_offset", 2, least=0)
    if config.data.get("indexer_types") is not None:
        name, full, shared = "indexer_types", "full", "shared"
        kinds = config.for_layers(name, num_layers) or []
    elif (pattern := config.data.get("index_topk_pattern")) is not None:
        name, full, shared = "index_topk_pattern", "F", "S"
        kinds = list(pattern) if isinstance(pattern, str) else []
        if len(kinds) != num_layers:
            config.refuse(name, f"is {shown(pattern)}, must be a text of {num_layers} letters, one for each layer")
    else:
        if offset == 0 and every > 1:
            config.refuse("index_skip_topk_offset", "is 0, so layer 0 would share the indexer of an earlier layer")
        return [layer < offset or (layer - offset) % every == every - 1 for layer in range(num_layers)]
    if unknown := [kind for kind in kinds if kind not in (full, shared)]:
        config.refuse(name, f"has {shown(unknown[0])}, must have {full} or {shared} for each layer")
    elif kinds and kinds[0] == shared:
        config.refuse(name, f"has {shown(shared)} for layer 0, which no layer precedes whose indexer it could share")
    return [kind == full for kind in kinds] if len(kinds) == num_layers else [True] * num_layers
