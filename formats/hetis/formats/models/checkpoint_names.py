"""The matrices of a model's layers, by the names that checkpoints give them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from hetis.formats.models.config_json import LinearLayers
from hetis.solver.model import Compressed, Dense, Experts, Grouped, Latent, Mixer, Mlp, ModelSpec

# Matrices of linear attention that Qwen3-Next joins into one.
_JOINED = {
    "linear_attn.in_proj_qkv": "linear_attn.in_proj_qkvz",
    "linear_attn.in_proj_z": "linear_attn.in_proj_qkvz",
    "linear_attn.in_proj_a": "linear_attn.in_proj_ba",
    "linear_attn.in_proj_b": "linear_attn.in_proj_ba",
}


# What OPT, Phi and Qwen 1 call matrices, by their usual names; Phi-3 and Qwen 1 join some into one.
_OTHER_NAMES = {
    "q_proj": ("attn.c_attn", "self_attn.qkv_proj"),
    "k_proj": ("attn.c_attn", "self_attn.qkv_proj"),
    "v_proj": ("attn.c_attn", "self_attn.qkv_proj"),
    "o_proj": ("self_attn.out_proj", "self_attn.dense", "attn.c_proj"),
    "gate_proj": ("mlp.w2", "mlp.gate_up_proj"),
    "up_proj": ("fc1", "mlp.fc1", "mlp.w1", "mlp.gate_up_proj"),
    "down_proj": ("fc2", "mlp.fc2", "mlp.c_proj"),
}


# Parents of shared experts, of routed ones, and the names of a routed expert's matrices, in all families.
_SHARED = (
    *("mlp.shared_expert", "mlp.shared_experts", "feed_forward.shared_expert", "block_sparse_moe.shared_experts"),
    "ffn.shared_experts",  # as DeepSeek's own checkpoints name them
)


_EXPERTS = ("mlp.experts", "feed_forward.experts", "block_sparse_moe.experts", "ffn.experts")


_EXPERTS_BESIDE = ("experts", "moe.experts")


_OF_MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


class Module(NamedTuple):
    """A matrix of every layer of its kind: its possible names in the layer, its parameters, the numbers of the layers
    that may have it, and how many of these do.

    All matrices of shared experts are one module, as they are quantised alike; so is a matrix of all routed experts, or
    all of their matrices.
    """

    names: tuple[str, ...]
    params: float
    layers: Sequence[int]
    num_layers: int
    is_routed: bool = False
    repeated: float | None = None  # layers over whose parameters the model's mean goes; None: all
    size: float | None = None  # bytes per parameter, whatever the checkpoint states; None: it decides


def modules(model: ModelSpec, linear: LinearLayers) -> Iterator[Module]:
    """Yield the matrices of attention, and of shared experts and dense MLPs."""
    for name, params in linear.matrices.items():
        yield Module((name, _JOINED.get(name, name)), params, linear.numbers, len(linear.numbers))
    for mixer, layers in _places_of_attention(model, linear):
        match mixer:
            case Compressed():
                yield from _compressed_modules(model, mixer, layers)
            case Latent():
                yield from _named(_latent_matrices(mixer, model.hidden), layers)
            case Grouped():
                yield from _named(_grouped_matrices(mixer, model.hidden), layers)
    if mixing := model.mixing_params():
        yield Module(("attn_hc",), mixing, range(model.num_layers), model.num_layers, size=4.0)
    for mlp, layers in _places_of_mlps(model):
        if isinstance(mlp, Dense):
            yield from _dense_modules(model, mlp, layers)
        elif isinstance(mlp, Experts) and mlp.shared_width:
            names = tuple(f"{parent}.up_proj" for parent in _SHARED)
            yield _of_mlp(model, names, float(mlp.shared_params(model.hidden)), layers)
        if isinstance(mlp, Experts) and mlp.latent is not None:
            for own in ("fc1_latent_proj", "fc2_latent_proj"):
                names = (f"mixer.{own}", f"mlp.{own}", f"block_sparse_moe.{own}")
                yield _of_mlp(model, names, float(model.hidden * mlp.latent), layers)


def _places_of_attention(model: ModelSpec, linear: LinearLayers) -> Iterator[tuple[Mixer, Sequence[int]]]:
    """Yield every kind of attention that keeps KV, and its layers in the checkpoint."""
    kinds = [(mixer, count) for mixer, count in model.mixers if mixer.groups]
    others = [layer for layer in range(model.num_layers) if layer not in frozenset(linear.numbers)]
    if linear.numbers and len(kinds) == 1 and kinds[0][1] == len(others):
        yield kinds[0][0], others
        return
    for mixer, _ in kinds:
        yield mixer, [number for number, layer in enumerate(model.layers) if mixer in layer.mixers]


def _places_of_mlps(model: ModelSpec) -> Iterator[tuple[Mlp, Sequence[int]]]:
    """Yield every kind of MLP, and its layers; those of leading layers are left out, as they are of the mean."""
    for mlp, _ in model.mlps:
        yield mlp, [n for n in range(model.prefix_layers, model.num_layers) if mlp in model.layers[n].mlps]


def _of_mlp(model: ModelSpec, names: tuple[str, ...], params: float, layers: Sequence[int]) -> Module:
    return Module(names, params, layers, len(layers), repeated=model.num_layers - model.prefix_layers)


def _named(matrices: Mapping[str, int], layers: Sequence[int]) -> Iterator[Module]:
    for name, params in matrices.items():
        yield Module((f"self_attn.{name}", f"mixer.{name}", *_OTHER_NAMES.get(name, ())), params, layers, len(layers))


def _dense_modules(model: ModelSpec, mlp: Dense, layers: Sequence[int]) -> Iterator[Module]:
    """Yield the matrices of a dense MLP in these layers."""
    for name in ("gate_proj", "up_proj", "down_proj") if mlp.gated else ("up_proj", "down_proj"):
        names = (f"mlp.{name}", f"feed_forward.{name}", f"mixer.{name}", *_OTHER_NAMES[name])
        yield _of_mlp(model, names, float(model.hidden * mlp.width), layers)


def _compressed_modules(model: ModelSpec, shape: Compressed, layers: Sequence[int]) -> Iterator[Module]:
    """Yield the matrices of compressed attention, by the names in transformers and in DeepSeek's checkpoints.

    Compressors and the weights of an indexer's heads have 16 bits, and what mixes streams of the residual 32: vLLM 0.32
    builds them without a quantisation (models/deepseek_v4/compressor.py, attention.py and nvidia/model.py).
    """
    hidden, size, rank = model.hidden, shape.head_dim, shape.q_lora_rank
    width, every, number = shape.query_heads * size, range(model.num_layers), len(layers)
    names = {
        ("q_a_proj", "wq_a"): hidden * rank,
        ("q_b_proj", "wq_b"): rank * width,
        ("kv_proj", "wkv"): hidden * size,
        ("o_a_proj", "wo_a"): width * shape.o_lora_rank,
        ("o_b_proj", "wo_b"): shape.o_groups * shape.o_lora_rank * hidden,
    }
    for (name, own), params in names.items():
        yield Module((f"self_attn.{name}", f"attn.{own}"), params, every, number)
    compressor = ("self_attn.compressor",)
    if (index := shape.indexer) is not None:
        indexer = ("self_attn.compressor.indexer.q_b_proj", "attn.indexer.wq_b")
        yield Module(indexer, rank * index.heads * index.head_dim, every, number)
        sparse = 4 * hidden * (size + index.head_dim) + hidden * index.heads
        yield Module(compressor, sparse, every, number, size=2.0)
    elif shape.ratio is not None:
        yield Module(compressor, 2 * hidden * size, every, number, size=2.0)


def routed_experts(model: ModelSpec) -> Iterator[Module]:
    """Yield the matrices of routed experts, named as the first expert's; families differ in the names."""
    for mlp, layers in _places_of_mlps(model):
        if not isinstance(mlp, Experts):
            continue
        matrix = float(mlp.count * mlp.size(model.hidden) * mlp.width)
        places = _places_of_experts(model, layers)
        for name in _OF_MIXTRAL if mlp.gated else ("up_proj", "down_proj"):
            names = tuple(f"{place}.0.{own}" for place in places for own in (name, _OF_MIXTRAL[name]))
            yield _of_mlp(model, names, matrix, layers)._replace(is_routed=True)


