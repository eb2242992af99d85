"""The shape of a model from the ``config.json`` of a Hugging Face checkpoint.

Every architecture names its fields a little differently and omits what its library has defaults for: there is a
function for each family. An unlisted architecture is refused: a wrong shape would make every later figure wrong.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from hetis.formats import dtypes
from hetis.formats.compressed_attention import compressed_attention
from hetis.formats.config_json import MAX_LAYERS, MAX_STREAMS, Config
from hetis.formats.errors import DocumentError, Problem, did_you_mean, shown
from hetis.formats.fields import listed, mapping
from hetis.formats.layered import Shapes, dense_width, named, number, read_layers, stated_layers, unknown_fields
from hetis.formats.layers import Shape, model_in_short, spread_as_in_short
from hetis.formats.linear_attention import gated_delta_rule, kimi_delta_attention, lightning_attention
from hetis.formats.positions import Text
from hetis.formats.quantisation import quantisation_of, stated_kv_bytes, weights_precision
from hetis.formats.quantised_modules import layer_weight_bytes
from hetis.solver.errors import InvalidProblemError
from hetis.solver.model import Dense, Grouped, Kernel, Layer, Mixer, Mlp, ModelSpec


def model_from_config(
    data: dict[str, Any], source: Text, *, name: str, folder: Path | None = None, notes: list[str] | None = None
) -> ModelSpec:
    """Return the model of a ``config.json``. Raises DocumentError if the architecture is not supported (it lists those
    that are, or states what is not modelled), or fields are missing or impossible.

    Args:
        data: the parsed config.
        source: its text, for positions.
        name: name of the model, if the config has no ``_name_or_path``.
        folder: where the checkpoint is. A file there may state how it is quantised, if the config does not.
        notes: gets sentences about what was assumed.
    """
    architecture = _architecture(data, source)
    config = _config(data, source, architecture)
    config.quantisation = quantisation_of(config, folder)
    published = data.get("_name_or_path")  # often a path on the author's machine
    if isinstance(published, str) and re.fullmatch(r"[\w.-]{1,90}/[\w.-]{1,90}", published):
        name = published
    read = FAMILIES.get(architecture, _unknown)
    model = read(config, name if name.isprintable() and name.strip() else "model")
    linear = config.linear
    quantised = weights_precision(config, model, linear)
    dtype = _dtype(config, quantised)
    kv_bytes = stated_kv_bytes(config.quantisation, is_latent=model is not None and _is_latent(model))
    if config.problems or model is None:
        raise DocumentError(dict.fromkeys(config.problems))  # some fields are read for several parts
    base = dtypes.base_bytes(dtype)
    model = dataclasses.replace(model, activation_bytes=base, embedding_bytes=base, weights=quantised or "")
    if kv_bytes is not None:
        model = dataclasses.replace(model, kv_bytes=kv_bytes)
    if config.quantisation is None:
        weight_bytes = dtypes.layer_weight_bytes(dtype, model)
    else:
        weight_bytes = layer_weight_bytes(config.quantisation.data, model, dtype, linear)
    if notes is not None:
        notes += config.notes
    return replace(model, weight_bytes=weight_bytes, layers=spread_as_in_short(model.layers))


def _is_latent(model: ModelSpec) -> bool:
    """Return whether all heads share one vector per token, which engines cache in a layout of its own."""
    return not model.kernels.isdisjoint((Kernel.LATENT, Kernel.COMPRESSED))


def _config(data: dict[str, Any], source: Text, architecture: str) -> Config:
    """Return the reader of the language model's fields."""
    at = next((name for name in _INNER if isinstance(data.get(name), dict)), "text_config")
    text = data.get(at)
    if at == "thinker_config" and isinstance(text, dict):  # Qwen-Omni: what speaks is left out
        return _config({**text, "text_config": text.get("text_config")}, source, architecture)
    is_nested = architecture in NESTED or (architecture not in FAMILIES and isinstance(text, dict))
    if not is_nested or (text is None and "hidden_size" in data):
        return Config(data, source, list(source.problems), whole_data=data)
    if not isinstance(text, dict):
        problem = source.problem((at,), f"is {shown(text)}, must be a mapping")
        raise DocumentError([*source.problems, problem])
    # The whole config of a vision model states how its checkpoint is quantised, and whether its embeddings are tied.
    shared = ("quantization_config", "tie_word_embeddings")
    whole = {name: data[name] for name in shared if name in data} | text
    return Config(whole, source, list(source.problems), (at,), whole_data=data)


def _architecture(data: dict[str, Any], source: Text) -> str:
    name = next(iter(listed(data.get("architectures"))), None)
    if name is None:
        name = MODEL_TYPES.get(str(data.get("model_type")), data.get("model_type"))
    if isinstance(name, str) and name in FAMILIES:
        return name
    path = ("architectures",) if "architectures" in data else ("model_type",)
    if isinstance(name, str) and name in NOT_MODELLED:
        what = f"architecture {shown(name)} has {NOT_MODELLED[name]}, which is not modelled yet"
        raise DocumentError([source.problem(path, what)])
    if isinstance(name, str) and _is_decoder(data, name):
        config = _config(data, source, name)
        unknown = [*unknown_fields(config), *([] if _activation(config) in _GATED | _UNGATED else ["hidden_act"])]
        if not unknown:
            return name
        what = f"architecture {shown(name)} is not supported, and has fields of no known kind: {', '.join(unknown[:8])}"
        own = "a model can be described in a file of its own: hetis-plan schema ModelSpec"
        raise DocumentError([source.problem(path, f"{what}; {own}")])
    # A type of model that is not ours is no slip of the pen: Phi-3 is unlike Phi, whatever its name is like.
    is_other = data.get("model_type") is not None and str(data["model_type"]) not in MODEL_TYPES
    hint = did_you_mean(name, FAMILIES) if isinstance(name, str) and not is_other else ""
    what = f"architecture {shown(name)} is not supported{hint}; supported: {', '.join(FAMILIES)}"
    own = "a decoder built like one of these can be described in a file of its own: hetis-plan schema ModelSpec"
    raise DocumentError([source.problem(path, f"{what}; {own}")])


