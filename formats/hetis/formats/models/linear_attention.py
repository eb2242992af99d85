"""Layers of linear attention in a ``config.json``: which they are, their matrices, and the state that each keeps.

States are as vLLM 0.32 keeps them (model_executor/layers/mamba/mamba_utils.py). FLOPs are those of the products in the
kernels for prompts, two for each multiplication, of whole tiles even where a mask hides half of one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from hetis.formats.errors import shown
from hetis.formats.models.config_json import NO_LINEAR_LAYERS, Config, LinearLayers
from hetis.solver.model import Recurrent

LinearLayer = tuple[Recurrent, dict[str, int]]  # and its matrices by their names in checkpoints
_KINDS = ("linear_attention", "full_attention")
_CHUNK = 64  # tokens that kernels of the delta rule compute at once (FLA_CHUNK_SIZE in vLLM and SGLang)
# Tokens whose keys a token meets directly in `lightning_attention` of vLLM (layers/lightning_attn.py): of its block of
# 256, the parts of 32 up to its own; 1 to 8 parts, and 4.5 in the mean.
_LIGHTNING_TOKENS = 144
_UNEVEN = 2  # excess layers of one kind in a run, from which the run is refused


def gated_delta_rule(config: Config, num_layers: int) -> LinearLayers:
    """Return the linear layers of Qwen3-Next: projections of q, k, v, gate, two scalars per head, and the output.

    The state is a matrix per value head in 32 bits, and the last inputs of the convolution in 16
    (``gated_delta_net_state_shape``).
    """
    every, is_linear = config.whole("full_attention_interval", 4), list[bool]()
    if (kinds := config.kinds_of_layers(num_layers, _KINDS)) is not None:
        is_linear = list(map(_is_linear, kinds))
    else:
        is_linear = [layer % every != every - 1 for layer in range(num_layers)]
    numbers = spread(config, "layer_types", is_linear)
    heads, key_dim = config.whole("linear_num_value_heads", 32), config.whole("linear_key_head_dim", 128)
    value_dim, kernel = config.whole("linear_value_head_dim", 128), config.whole("linear_conv_kernel_dim", 4)
    keys, values = config.whole("linear_num_key_heads", 16) * key_dim, heads * value_dim
    hidden, channels = config.whole("hidden_size"), 2 * keys + values
    widths = {"in_proj_qkv": channels, "in_proj_z": values, "in_proj_a": heads, "in_proj_b": heads, "out_proj": values}
    one = Recurrent(
        weights=hidden * sum(widths.values()) + channels * kernel,
        request_bytes=4.0 * values * key_dim + 2.0 * channels * (kernel - 1),
        flops=float(heads * _delta_rule_flops(key_dim, value_dim)),
        heads=heads,
    )
    return _layers(numbers, one, {f"linear_attn.{name}": hidden * width for name, width in widths.items()})


def kimi_delta_attention(config: Config, num_layers: int) -> LinearLayers:
    """Return the linear layers of Kimi Linear: a delta rule with a decay of its own for every channel of a key.

    Beside q, k, v and the output, a scalar per head, and a forget and an output gate of low rank have projections
    (``KimiGatedDeltaNetAttention`` of vLLM). The state is a matrix per head in 32 bits, and the last inputs of the
    convolutions of q, k and v in 16 (``kda_state_shape``, ``kda_state_dtype``). `chunk_kda` has the products of the
    gated delta rule; its finer decay multiplies the factors element by element.
    """
    own = config.inner("linear_attn_config")
    numbers = _kimi_layers(config, own, num_layers)
    if own is None:  # as transformers names them
        heads, size = config.whole("linear_num_heads", 32), config.whole("linear_head_dim", 128)
        kernel = config.whole("linear_conv_kernel_dim", 4)
    else:
        heads, size, kernel = own.whole("num_heads"), own.whole("head_dim"), own.whole("short_conv_kernel_size", 4)
        if own.data.get("use_full_rank_gate"):
            own.refuse("use_full_rank_gate", "is set, only an output gate of low rank is modelled")
    if heads % (q_heads := config.whole("num_attention_heads")):
        what = f"{heads} heads of linear attention must be a multiple of num_attention_heads ({q_heads}), because "
        config.refuse("linear_attn_config", f"{what}ranks of tensor parallelism divide both")
    return _layers(numbers, *delta_attention(config.whole("hidden_size"), heads, size, kernel))


def delta_attention(hidden: int, heads: int, size: int, kernel: int, low_rank: str = "fg") -> LinearLayer:
    """Return a layer of `kimi_delta_attention`, whose gates are of ``low_rank`` or else of full rank."""
    width = heads * size
    matrices = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), hidden * width) | {"b_proj": hidden * heads}
    for gate in "fg":
        low = {f"{gate}_a_proj": hidden * size, f"{gate}_b_proj": size * width}
        matrices |= low if gate in low_rank else {f"{gate}_proj": hidden * width}
    one = Recurrent(
        weights=sum(matrices.values()) + 3 * width * kernel,
        request_bytes=4.0 * width * size + 2.0 * 3 * width * (kernel - 1),
        flops=float(heads * _delta_rule_flops(size, size)),
        heads=heads,
    )
    return one, {f"self_attn.{name}": params for name, params in matrices.items()}


def lightning_attention(config: Config, num_layers: int) -> LinearLayers:
    """Return the linear layers of MiniMax-Text-01: projections of q, k, v together, the output and its gate.

    The state is a matrix per query head in 16 bits (``linear_attention_state_shape`` and ``.._dtype``). A token's query
    meets the keys of its block and the state before it; its key and value are added to the state.
    """
    if config.data.get("layer_types") is not None:  # as transformers names them
        kinds = config.kinds_of_layers(num_layers, _KINDS) or []
        numbers = spread(config, "layer_types", map(_is_linear, kinds))
        stated = _minimax_kinds(config, num_layers) if config.data.get("attn_type_list") is not None else ()
        pairs = enumerate(zip(kinds, stated, strict=False))  # either is empty if it was refused
        if differing := [layer for layer, (kind, number) in pairs if _is_linear(kind) != (number == 0)]:
            config.refuse_contradiction("attn_type_list", differing[0])
    else:
        numbers = spread(config, "attn_type_list", (kind == 0 for kind in _minimax_kinds(config, num_layers)))
    hidden, heads = config.whole("hidden_size"), config.whole("num_attention_heads")
    size = config.whole("head_dim", max(1, hidden // heads))
    names = ("self_attn.qkv_proj", "self_attn.output_gate", "self_attn.out_proj")
    return _layers(numbers, *lightning_layer(hidden, heads, size, names))


def lightning_layer(hidden: int, heads: int, size: int, names: tuple[str, str, str]) -> LinearLayer:
    """Return a layer of `lightning_attention`, by the names of its matrices: q, k, v together, gate and output."""
    matrix = hidden * heads * size
    one = Recurrent(
        weights=5 * matrix,
        request_bytes=2.0 * heads * size * size,
        flops=float(heads * (4 * size * size + 2 * _LIGHTNING_TOKENS * 2 * size)),
        heads=heads,
    )
    return one, dict(zip(names, (3 * matrix, matrix, matrix), strict=True))


def _layers(numbers: tuple[int, ...], one: Recurrent, matrices: dict[str, int]) -> LinearLayers:
    shape = {"params": one.weights, "state_bytes": one.request_bytes, "token_flops": one.flops}
    return LinearLayers(numbers, matrices, {"layers": len(numbers), **shape}) if numbers else NO_LINEAR_LAYERS


def _delta_rule_flops(key_dim: int, value_dim: int) -> int:
    """Return the FLOPs of a delta rule for one token in one head: three products with the state, and five in a chunk.

    Queries and keys meet the keys of the chunk, whose inverse makes keys and values ready for the state; then scores
    meet values (`chunk_gated_delta_rule`, `chunk_kda` in vllm/third_party/flash_linear_attention).
    """
    return 6 * key_dim * value_dim + 2 * _CHUNK * (3 * key_dim + 2 * value_dim)


def _is_linear(kind: Any) -> bool:
    return bool(kind == "linear_attention")


def _kimi_layers(config: Config, own: Config | None, num_layers: int) -> tuple[int, ...]:
    """Return the layers of Kimi delta attention. Transformers states a kind for each, Moonshot numbers from 1."""
    if not config.has_num_layers:
        return ()
    kinds, numbered = config.kinds_of_layers(num_layers, _KINDS), _numbered_layers(own, num_layers)
    if config.data.get("layer_types") is None:
        if config.data.get("linear_attn_config") is None:
            config.refuse_all("linear_attn_config is missing, and layer_types, too")
        if own is not None and numbered is None:
            lists = f"lists that have each layer from 1 to {num_layers} once"
            own.refuse_all(f"kda_layers and full_attn_layers must be {lists}")
        return spread(config, "linear_attn_config", numbered or ())
    is_linear = list(map(_is_linear, kinds or ()))
    if differing := [i for i, pair in enumerate(zip(is_linear, numbered or (), strict=False)) if pair[0] != pair[1]]:
        of_layer = "full_attn_layers" if is_linear[differing[0]] else "kda_layers"
        what = f"differs from linear_attn_config: layer {differing[0]}, there {differing[0] + 1}, is in its {of_layer}"
        config.refuse("layer_types", what)
        return ()
    return spread(config, "layer_types", is_linear)


def _numbered_layers(own: Config | None, num_layers: int) -> list[bool] | None:
    """Return whether each layer is linear by Kimi's lists, or None if these do not have every layer once."""
    linear, full = (None if own is None else own.data.get(name) for name in ("kda_layers", "full_attn_layers"))
    both = [*linear, *full] if isinstance(linear, list) and isinstance(full, list) else []
    is_whole = len(both) == num_layers and all(type(number) is int for number in both)
    if not is_whole or sorted(both) != list(range(1, num_layers + 1)):
        return None
    assert isinstance(linear, list), "checked above"
    of_linear = frozenset(linear)
    return [number in of_linear for number in range(1, num_layers + 1)]