def whole_experts(model: ModelSpec) -> Iterator[Module]:
    """Yield all matrices of routed experts as one module, which engines quantise alike or not at all (RoutedExperts in
    vLLM 0.32).

    It has the names of its parent and of one matrix, which no expression for a router matches (``gate``).
    """
    num_matrices = 2 if model.experts is None else model.experts.matrices
    for module in routed_experts(model):
        if module.names[0].endswith("up_proj"):
            places = _places_of_experts(model, module.layers)
            yield module._replace(names=(*places, *module.names), params=num_matrices * module.params)


def _places_of_experts(model: ModelSpec, layers: Sequence[int]) -> tuple[str, ...]:
    """Return the parents of routed experts, which are none of the MLP's where layers have one beside them (Gemma 4)."""
    dense = max((sum(isinstance(one, Dense) for one in model.layers[n].mlps) for n in layers), default=0)
    return _EXPERTS_BESIDE if dense == 1 else _EXPERTS


def _grouped_matrices(shape: Grouped, hidden: int) -> dict[str, int]:
    found = {"q_proj": hidden * shape.query_heads * (shape.head_dim + (shape.values if shape.gated else 0))}
    if shape.has_own_kv:
        found["k_proj"] = hidden * shape.kv_heads * shape.head_dim
        found |= {} if shape.key_is_value else {"v_proj": hidden * shape.kv_heads * shape.values}
    return found | {"o_proj": hidden * shape.query_heads * shape.values}


def _latent_matrices(shape: Latent, hidden: int) -> dict[str, int]:
    queries = shape.query_heads
    size, rank = queries * shape.key_dim, shape.q_lora_rank
    found = {"q_proj": hidden * size} if rank is None else {"q_a_proj": hidden * rank, "q_b_proj": rank * size}
    found["kv_a_proj_with_mqa"] = hidden * (shape.kv_lora_rank + shape.qk_rope_head_dim)
    found["kv_b_proj"] = shape.kv_lora_rank * queries * (shape.qk_nope_head_dim + shape.v_head_dim)
    found |= {"g_proj": queries * shape.v_head_dim * hidden} if shape.gated else {}
    return found | {"o_proj": queries * shape.v_head_dim * hidden}
