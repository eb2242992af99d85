"""Qwen: its generations, with vision towers, and with linear attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hetis.formats.layers import Shape
from hetis.formats.models.common import common_fields, default_width, spec_of, tower_params, vision_params
from hetis.formats.models.config_json import Config
from hetis.formats.models.linear_attention import gated_delta_rule
from hetis.solver.model import ModelSpec


def qwen_window(config: Config, fields: Mapping[str, Any]) -> dict[str, Any]:
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


def qwen1(config: Config, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Read Qwen 1: MHA, whose ``intermediate_size`` counts gate and up together; each MLP matrix is half as wide."""
    return {
        "intermediate": fields["intermediate"] // 2,
        "head_dim": config.whole("kv_channels", fields["head_dim"]),
        "max_position": config.whole("seq_length", config.whole("max_position_embeddings", 8192)),
    }


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


def qwen2_vl(config: Config, name: str, *, gated: bool) -> ModelSpec | None:
    """Read Qwen2-VL, and 2.5-VL, whose tower has gated MLPs: Qwen2 with a vision tower.

    In Qwen2-VL ``hidden_size`` is the width of the tower's output, and ``embed_dim`` its own.
    """
    common = common_fields(config, name, defaults=_QWEN2_VL)
    if qwen_window(config, common):
        config.refuse("use_sliding_window", "is true, only models without sliding windows are supported")
    vision = config.part("vision_config")
    if vision is not None and gated:
        vision.data = _QWEN25_VL_TOWER | vision.data
    elif vision is not None:
        width = vision.whole("embed_dim", 1280)
        tower = {"hidden_size": width, "intermediate_size": width * vision.whole_ratio("mlp_ratio", 4)}
        tower["out_hidden_size"] = vision.whole("hidden_size", 3584)
        vision.data = _QWEN2_VL_TOWER | vision.data | tower
    towers = 0 if vision is None else tower_params(vision, projection=0, gated=gated)
    return spec_of(config, **common, vision_params=towers)


def qwen3_next(config: Config, name: str) -> ModelSpec | None:
    """Read Qwen3-Next and Qwen3.5: gated attention in every fourth layer, gated delta rules in the others."""
    moe = _qwen_experts(config) if config.experts_name("num_experts") in config.data else None
    common = common_fields(config, name, head_dim=256, defaults=default_width(moe))
    config.linear = gated_delta_rule(config, common["num_layers"])
    return spec_of(
        config,
        **common,
        moe=moe,
        linear=config.linear.shape,
        gated_attention=config.flag("attn_output_gate", True),
        vision_params=vision_params(config, projection=0),
    )
