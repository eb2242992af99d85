"""What readers of families of Hugging Face models have in common: usual fields, windows, experts, vision towers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

from hetis.formats.errors import Problem
from hetis.formats.layers import Shape, model_in_short
from hetis.formats.models.config_json import Config
from hetis.solver.errors import InvalidProblemError
from hetis.solver.model import ModelSpec

T = TypeVar("T")


Family = Callable[[Config, str], ModelSpec | None]


Part = Callable[[Config, dict[str, Any]], dict[str, Any]]
"""Reads some fields of a model. Gets those read before, and returns what is added to them or in place of them."""


def spec_of(config: Config, **fields: Any) -> ModelSpec | None:
    """Return the model of fields that describe it in short, or None if they were wrong."""
    if fields["q_heads"] % fields["kv_heads"]:
        heads = f"num_attention_heads ({fields['q_heads']}) must be a multiple of the KV heads ({fields['kv_heads']})"
        config.problems.append(config.source.problem(config.at, heads))
    if config.problems:
        return None
    if fields.get("sliding_layers") == 0:  # all layers attend to everything
        fields |= {"sliding_window": None, "sliding_layers": None}
    return made_of(config, partial(model_in_short, **fields))


def made_of(config: Config, make: Callable[[], T]) -> T | None:
    """Return the model that ``make`` returns, or None after noting what it raises."""
    try:
        return make()
    except InvalidProblemError as error:
        config.problems.append(Problem(file=config.source.file, message=str(error)))
        return None


_HEAD_DIMS = ("head_dim", "kv_channels", "kv_lora_rank")  # fields that make the size of a head another one


def common_fields(
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


def family_of(*parts: Part, fixed: Mapping[str, Any] | None = None, **options: Any) -> Family:
    """Return the reader of a family: `common_fields` with ``options``, ``fixed`` values, and what each part reads."""

    def read(config: Config, name: str) -> ModelSpec | None:
        fields = common_fields(config, name, **options) | dict(fixed or {})
        for part in parts:
            fields |= part(config, fields)
        return spec_of(config, **fields)

    return read


def window_in_all(config: Config, _fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"sliding_window": config.optional("sliding_window")}


def default_width(moe: Shape | None) -> dict[str, int]:
    """Return the default width of a dense MLP, which no layer has where all have experts."""
    return {} if moe is None else {"intermediate_size": moe["expert_intermediate"]}


def leading_dense_layers(config: Config, num_layers: int) -> int:
    """Return how many layers precede those with experts. Transformers writes the kind of every layer's MLP."""
    kinds = config.for_layers("mlp_layer_types", num_layers)
    if kinds is None:
        return config.whole("first_k_dense_replace", least=0)
    dense = kinds.count("dense")
    if kinds != ["dense"] * dense + ["sparse"] * (num_layers - dense):
        config.refuse("mlp_layer_types", "must have 'dense' for the first layers only, and 'sparse' for all others")
    return dense


def same_experts(
    config: Config, fields: Mapping[str, Any], num: int | None = None, active: int | None = None, **more: int
) -> dict[str, Any]:  # fmt: skip
    """Return the experts of Mixtral and those that name them alike, of the stated width in every layer; the last two
    numbers are defaults.
    """
    numbers = config.experts("num_local_experts", "num_experts_per_tok", (num, active))
    return {"moe": dict(**numbers, expert_intermediate=fields["intermediate"], **more)}


# --- vision towers


def vision_params(config: Config, *, projection: int) -> int:
    """Return the parameters of the vision tower that a ``vision_config`` describes, or 0 without one."""
    vision = config.part("vision_config")
    return 0 if vision is None else tower_params(vision, projection=projection, gated=False)


