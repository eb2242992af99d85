"""Parameters of vision towers in a ``config.json``."""

from __future__ import annotations

from hetis.formats.models.config_json import Config


def vision_params(config: Config, *, projection: int, gated: bool = False) -> int:
    """Return the parameters of the vision tower that a ``vision_config`` describes; without one there are none.

    The other arguments are those of `tower_params`.
    """
    vision = config.part("vision_config")
    return 0 if vision is None else tower_params(vision, projection=projection, gated=gated)


def tower_params(vision: Config, *, projection: int, gated: bool) -> int:
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


def tower_of_any_kind(vision: Config, hidden: int) -> int:
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
    params = (
        _glm_tower(own)
        if str(own.data.get("model_type")).startswith("glm")
        else tower_params(own, projection=hidden, gated=False)
    )
    return 0 if own.problems else params


def _glm_tower(vision: Config) -> int:
    """Return the parameters of GLM-4.5V's tower, whose gated MLPs have the width of its output; ``intermediate_size``
    is that of the MLP that merges patches (transformers, ``Glm4vVisionBlock`` and ``Glm4vVisionPatchMerger``).
    """
    hidden, out = vision.whole("hidden_size"), vision.whole("out_hidden_size")
    layers = vision.whole("num_hidden_layers", vision.whole("depth", 24))
    merger = (
        out * out
        + 3 * out * vision.whole("intermediate_size")
        + hidden * out * vision.whole("spatial_merge_size", 2) ** 2
    )
    patches = 3 * vision.whole("patch_size", 14) ** 2 * vision.whole("temporal_patch_size", 2) * hidden
    return layers * (4 * hidden * hidden + 3 * hidden * out) + merger + patches


_TOWER_NAMES = {
    "hidden_size": ("vt_hidden_size", "width", "embed_dim"),
    "num_hidden_layers": ("depth", "vt_num_hidden_layers", "layers", "num_layers"),
    "intermediate_size": ("vt_intermediate_size",),
}