def _is_decoder(data: dict[str, Any], name: str) -> bool:
    """Return whether an architecture that is not known has the fields of a decoder, so that it may be read by these."""
    text = next((data[each] for each in _INNER if isinstance(data.get(each), dict)), data)
    has_heads = all(text.get(each) is not None for each in ("hidden_size", "num_attention_heads", "vocab_size"))
    is_decoder = name.endswith(("ForCausalLM", "ForConditionalGeneration", "LMHeadModel", "ChatModel"))
    return is_decoder and has_heads and not data.get("is_encoder_decoder") and data.get("model_type") is not None


def _unknown(config: Config, name: str) -> ModelSpec | None:
    """Read an architecture without a row in the table, by fields that are all of known kinds."""
    config.notes.append(
        f"{name}: its architecture is not known; it is read as a decoder whose fields mean what they mean in others: "
        "check its parameters, and how its engine keeps KV"
    )
    gated = config.flag("attn_output_gate", False)
    return _layered(config, name, gated_mlp=_activation(config) in _GATED, gated_attention=gated)


def _activation(config: Config) -> str:
    return str(config.data.get("hidden_act") or config.data.get("hidden_activation") or "silu")


# Activations of MLPs with three matrices, and with two; families use others, such as gelu, for either.
_GATED, _UNGATED = {"silu", "swish", "swiglu", "swigluoai", "situ"}, {"relu", "relu2", "relu^2"}


def _dtype(config: Config, quantised: str | None) -> str:
    """Return the formats of activations and weights; see `hetis.formats.dtypes`.

    Weights stored in 32 bits count as 16, since engines load them so by default: vLLM 0.32 in
    ``_resolve_auto_dtype`` (vllm/config/model.py), SGLang in ``_get_and_verify_dtype`` (srt/configs/model_config.py).
    """
    stated = config.data.get("torch_dtype") or config.data.get("dtype") or "bfloat16"
    try:
        base, weights = dtypes.split_dtype(f"{stated}+{dtypes.PRECISIONS[quantised]}" if quantised else str(stated))
    except ValueError:
        config.refuse("torch_dtype", f"{shown(stated)} is not one of {', '.join(dtypes.BYTES_PER_PARAMETER)}")
        return "bfloat16"
    base, weights = ("bfloat16" if part == "float32" else part for part in (base, weights))
    return f"{base}+{weights}"


Family = Callable[[Config, str], ModelSpec | None]
Part = Callable[[Config, dict[str, Any]], dict[str, Any]]
"""Reads some fields of a model. Gets those read before, and returns what is added to them or in place of them."""


def _spec(config: Config, **fields: Any) -> ModelSpec | None:
    """Return the model of fields that describe it in short, or None if they were wrong."""
    if fields["q_heads"] % fields["kv_heads"]:
        heads = f"num_attention_heads ({fields['q_heads']}) must be a multiple of the KV heads ({fields['kv_heads']})"
        config.problems.append(config.source.problem(config.at, heads))
    if config.problems:
        return None
    if fields.get("sliding_layers") == 0:  # all layers attend to everything
        fields |= {"sliding_window": None, "sliding_layers": None}
    return _made(config, partial(model_in_short, **fields))


def _made(config: Config, make: Callable[[], ModelSpec]) -> ModelSpec | None:
    """Return the model that ``make`` returns, or None after noting what it raises."""
    try:
        return make()
    except InvalidProblemError as error:
        config.problems.append(Problem(file=config.source.file, message=str(error)))
        return None


_HEAD_DIMS = ("head_dim", "kv_channels", "kv_lora_rank")  # fields that make the size of a head another one