def _minimax_kinds(config: Config, num_layers: int) -> list[Any]:
    """Return ``attn_type_list``: 0 for layers of lightning attention, 1 for softmax."""
    kinds = config.for_layers("attn_type_list", num_layers)
    if kinds is None:
        if config.data.get("attn_type_list") is None:
            config.refuse_all("attn_type_list is missing, and layer_types, too")
        return []
    unknown = [kind for kind in kinds if type(kind) is not int or kind not in (0, 1)]
    if unknown:
        config.refuse("attn_type_list", f"has {shown(unknown[0])}, must have 0 (linear) or 1 (softmax) for each layer")
    return [] if unknown else kinds


def spread(config: Config, field: str, is_kind: Iterable[bool], kind: str = "linear attention") -> tuple[int, ...]:
    """Return the numbers of the layers of a kind. It is a problem of ``field`` if they are not spread evenly.

    The cost model charges a stage the mean of all layers, so every run of layers must have about its share of them.
    """
    flags = list(is_kind)
    numbers, total = tuple(layer for layer, flag in enumerate(flags) if flag), len(flags)
    # Running excess over the kind's share, scaled by the number of layers.
    excess = list(itertools.accumulate((total * flag - len(numbers) for flag in flags), initial=0))
    if max(excess) - min(excess) >= _UNEVEN * max(1, total):
        first, end = sorted((excess.index(max(excess)), excess.index(min(excess))))
        share = len(numbers) * (end - first) / total
        what = f"has {sum(flags[first:end])} layers of {kind} in layers {first} to {end - 1}, not about "
        reason = "a stage is charged the mean of all layers, so each kind must be spread evenly"
        config.refuse(field, f"{what}{share:.1f}, their share of {len(numbers)} in {total}: {reason}")
    return numbers