def tower_params(vision: Config, *, projection: int, gated: bool) -> int:
    """Return the parameters of a vision tower: patches, transformer layers, and the projection to the text model.

    Args:
        vision: describes the tower.
        projection: parameters of a linear projection per unit of the tower's width, if the config states no other.
        gated: the tower's MLP has three matrices.
    """
    hidden = vision.whole("hidden_size")
    layers = vision.whole("depth" if "depth" in vision.data else "num_hidden_layers")
    heads = vision.whole("num_attention_heads", vision.whole("num_heads", 1))
    size = vision.whole("head_dim", max(1, hidden // heads))
    attention = 2 * hidden * size * (heads + min(heads, vision.whole("num_key_value_heads", heads)))
    layer = attention + (3 if gated else 2) * hidden * vision.whole("intermediate_size")
    channels = vision.whole("in_channels", vision.whole("in_chans", vision.whole("num_channels", 3)))
    pixels = channels * vision.whole("patch_size", 14) ** 2
    patches = pixels * vision.whole("temporal_patch_size", 1) * hidden
    if "max_image_size" in vision.data:  # Hunyuan's table of positions
        patches += (vision.whole("max_image_size") // vision.whole("patch_size", 14)) ** 2 * hidden
    if "out_hidden_size" in vision.data:  # Qwen: patches are merged, with an MLP of their joint width
        merged = hidden * vision.whole("spatial_merge_size", 2) ** 2
        deepstack = vision.data.get("deepstack_visual_indexes")
        mergers = 1 + (len(deepstack) if isinstance(deepstack, list) else 0)
        return layers * layer + patches + mergers * merged * (merged + vision.whole("out_hidden_size"))
    if "spatial_merge_size" in vision.data and projection:  # patches are merged without a size of their own
        merged = hidden * vision.whole("spatial_merge_size") ** 2
        return layers * layer + patches + merged * (merged + projection)
    return layers * layer + patches + hidden * projection


def towers_of_any_kind(config: Config, hidden: int) -> int:
    """Return the parameters of the towers for images and sound that a config describes, and note which it does not."""
    parts = {name: config.part(name) for name in ("vision_config", "vit_config", "audio_config")}
    found = {name: _tower_of_any_kind(part, hidden) for name, part in parts.items() if part is not None and part.data}
    unread = (f"{name} has no sizes of known names: its tower counts as none" for name in found if not found[name])
    config.notes += [note for note in unread if note not in config.notes]
    return sum(found.values())


def _tower_of_any_kind(vision: Config, hidden: int) -> int:
    """Return the parameters of a tower by the usual names of its fields; 0 if it has others."""
    own = Config(_OF_LIBRARY.get(str(vision.data.get("model_type")), {}) | vision.data, vision.source)
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
    params = (
        _glm_tower(own)
        if str(own.data.get("model_type")).startswith("glm") and "out_hidden_size" in own.data
        else tower_params(own, projection=hidden, gated=_is_gated(own))
    )
    return 0 if own.problems else params


def _is_gated(vision: Config) -> bool:
    """Return whether the MLPs of a tower have three matrices, as all with SwiGLU have, and Pixtral's with any."""
    return vision.data.get("model_type") == "pixtral" or vision.data.get("hidden_act") in ("silu", "swiglu")


def _glm_tower(vision: Config) -> int:
    """Return the parameters of GLM-4.5V's tower, whose gated MLPs have the width of its output; ``intermediate_size``
    is that of the MLP that merges patches (transformers, ``Glm4vVisionBlock`` and ``Glm4vVisionPatchMerger``).
    """
    hidden, out = vision.whole("hidden_size"), vision.whole("out_hidden_size")
    layers, width = vision.whole("num_hidden_layers", vision.whole("depth", 24)), vision.whole("intermediate_size")
    inner, merged = (out, width)
    if vision.data["model_type"] == "glm_ocr_vision":  # `GlmOcrVisionModel`: the usual width, and a merger of its own
        inner, merged = width, out * vision.whole("in_channels", 3)
    merger = out * out + 3 * out * merged + hidden * out * vision.whole("spatial_merge_size", 2) ** 2
    patches = 3 * vision.whole("patch_size", 14) ** 2 * vision.whole("temporal_patch_size", 2) * hidden
    return layers * (4 * hidden * hidden + 3 * hidden * inner) + merger + patches


# Sizes of towers that configs leave to transformers.
_OF_LIBRARY = {
    "pixtral": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
}
_TOWER_NAMES = {
    "patch_size": ("image_patch_size",),
    "hidden_size": ("vt_hidden_size", "width", "embed_dim", "d_model"),
    "num_hidden_layers": ("depth", "vt_num_hidden_layers", "layers", "num_layers", "encoder_layers"),
    "intermediate_size": ("vt_intermediate_size", "encoder_ffn_dim", "mlp_dim"),
}
