"""Families whose layers are of unlike kinds or shapes, and architectures without a reader of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from hetis.formats.fields import mapping
from hetis.formats.models.common import made_of, towers_of_any_kind
from hetis.formats.models.config_json import MAX_LAYERS, Config
from hetis.formats.models.layer_kinds import basic_names, in_usual_names, named, number, stated_layers
from hetis.formats.models.layered import Shapes, dense_width, read_layers
from hetis.solver.model import Dense, Grouped, Layer, Mixer, Mlp, ModelSpec


def unknown(config: Config, name: str) -> ModelSpec | None:
    """Read an architecture without a row in the table, by fields that are all of known kinds."""
    config.notes.append(
        f"{name}: its architecture is not known; it is read as a decoder whose fields mean what they mean in others: "
        "check its parameters, and how its engine keeps KV"
    )
    gated = config.flag("attn_output_gate", False)
    return by_layers(config, name, gated_mlp=activation(config) in GATED, gated_attention=gated)


def activation(config: Config) -> str:
    names = ("hidden_act", "hidden_activation", "activation_function")
    return str(next((config.data[name] for name in names if config.data.get(name)), "silu"))


# Activations of MLPs with three matrices, and with two; families use others, such as gelu, for either.
GATED, UNGATED = {"silu", "swish", "swiglu", "swigluoai", "situ"}, {"relu", "relu2", "relu^2"}


def by_layers(
    config: Config, name: str, *, tied: bool = False, shape: Callable[[Config, Shapes], Shapes] | None = None,
    fixed: Mapping[str, Any] | None = None, inner: Sequence[str] = (), usual: Mapping[str, Any] | None = None,
    **kinds: bool,
) -> ModelSpec | None:  # fmt: skip
    """Read a model whose fields name the kind of every layer (`hetis.formats.models.layered`).

    ``shape`` changes the layers; ``fixed`` are further fields of the model, ``tied`` its library's default for tied
    embeddings, and ``kinds`` the options of `read_layers`. ``inner`` are mappings with further fields, and ``usual``
    those that configs may omit.
    """
    for part in filter(None, map(config.inner, inner)):
        config.data = config.data | part.data
    omitted = {name: one for name, one in (usual or {}).items() if config.data.get(name) is None}
    config.written = basic_names(config.data)
    config.data = in_usual_names(config.data | omitted)
    num_layers = number(config, "num_hidden_layers", stated_layers(config))
    if num_layers > MAX_LAYERS:
        config.refuse("num_hidden_layers", f"is {num_layers}, must be a whole number from 1 to {MAX_LAYERS}")
        return None
    hidden, vocab, _ = (config.whole(name) for name in ("hidden_size", "vocab_size", "num_attention_heads"))
    if config.problems and config.data.get(named(config, "num_experts")) is None:
        dense_width(config)  # reported together with what else is missing
    shapes = None if config.problems else made_of(config, partial(read_layers, config, num_layers, **kinds))
    if shapes is None or config.problems:
        return None
    shapes = shapes if shape is None else shape(config, shapes)
    fields: dict[str, Any] = {
        "name": name,
        "layers": shapes.layers,
        "hidden": hidden,
        "vocab": vocab,
        "max_position": number(config, "max_position_embeddings", 2048),
        "tie_embeddings": config.flag(named(config, "tie_word_embeddings"), tied),
        "vision_params": shapes.beside_params + towers_of_any_kind(config, hidden),
    }
    return made_of(config, partial(ModelSpec, **fields | dict(fixed or {})))


def deci(config: Config, name: str) -> ModelSpec | None:
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

    return None if config.problems else made_of(config, read)


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


def twice_in_a_layer(config: Config, shapes: Shapes) -> Shapes:
    """Return LongCat's layers: attention and a dense MLP twice in each, and experts beside both."""
    dense = Dense(width=dense_width(config))
    layers = (replace(one, mixers=one.mixers * 2, mlps=(dense, dense, *one.mlps)) for one in shapes.layers)
    return replace(shapes, layers=tuple(layers))