def _common(
    config: Config,
    name: str,
    *,
    tie_embeddings: bool = False,
    head_dim: int | None = None,
    defaults: Mapping[str, int] | None = None,
    width: str = "intermediate_size",
) -> dict[str, Any]:
    """Return the fields that most families write alike.

    ``tie_embeddings``, ``head_dim`` and ``defaults``, by the names of fields, are those of the family's library;
    ``width`` is its name for the width of the MLP.
    """
    known = defaults or {}
    hidden = config.whole("hidden_size")
    q_heads = config.whole("num_attention_heads", known.get("num_attention_heads"))
    has_head_dim = head_dim is not None or any(config.data.get(name) is not None for name in _HEAD_DIMS)
    if not has_head_dim and not config.problems and hidden % q_heads:
        config.refuse("hidden_size", f"is {hidden}, must be a multiple of num_attention_heads ({q_heads})")
    return {
        "name": name,
        "num_layers": config.num_layers(),
        "hidden": hidden,
        "intermediate": config.whole(width, known.get(width)),
        "q_heads": q_heads,
        "kv_heads": config.whole("num_key_value_heads", known.get("num_key_value_heads", q_heads)),
        "head_dim": config.whole("head_dim", head_dim or max(1, hidden // q_heads)),
        "vocab": config.whole("vocab_size", known.get("vocab_size")),
        "max_position": config.whole("max_position_embeddings", known.get("max_position_embeddings", 2048)),
        "tie_embeddings": config.flag("tie_word_embeddings", tie_embeddings),
    }


def _family(*parts: Part, fixed: Mapping[str, Any] | None = None, **options: Any) -> Family:
    """Return the reader of a family: `_common` with these ``options``, ``fixed`` values, and what each part reads."""

    def read(config: Config, name: str) -> ModelSpec | None:
        fields = _common(config, name, **options) | dict(fixed or {})
        for part in parts:
            fields |= part(config, fields)
        return _spec(config, **fields)

    return read


def _window(config: Config, _fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"sliding_window": config.optional("sliding_window")}


def _every_second(config: Config, fields: Mapping[str, Any], default: int | None = None) -> dict[str, Any]:
    """Return the sliding window of every second layer."""
    window = config.optional("sliding_window") if default is None else config.whole("sliding_window", default)
    return {"sliding_window": window, "sliding_layers": -(-fields["num_layers"] // 2)}


def _qwen_window(config: Config, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sliding window, which ``use_sliding_window`` switches on, and how many layers have it.

    These are the layers that ``layer_types`` names, by default all from ``max_window_layers`` on, as in transformers.
    vLLM (0.32) runs models with the window in all layers or in none.
    """
    num_layers = fields["num_layers"]
    window = config.optional("sliding_window") if config.flag("use_sliding_window", False) else None
    kinds = config.kinds_of_layers(num_layers, ("full_attention", "sliding_attention"))
    layers = num_layers - min(num_layers, config.whole("max_window_layers", 28, least=0))
    layers = layers if kinds is None else kinds.count("sliding_attention")
    if window is None or layers == 0:
        return {}
    return {"sliding_window": window, "sliding_layers": None if layers == num_layers else layers}


def _qwen1(config: Config, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Read Qwen 1: MHA, whose ``intermediate_size`` counts gate and up together; each MLP matrix is half as wide."""
    return {
        "intermediate": fields["intermediate"] // 2,
        "head_dim": config.whole("kv_channels", fields["head_dim"]),
        "max_position": config.whole("seq_length", config.whole("max_position_embeddings", 8192)),
    }


def _qwen_moe(config: Config, name: str) -> ModelSpec | None:
    """Read Qwen2-MoE, whose wide shared expert counts as several of the routed width, and Qwen3-MoE, without any."""
    moe = _qwen_experts(config)
    head_dim = None if moe["shared_experts"] else 128
    common = _common(config, name, head_dim=head_dim, defaults=_dense_width(moe))
    return _spec(config, **common, **_qwen_window(config, common), moe=moe)


def _dense_width(moe: Shape | None) -> dict[str, int]:
    """Return the default width of a dense MLP, which no layer has where all have experts."""
    return {} if moe is None else {"intermediate_size": moe["expert_intermediate"]}


def _qwen_experts(config: Config) -> Shape:
    width = config.whole("moe_intermediate_size")
    shared = config.whole("shared_expert_intermediate_size", 0, least=0)
    if config.whole("decoder_sparse_step", 1) != 1:
        config.refuse("decoder_sparse_step", "only models with experts in every layer (1) are supported")
    if config.data.get("mlp_only_layers"):
        config.refuse("mlp_only_layers", "only models with experts in every layer are supported")
    if shared % width:
        config.refuse("shared_expert_intermediate_size", f"is {shared}, must be a multiple of {width}")
    return dict(
        **config.experts("num_experts", "num_experts_per_tok"),
        expert_intermediate=width,
        shared_experts=shared // width,
    )


# Fields that configs of Qwen2-VL and 2.5-VL may omit, with the defaults of their library.
_QWEN2_VL = {"intermediate_size": 29_568, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 152_064}
_QWEN2_VL["max_position_embeddings"] = 32_768
_QWEN2_VL_TOWER = {"depth": 32, "temporal_patch_size": 2}
_QWEN25_VL_TOWER = _QWEN2_VL_TOWER | {"hidden_size": 3584, "intermediate_size": 3420, "out_hidden_size": 3584}


def _qwen2_vl(config: Config, name: str, *, gated: bool) -> ModelSpec | None:
    """Read Qwen2-VL, and 2.5-VL, whose tower has gated MLPs: Qwen2 with a vision tower.

    In Qwen2-VL ``hidden_size`` is the width of the tower's output, and ``embed_dim`` its own.
    """
    common = _common(config, name, defaults=_QWEN2_VL)
    if _qwen_window(config, common):
        config.refuse("use_sliding_window", "is true, only models without sliding windows are supported")
    vision = config.part("vision_config")
    if vision is not None and gated:
        vision.data = _QWEN25_VL_TOWER | vision.data
    elif vision is not None:
        width = vision.whole("embed_dim", 1280)
        tower = {"hidden_size": width, "intermediate_size": width * vision.whole_ratio("mlp_ratio", 4)}
        tower["out_hidden_size"] = vision.whole("hidden_size", 3584)
        vision.data = _QWEN2_VL_TOWER | vision.data | tower
    towers = 0 if vision is None else _tower_params(vision, projection=0, gated=gated)
    return _spec(config, **common, vision_params=towers)


def _qwen3_vl(config: Config, name: str) -> ModelSpec | None:
    """Read Qwen3-VL: Qwen3 or Qwen3-MoE with a vision tower."""
    moe = _qwen_experts(config) if "num_experts" in config.data else None
    towers = _vision_params(config, projection=0)
    common = _common(config, name, head_dim=128, defaults=_dense_width(moe))
    return _spec(config, **common, moe=moe, vision_params=towers)


def _qwen3_next(config: Config, name: str) -> ModelSpec | None:
    """Read Qwen3-Next and Qwen3.5: gated attention in every fourth layer, gated delta rules in the others."""
    moe = _qwen_experts(config) if "num_experts" in config.data else None
    common = _common(config, name, head_dim=256, defaults=_dense_width(moe))
    config.linear = gated_delta_rule(config, common["num_layers"])
    return _spec(
        config,
        **common,
        moe=moe,
        linear=config.linear.shape,
        gated_attention=config.flag("attn_output_gate", True),
        vision_params=_vision_params(config, projection=0),
    )


def _kimi_linear(config: Config, name: str) -> ModelSpec | None:
    """Read Kimi Linear: Kimi delta attention in most layers, latent attention in the others, which has no rotation but
    caches the dimensions for it; experts after some dense layers. Fields that only Kimi K3 sets are refused.
    """
    for own in ("mla_use_output_gate", "routed_expert_hidden_size", "attn_res_block_size"):
        if config.data.get(own):
            config.refuse(own, f"is {shown(config.data[own])}, but what it adds to Kimi Linear is not modelled")
    common, mla, moe = _common(config, name), _mla(config), None
    if config.data.get("num_experts") is not None:
        if config.whole("moe_layer_freq", 1) != 1:
            config.refuse("moe_layer_freq", "only models with experts in every layer after the first (1) are supported")
        moe = dict(
            **config.experts("num_experts", "num_experts_per_token"),
            expert_intermediate=config.whole("moe_intermediate_size"),
            shared_experts=config.whole("num_shared_experts", 0, least=0),
            first_dense_layers=_leading_dense_layers(config, common["num_layers"]),
        )
    config.linear = kimi_delta_attention(config, common["num_layers"])
    common |= {
        "linear": config.linear.shape,
        "head_dim": mla["qk_nope_head_dim"] + mla["qk_rope_head_dim"],
        "max_position": config.whole("model_max_length", common["max_position"]),
    }
    return _spec(config, **common, mla=mla, moe=moe)


def _leading_dense_layers(config: Config, num_layers: int, default: int | None = None) -> int:
    """Return how many layers precede those with experts. Transformers writes the kind of every layer's MLP.

    Without a default, a config that says neither has a problem.
    """
    kinds = config.for_layers("mlp_layer_types", num_layers)
    if kinds is None:
        return config.whole("first_k_dense_replace", default, least=0)
    dense = kinds.count("dense")
    if kinds != ["dense"] * dense + ["sparse"] * (num_layers - dense):
        config.refuse("mlp_layer_types", "must have 'dense' for the first layers only, and 'sparse' for all others")
    return dense


def _minimax(config: Config, name: str) -> ModelSpec | None:
    """Read MiniMax-Text-01 and M1: lightning attention in seven of eight layers, and Mixtral's experts in all.

    vLLM serves them up to version 0.23 (``_PREVIOUSLY_SUPPORTED_MODELS`` of its registry).
    """
    if config.data.get("shared_intermediate_size"):
        what = f"is {shown(config.data['shared_intermediate_size'])}, only models without a shared expert are supported"
        config.refuse("shared_intermediate_size", what)
    config.linear = lightning_attention(config, config.num_layers())
    fields = _common(config, name)
    fields |= _experts(config, fields, 8, 2) | _window(config, fields)
    return _spec(config, **fields, linear=config.linear.shape)


def _experts(
    config: Config, fields: Mapping[str, Any], num: int | None = None, active: int | None = None, **more: int
) -> dict[str, Any]:  # fmt: skip
    """Return the experts of Mixtral and those that name them alike, of the stated width in every layer; the last two
    numbers are defaults.
    """
    numbers = config.experts("num_local_experts", "num_experts_per_tok", (num, active))
    return {"moe": dict(**numbers, expert_intermediate=fields["intermediate"], **more)}


_mixtral = _family(partial(_experts, num=8, active=2), _window)


def _opt(config: Config, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Refuse embeddings narrower than the hidden size (OPT-350m)."""
    hidden = fields["hidden"]
    if config.whole("word_embed_proj_dim", hidden) != hidden:
        config.refuse("word_embed_proj_dim", f"must equal hidden_size ({hidden})")
    return {}


_GEMMA3 = {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 262_208}
_GEMMA3["max_position_embeddings"] = 131_072


def _gemma3(config: Config, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Read Gemma 3: five of six layers slide, and a SigLIP tower beside all sizes but the smallest.

    Configs of the larger sizes omit what equals the library's defaults (Gemma3TextConfig).
    """
    every = config.whole("sliding_window_pattern", 6)
    kinds = config.kinds_of_layers(fields["num_layers"], ("sliding_attention", "full_attention"))
    full = fields["num_layers"] // every if kinds is None else kinds.count("full_attention")
    return {
        "sliding_window": config.whole("sliding_window", 1024),
        "sliding_layers": fields["num_layers"] - full,
        "vision_params": _vision_params(config, projection=fields["hidden"]),
    }


def _vision_params(config: Config, *, projection: int, gated: bool = False) -> int:
    """Return the parameters of the vision tower that a ``vision_config`` describes; without one there are none.

    The other arguments are those of `_tower_params`.
    """
    vision = config.part("vision_config")
    return 0 if vision is None else _tower_params(vision, projection=projection, gated=gated)


def _tower_params(vision: Config, *, projection: int, gated: bool) -> int:
    """Return the parameters of a vision tower: patches, transformer layers, and the projection to the text model.

    Args:
        vision: describes the tower.
        projection: parameters of a linear projection per unit of the tower's width, if the config states no other.
        gated: the tower's MLP has three matrices.
    """
    hidden = vision.whole("hidden_size")
    layers = vision.whole("depth" if "depth" in vision.data else "num_hidden_layers")
    layer = 4 * hidden * hidden + (3 if gated else 2) * hidden * vision.whole("intermediate_size")
    channels = vision.whole("in_channels", vision.whole("in_chans", vision.whole("num_channels", 3)))
    pixels = channels * vision.whole("patch_size", 14) ** 2
    patches = pixels * vision.whole("temporal_patch_size", 1) * hidden
    if "out_hidden_size" in vision.data:  # Qwen: patches are merged, with an MLP of their joint width
        merged = hidden * vision.whole("spatial_merge_size", 2) ** 2
        deepstack = vision.data.get("deepstack_visual_indexes")
        mergers = 1 + (len(deepstack) if isinstance(deepstack, list) else 0)
        return layers * layer + patches + mergers * merged * (merged + vision.whole("out_hidden_size"))
    return layers * layer + patches + hidden * projection


def _routed(config: Config, first_dense_layers: int = 0) -> Shape:
    """Return the experts of DeepSeek and GLM: routed and shared ones, after some dense layers."""
    return dict(
        **config.experts("n_routed_experts", "num_experts_per_tok"),
        expert_intermediate=config.whole("moe_intermediate_size"),
        shared_experts=config.whole("n_shared_experts", 0, least=0),
        first_dense_layers=first_dense_layers,
    )


def _mla(config: Config) -> Shape:
    sizes = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    return dict(**{name: config.whole(name) for name in sizes}, q_lora_rank=config.optional("q_lora_rank"))


def _deepseek(config: Config, name: str, indexer: Shape | None = None) -> ModelSpec | None:
    """Read DeepSeek V2 and V3, Kimi K2 and K2.5: latent attention; dense layers first, then experts in every layer."""
    mla = _mla(config)
    common = _common(config, name) | {"head_dim": mla["qk_nope_head_dim"] + mla["qk_rope_head_dim"]}
    moe = None
    if config.data.get("n_routed_experts") is not None:
        if config.whole("moe_layer_freq", 1) != 1:
            config.refuse("moe_layer_freq", "only models with experts in every layer after the first (1) are supported")
        moe = _routed(config, _leading_dense_layers(config, common["num_layers"], 0))
    return _spec(config, **common, mla=mla, moe=moe, indexer=indexer)


def _deepseek_sparse(config: Config, name: str) -> ModelSpec | None:
    """Read DeepSeek-V3.2 and GLM 5: DeepSeek-V3 with an indexer, whose keys have 8 bits and a scale of 32."""
    size = config.whole("index_head_dim")
    indexer = {
        "top_tokens": config.whole("index_topk"),
        "heads": config.whole("index_n_heads"),
        "head_dim": size,
        "key_bytes": size + 4.0,
        "layers": _indexer_layers(config, config.num_layers()),
    }
    if config.data.get("q_lora_rank") is None:
        config.refuse("q_lora_rank", "is missing, but the indexer computes its queries from compressed ones")
    return _deepseek(config, name, indexer)


def _deepseek_v4(config: Config, name: str) -> ModelSpec | None:
    """Read DeepSeek-V4: compressed attention, several streams of the residual, and experts in every layer.

    The first layers route by a table of tokens (``num_hash_layers``), with as many experts per token. KV has 8 bits
    unless it is set otherwise, as in vLLM's kernels (``_resolve_dsv4_kv_cache_dtype`` in vllm/models/deepseek_v4).
    """
    if vision := config.data.get("vision_n_layers"):
        config.refuse("vision_n_layers", f"is {shown(vision)}, but its vision tower is not modelled")
    moe = _routed(config)
    common = _common(config, name, defaults={"num_key_value_heads": 1} | _dense_width(moe))
    compressed = compressed_attention(config, common["num_layers"])
    streams = config.whole("hc_mult", most=MAX_STREAMS)
    return _spec(config, **common, moe=moe, compressed=compressed, residual_streams=streams, kv_bytes=1.0)


def _indexer_layers(config: Config, num_layers: int) -> int | None:
    """Return how many layers have an indexer of their own, or None if all have; the others share an earlier choice.

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
            return None
    else:
        if offset == 0 and every > 1:
            config.refuse("index_skip_topk_offset", "is 0, so layer 0 would share the indexer of an earlier layer")
        layers = min(offset, num_layers) + max(0, num_layers - offset) // every
        return layers if 0 < layers < num_layers else None
    if unknown := [kind for kind in kinds if kind not in (full, shared)]:
        config.refuse(name, f"has {shown(unknown[0])}, must have {full} or {shared} for each layer")
    elif kinds and kinds[0] == shared:
        config.refuse(name, f"has {shown(shared)} for layer 0, which no layer precedes whose indexer it could share")
    layers = kinds.count(full)
    return layers if 0 < layers < num_layers else None


def _llama4(config: Config, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Read Llama 4: chunked attention in three of four layers, and experts in all layers or every second one.

    A query attends to the tokens of its own chunk, which are at most a window, and are counted as one. vLLM (0.32)
    keeps the KV of all tokens, because chunks switch its hybrid KV cache manager off.
    """
    every, num_layers = config.whole("interleave_moe_layer_step", 1), fields["num_layers"]
    experts = _experts(config, fields, 16, 1, shared_experts=1, every=every)
    if config.data.get("moe_layers") not in (None, list(range(every - 1, num_layers, every))):
        config.refuse("moe_layers", f"only models with experts in every layer number {every} are supported")
    # 0: no rope, and full attention. An empty list is like none.
    without_rope = config.for_layers("no_rope_layers", num_layers) if config.data.get("no_rope_layers") else None
    full = num_layers // config.whole("no_rope_layer_interval", 4) if not without_rope else without_rope.count(0)
    window = config.optional("attention_chunk_size")
    return experts | {
        "intermediate": config.whole("intermediate_size_mlp", 16_384),
        "sliding_window": window,
        "sliding_layers": None if window is None else num_layers - full,
        "vision_params": _vision_params(config, projection=fields["hidden"]),
    }


def _mistral3(config: Config, name: str) -> ModelSpec | None:
    """Read Mistral 3: Mistral's text model, or DeepSeek's for Mistral Large 3, with a Pixtral tower."""
    text = (_deepseek if config.data.get("kv_lora_rank") else _family(_window))(config, name)
    towers = _vision_params(config, projection=config.whole("hidden_size"), gated=True)
    return None if text is None else replace(text, vision_params=towers)


def _glm4_moe(config: Config, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Read GLM 4.5 and 4.6: grouped queries; dense layers first, then experts in every layer."""
    return {"moe": _routed(config, _leading_dense_layers(config, fields["num_layers"], 0))}


def _layered(
    config: Config, name: str, *, tied: bool = False, shape: Callable[[Config, Shapes], Shapes] | None = None,
    fixed: Mapping[str, Any] | None = None, **kinds: bool,
) -> ModelSpec | None:  # fmt: skip
    """Read a model whose fields name the kind of every layer (`hetis.formats.layered`).

    ``shape`` changes the layers; ``fixed`` are further fields of the model, ``tied`` its library's default for tied
    embeddings, and ``kinds`` the options of `read_layers`.
    """
    num_layers = number(config, "num_hidden_layers", stated_layers(config))
    if num_layers > MAX_LAYERS:
        config.refuse("num_hidden_layers", f"is {num_layers}, must be a whole number from 1 to {MAX_LAYERS}")
        return None
    hidden, vocab = config.whole("hidden_size"), config.whole("vocab_size")
    shapes = None if config.problems else _made(config, partial(read_layers, config, num_layers, **kinds))
    if shapes is None or config.problems:
        return None
    shapes = shapes if shape is None else shape(config, shapes)
    vision = config.part("vision_config")
    fields = {
        "name": name,
        "layers": shapes.layers,
        "hidden": hidden,
        "vocab": vocab,
        "max_position": number(config, "max_position_embeddings", 2048),
        "tie_embeddings": config.flag(named(config, "tie_word_embeddings"), tied),
        "vision_params": shapes.beside_params + (0 if vision is None else _tower_of_any_kind(vision, hidden)),
    }
    return _made(config, partial(ModelSpec, **fields | dict(fixed or {})))


def _tower_of_any_kind(vision: Config, hidden: int) -> int:
    """Return the parameters of a vision tower by the usual names of its fields; 0 if it has others."""
    own = Config(dict(vision.data), vision.source)
    for name, others in _TOWER_NAMES.items():
        value = next((own.data[each] for each in (name, *others) if own.data.get(each) is not None), None)
        if value is not None:
            own.data[name] = value
    if isinstance(patch := own.data.get("patch_size"), list) and patch:
        own.data["patch_size"] = patch[0]
    if "intermediate_size" not in own.data and isinstance(ratio := own.data.get("mlp_ratio"), int | float):
        width = own.data.get("hidden_size")
        own.data["intermediate_size"] = round(ratio * width) if isinstance(width, int) else None
    if own.data.get("num_hidden_layers") is not None:
        own.data.pop("depth", None)
    params = _tower_params(own, projection=hidden, gated=False)
    return 0 if own.problems else params


_TOWER_NAMES = {
    "hidden_size": ("vt_hidden_size", "width", "embed_dim"),
    "num_hidden_layers": ("depth", "vt_num_hidden_layers", "layers", "num_layers"),
    "intermediate_size": ("vt_intermediate_size",),
}


def _deci(config: Config, name: str) -> ModelSpec | None:
    """Read DeciLM (Llama-Nemotron): every layer has attention and an MLP of its own shape, or lacks either."""
    blocks = _for_layers_of_deci(config)
    q_heads, hidden = config.whole("num_attention_heads"), config.whole("hidden_size")
    head_dim = config.whole("head_dim", max(1, hidden // max(1, q_heads)))

    def read() -> ModelSpec:
        return ModelSpec(
            name=name,
            layers=tuple(_block_of_deci(block, q_heads, head_dim, hidden) for block in blocks),
            hidden=hidden,
            vocab=config.whole("vocab_size"),
            max_position=config.whole("max_position_embeddings", 2048),
            tie_embeddings=config.flag("tie_word_embeddings", False),
        )

    return None if config.problems else _made(config, read)


def _for_layers_of_deci(config: Config) -> list[dict[str, Any]]:
    num_layers, blocks = config.num_layers(), config.data.get("block_configs")
    if isinstance(blocks, list) and len(blocks) == num_layers and all(isinstance(one, dict) for one in blocks):
        return blocks
    per_layer = config.data.get("num_key_value_heads_per_layer")  # DeciLM-7B
    if isinstance(per_layer, list) and len(per_layer) == num_layers:
        width, heads = config.whole("intermediate_size"), config.whole("num_attention_heads")
        return [{"attention": {"n_heads_in_group": heads // max(1, kv)}, "width": width} for kv in per_layer]
    config.refuse("block_configs", f"must be a list of {num_layers} mappings, one for each layer")
    return []


def _block_of_deci(block: Mapping[str, Any], q_heads: int, head_dim: int, hidden: int) -> Layer:
    """Return a layer. Some have one matrix in place of attention or of the MLP (``replace_with_linear``)."""
    attention, ffn = mapping(block.get("attention")), mapping(block.get("ffn"))
    mixers, mlps = list[Mixer](), list[Mlp]()
    if not attention.get("no_op") and not attention.get("replace_with_linear"):
        group = attention.get("n_heads_in_group") or 1
        mixers.append(Grouped(query_heads=q_heads, kv_heads=max(1, q_heads // group), head_dim=head_dim))
    if not ffn.get("no_op") and not ffn.get("replace_with_linear"):
        width = block.get("width")
        if (
            width is None
        ):  # rounded up to a multiple of 256 (`_ffn_mult_to_intermediate_size` in vLLM's nemotron_nas.py)
            width = 256 * -(-int(2 * float(ffn.get("ffn_mult") or 1.0) * hidden / 3) // 256)
        mlps.append(Dense(width=width))
    matrices = sum(bool(part.get("replace_with_linear")) for part in (attention, ffn))
    if matrices:
        mlps.append(Dense(width=matrices * hidden // 2, gated=False))
    return Layer(mixers=tuple(mixers), mlps=tuple(mlps))


def _of_inner_model(config: Config, name: str) -> ModelSpec | None:
    """Read a model whose language model has an architecture of its own (InternVL), with its tower."""
    inner = next(iter(listed(config.data.get("architectures"))), None) or MODEL_TYPES.get(
        str(config.data.get("model_type"))
    )
    read = FAMILIES.get(str(inner))
    if read is None or read is _of_inner_model:
        config.refuse("architectures", f"is {shown(inner)}, which is not supported; supported: {', '.join(FAMILIES)}")
        return None
    model, vision = read(config, name), config.part("vision_config")
    if model is None or vision is None:
        return model
    return replace(model, vision_params=_tower_of_any_kind(vision, model.hidden))


def _twice_in_a_layer(config: Config, shapes: Shapes) -> Shapes:
    """Return LongCat's layers: attention and a dense MLP twice in each, and experts beside both."""
    dense = Dense(width=dense_width(config))
    layers = (replace(one, mixers=one.mixers * 2, mlps=(dense, dense, *one.mlps)) for one in shapes.layers)
    return replace(shapes, layers=tuple(layers))


# Options of Gemma, and of its later generations, whose values exceed the range of float16.
_GEMMA: dict[str, Any] = {"tie_embeddings": True, "head_dim": 256}
_LATER_GEMMA: dict[str, Any] = _GEMMA | {"fixed": {"float16": False}}
_GEMMA_4 = partial(_layered, tied=True, fixed={"float16": False})
_TWO_MATRICES = {"gated_mlp": False}  # of the MLP
# Architecture, its ``model_type`` if configs without ``architectures`` are known, and its reader.
_TABLE: tuple[tuple[str, str, Family], ...] = (
    ("LlamaForCausalLM", "llama", _family()),
    ("LLaMAForCausalLM", "", _family()),
    ("MistralForCausalLM", "mistral", _family(_window)),
    ("MixtralForCausalLM", "mixtral", _mixtral),
    ("MiniMaxM2ForCausalLM", "minimax_m2", _mixtral),
    ("MiniMaxText01ForCausalLM", "minimax_text_01", _minimax),
    ("MiniMaxM1ForCausalLM", "minimax_m1", _minimax),
    ("MiniMaxForCausalLM", "minimax", _minimax),
    ("QWenLMHeadModel", "qwen", _family(_qwen1)),
    ("Qwen2ForCausalLM", "qwen2", _family(_qwen_window)),
    ("Qwen2MoeForCausalLM", "qwen2_moe", _qwen_moe),
    ("Qwen3ForCausalLM", "qwen3", _family(_qwen_window, head_dim=128)),
    ("Qwen3MoeForCausalLM", "qwen3_moe", _qwen_moe),
    ("OPTForCausalLM", "opt", _family(_opt, fixed=_TWO_MATRICES, tie_embeddings=True, width="ffn_dim")),
    ("GemmaForCausalLM", "gemma", _family(**_GEMMA)),
    ("Gemma2ForCausalLM", "gemma2", _family(partial(_every_second, default=4096), **_LATER_GEMMA)),
    ("Gemma3ForCausalLM", "gemma3_text", _family(_gemma3, **_LATER_GEMMA, defaults=_GEMMA3)),
    ("Gemma3ForConditionalGeneration", "gemma3", _family(_gemma3, **_LATER_GEMMA, defaults=_GEMMA3)),
    ("PhiForCausalLM", "phi", _family(fixed=_TWO_MATRICES)),
    ("Phi3ForCausalLM", "phi3", _family(_window)),
    ("PhiMoEForCausalLM", "phimoe", _family(partial(_experts, num=16, active=2), _window)),
    ("DeepseekV2ForCausalLM", "deepseek_v2", _deepseek),
    ("DeepseekV3ForCausalLM", "deepseek_v3", _deepseek),
    ("KimiK2ForCausalLM", "kimi_k2", _deepseek),
    ("KimiK25ForConditionalGeneration", "kimi_k25", _deepseek),
    ("KimiLinearForCausalLM", "kimi_linear", _kimi_linear),
    ("Glm4MoeForCausalLM", "glm4_moe", _family(_glm4_moe, head_dim=128)),
    ("GptOssForCausalLM", "gpt_oss", _family(_every_second, _experts, head_dim=64)),
    ("Qwen2VLForConditionalGeneration", "qwen2_vl", partial(_qwen2_vl, gated=False)),
    ("Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl", partial(_qwen2_vl, gated=True)),
    ("Qwen3VLForConditionalGeneration", "qwen3_vl", _qwen3_vl),
    ("Qwen3VLMoeForConditionalGeneration", "qwen3_vl_moe", _qwen3_vl),
    ("Qwen3NextForCausalLM", "qwen3_next", _qwen3_next),
    ("Qwen3_5ForConditionalGeneration", "qwen3_5", _qwen3_next),
    ("Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe", _qwen3_next),
    ("DeepseekV32ForCausalLM", "deepseek_v32", _deepseek_sparse),
    ("GlmMoeDsaForCausalLM", "glm_moe_dsa", _deepseek_sparse),
    ("DeepseekV4ForCausalLM", "deepseek_v4", _deepseek_v4),
    ("Llama4ForConditionalGeneration", "llama4", _family(_llama4, fixed={"windows_free_kv": False}, head_dim=128)),
    ("Mistral3ForConditionalGeneration", "mistral3", _mistral3),
    ("MistralLarge3ForCausalLM", "", _mistral3),
    ("NemotronHForCausalLM", "nemotron_h", partial(_layered, gated_mlp=False)),
    ("NemotronHPuzzleForCausalLM", "", partial(_layered, gated_mlp=False)),
    ("Gemma4ForConditionalGeneration", "gemma4", _GEMMA_4),
    ("Gemma4ForCausalLM", "gemma4_text", _GEMMA_4),
    ("Gemma4UnifiedForConditionalGeneration", "gemma4_unified", _GEMMA_4),
    ("MiniMaxM3ForCausalLM", "minimax_m3", _layered),
    ("MiniMaxM3SparseForCausalLM", "", _layered),
    ("MiniMaxM3SparseForConditionalGeneration", "minimax_m3_vl", _layered),
    ("KimiK3ForConditionalGeneration", "kimi_k3", _layered),
    ("MiMoV2FlashForCausalLM", "mimo_v2_flash", _layered),
    ("MiMoV2ForCausalLM", "mimo_v2", _layered),
    ("MiMoV2OmniForConditionalGeneration", "", _layered),
    ("MiMoForCausalLM", "mimo", _layered),
    ("Step3p5ForCausalLM", "step3p5", _layered),
    ("Step3p7FlashForCausalLM", "step3p7", _layered),
    ("Step3p7ForConditionalGeneration", "", _layered),
    ("Glm4MoeLiteForCausalLM", "glm4_moe_lite", _deepseek),
    ("Glm4vMoeForConditionalGeneration", "glm4v_moe", partial(_layered, tied=False)),
    ("Glm4vForConditionalGeneration", "glm4v", _layered),
    ("Glm46VForConditionalGeneration", "glm46v", _layered),
    ("Glm4ForCausalLM", "glm4", _layered),
    ("GlmForCausalLM", "glm", _layered),
    ("GraniteForCausalLM", "granite", _layered),
    ("GraniteMoeForCausalLM", "granitemoe", _layered),
    ("GraniteMoeSharedForCausalLM", "granitemoeshared", _layered),
    ("GraniteMoeHybridForCausalLM", "granitemoehybrid", _layered),
    ("BambaForCausalLM", "bamba", _layered),
    ("Olmo2ForCausalLM", "olmo2", _layered),
    ("Olmo3ForCausalLM", "olmo3", _layered),
    ("OlmoeForCausalLM", "olmoe", _layered),
    ("FalconH1ForCausalLM", "falcon_h1", _layered),
    ("HunYuanDenseV1ForCausalLM", "hunyuan_v1_dense", _layered),
    ("HunYuanMoEV1ForCausalLM", "hunyuan_v1_moe", _layered),
    ("BailingMoeForCausalLM", "bailing_moe", _layered),
    ("BailingMoeV2ForCausalLM", "bailing_moe_v2", _layered),
    ("Ernie4_5ForCausalLM", "ernie4_5", partial(_layered, tied=True)),
    ("Ernie4_5_MoeForCausalLM", "ernie4_5_moe", partial(_layered, tied=True)),
    ("JambaForCausalLM", "jamba", _layered),
    ("SeedOssForCausalLM", "seed_oss", _layered),
    ("CohereForCausalLM", "cohere", partial(_layered, tied=True)),
    ("Cohere2ForCausalLM", "cohere2", partial(_layered, tied=True)),
    ("Cohere2VisionForConditionalGeneration", "cohere2_vision", partial(_layered, tied=True)),
    ("ExaoneForCausalLM", "exaone", _layered),
    ("Exaone4ForCausalLM", "exaone4", _layered),
    ("ExaoneMoEForCausalLM", "exaone_moe", _layered),
    ("SmolLM3ForCausalLM", "smollm3", partial(_layered, tied=True)),
    ("Lfm2ForCausalLM", "lfm2", partial(_layered, tied=True)),
    ("Lfm2MoeForCausalLM", "lfm2_moe", partial(_layered, tied=True)),
    ("LongcatFlashForCausalLM", "longcat_flash", partial(_layered, shape=_twice_in_a_layer)),
    ("Qwen3_5ForCausalLM", "qwen3_5_text", _qwen3_next),
    ("Qwen3_5MoeForCausalLM", "qwen3_5_moe_text", _qwen3_next),
    ("Qwen3OmniMoeForConditionalGeneration", "qwen3_omni_moe", _qwen3_vl),
    ("InternVLChatModel", "internvl_chat", _of_inner_model),
    ("InternVLForConditionalGeneration", "internvl", _of_inner_model),
    ("DeciLMForCausalLM", "nemotron-nas", _deci),
    ("ArceeForCausalLM", "arcee", partial(_layered, gated_mlp=False)),
    ("NemotronForCausalLM", "nemotron", partial(_layered, gated_mlp=False)),
    ("ApertusForCausalLM", "apertus", partial(_layered, gated_mlp=False)),
    ("Dots1ForCausalLM", "dots1", _layered),
    ("StableLmForCausalLM", "stablelm", _layered),
    ("InternLM3ForCausalLM", "internlm3", _layered),
    ("ExaoneMoeForCausalLM", "", _layered),
    ("FlexOlmoForCausalLM", "flex_olmo", _layered),
    ("Ministral3ForCausalLM", "ministral3", _layered),
    ("HYV3ForCausalLM", "hy_v3", _layered),
    ("SolarOpenForCausalLM", "solar_open", _layered),
    ("CwmForCausalLM", "cwm", _layered),
)
FAMILIES = {architecture: read for architecture, _, read in _TABLE}
MODEL_TYPES = {kind: architecture for architecture, kind, _ in _TABLE if kind}
# Architectures whose language model is described in ``text_config``. Kimi K2.5's vision tower is left out: it has less
# than a thousandth of the weights.
NESTED = {name for name in FAMILIES if name.endswith("ForConditionalGeneration")} | {"InternVLChatModel"}
_INNER = ("text_config", "llm_config", "thinker_config", "language_config")

# Architectures that are known, and what keeps the cost model from planning for them.
NOT_MODELLED: dict[str, str] = {
    "DeepseekV41ForCausalLM": "layers that share the compressed entries of others, and tables of n-grams (Engram)",
    "Phi3SmallForCausalLM": "block-sparse attention, where every head attends to blocks of its own",
    "Phi3VForCausalLM": "a vision tower that its config names but does not describe",
    "Phi4FlashForCausalLM": "layers that have a state space (Mamba), and layers that share the KV of another",
    "Phi4MultimodalForCausalLM": "towers for images and sound, with an adapter for each",
    "Phi4MMForCausalLM": "towers for images and sound, with an adapter for each",
}
