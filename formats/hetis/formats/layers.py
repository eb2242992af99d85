"""The layers of a model in short: numbers and shapes of the usual kinds, as in files of models and in the catalogue."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from hetis.solver.errors import InvalidProblemError
from hetis.solver.model import (
    Compressed,
    Dense,
    Experts,
    Grouped,
    Indexer,
    Latent,
    Layer,
    Mixer,
    Mlp,
    ModelSpec,
    Recurrent,
)  # fmt: skip

Shape = Mapping[str, Any]
"""The fields of one of the shapes in a file of a model, such as ``mla``; see `hetis.formats.models.layer_parts`."""
_OF_LATENT = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "q_lora_rank")
_OF_COMPRESSED = ("window", "rope_head_dim", "q_lora_rank", "o_groups", "o_lora_rank")
_OF_INDEXER = ("top_tokens", "heads", "head_dim", "key_bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayersInShort:
    """The layers of a model in numbers and shapes. Kinds of which only numbers are known are spread evenly."""

    num_layers: int
    intermediate: int
    q_heads: int
    kv_heads: int
    head_dim: int
    gated_mlp: bool = True
    gated_attention: bool = False
    sliding_window: int | None = None
    sliding_layers: int | None = None
    mla: Shape | None = None
    moe: Shape | None = None
    linear: Shape | None = None
    indexer: Shape | None = None
    compressed: Shape | None = None

    def layers(self) -> tuple[Layer, ...]:
        """Return every layer. Raises InvalidProblemError if the numbers contradict each other."""
        states = 0 if self.linear is None else self.linear["layers"]
        if not 0 <= states < self.num_layers:
            raise InvalidProblemError(f"linear.layers is {states}, must be 0 to num_layers ({self.num_layers}) - 1")
        of_linear = _spread("linear.layers", states, self.num_layers)
        mixers = iter(self._with_kv(self.num_layers - states))
        mlps = _mlps(self.num_layers, Dense(width=self.intermediate, gated=self.gated_mlp), self.moe)
        return tuple(
            Layer(mixers=(_recurrent(self.linear) if self.linear and is_linear else next(mixers),), mlps=(mlp,))
            for is_linear, mlp in zip(of_linear, mlps, strict=True)
        )

    def _with_kv(self, number: int) -> list[Mixer]:
        """Return what mixes the tokens of the layers that keep KV."""
        if self.indexer is not None and self.mla is None:
            raise InvalidProblemError("an indexer needs latent attention with compressed queries")
        if self.compressed is not None:
            return _compressed(self.compressed, self.num_layers, self.q_heads, self.head_dim)
        if self.mla is not None:
            return _latent(self.mla, self.indexer, number, self.q_heads)
        full = Grouped(
            query_heads=self.q_heads, kv_heads=self.kv_heads, head_dim=self.head_dim, gated=self.gated_attention
        )
        windowed = replace(full, window=self.sliding_window)
        of_all = number if self.sliding_layers is None else self.sliding_layers
        sliding = 0 if self.sliding_window is None else of_all
        return [windowed if slides else full for slides in _spread("sliding_layers", sliding, number)]


IN_SHORT = tuple(field.name for field in fields(LayersInShort))


def model_in_short(**given: Any) -> ModelSpec:
    """Return the model with `LayersInShort`, whose fields are among its other ones."""
    short = {name: given.pop(name) for name in IN_SHORT if name in given}
    return ModelSpec(**given, layers=LayersInShort(**short).layers())


def _spread(name: str, number: int, layers: int) -> list[bool]:
    """Return which of some layers are of a kind that a number of them have; the first one is."""
    if not 0 <= number <= layers:
        raise InvalidProblemError(f"{name} is {number}, must be 0 to the layers with KV ({layers})")
    return [layer * number % layers < number for layer in range(layers)]


def _mlps(num_layers: int, dense: Dense, moe: Shape | None) -> list[Mlp]:
    if moe is None:
        return [dense] * num_layers
    width, first_dense, every = moe["expert_intermediate"], moe.get("first_dense_layers", 0), moe.get("every", 1)
    if not 0 <= first_dense < num_layers:
        limit = f"must be 0 to num_layers ({num_layers}) - 1"
        raise InvalidProblemError(f"moe.first_dense_layers is {first_dense}, {limit}")
    if not 1 <= every <= num_layers - first_dense:
        limit = f"must be 1 to the {num_layers - first_dense} layers after the dense ones"
        raise InvalidProblemError(f"moe.every is {every}, {limit}")
    experts = Experts(
        count=moe["num_experts"],
        active=moe["active_experts"],
        width=width,
        shared_width=moe.get("shared_experts", 0) * width,
        gated=dense.gated,
    )
    having = range(first_dense + every - 1, num_layers, every)
    return [experts if layer in having else dense for layer in range(num_layers)]


def _recurrent(shape: Shape) -> Recurrent:
    return Recurrent(
        weights=shape["params"], request_bytes=shape["state_bytes"], flops=shape.get("token_flops", 0.0)
    )  # fmt: skip


def _latent(mla: Shape, indexer: Shape | None, layers: int, q_heads: int) -> list[Mixer]:
    shape = {"query_heads": q_heads, **{name: mla[name] for name in _OF_LATENT if name in mla}}
    if indexer is None:
        return [Latent(**shape)] * layers
    chooses = Indexer(**{name: indexer[name] for name in _OF_INDEXER})
    own, sharing = (Latent(**shape, indexer=chooses, has_own_indexer=has_own) for has_own in (True, False))
    number = layers if indexer.get("layers") is None else indexer["layers"]
    return [own if has_own else sharing for has_own in _spread("indexer.layers", number, layers)]


def _compressed(shape: Shape, num_layers: int, q_heads: int, head_dim: int) -> list[Mixer]:
    indexer = Indexer(
        top_tokens=shape["top_entries"],
        heads=shape["index_heads"],
        head_dim=shape["index_head_dim"],
        key_bytes=shape["index_key_bytes"],
    )
    common = {"query_heads": q_heads, "head_dim": head_dim, **{name: shape[name] for name in _OF_COMPRESSED}}
    sparse, heavy, neither = (
        Compressed(**common, ratio=ratio, indexer=chooses)
        for ratio, chooses in ((shape["sparse_ratio"], indexer), (shape["heavy_ratio"], None), (None, None))
    )
    if shape["sparse_layers"] + shape["heavy_layers"] < 1:
        raise InvalidProblemError(f"compressed has 0 sparse and 0 heavy layers, must have 1 to {num_layers} together")
    are_sparse = _spread("compressed.sparse_layers", shape["sparse_layers"], num_layers)
    others = num_layers - shape["sparse_layers"]
    are_heavy = iter(_spread("compressed.heavy_layers", shape["heavy_layers"], others))
    return [sparse if is_sparse else heavy if next(are_heavy) else neither for is_sparse in are_sparse]


def described_in_short(layers: Sequence[Layer]) -> dict[str, Any] | None:
    """Return the fields of `LayersInShort` that give as many layers of every kind, or None if none do."""
    mixers, mlps = Counter(layer.mixers for layer in layers), Counter(layer.mlps for layer in layers)
    if any(len(parts) != 1 for parts in (*mixers, *mlps)):
        return None
    of_mixers = _mixers_in_short({parts[0]: count for parts, count in mixers.items()})
    of_mlps = _mlps_in_short([layer.mlps[0] for layer in layers])
    if of_mixers is None or of_mlps is None:
        return None
    found = {"num_layers": len(layers), **of_mlps, **of_mixers}
    try:
        again = LayersInShort(**found).layers()
    except InvalidProblemError:
        return None
    has_same_mlps = [layer.mlps for layer in again] == [layer.mlps for layer in layers]
    return found if has_same_mlps and Counter(layer.mixers for layer in again) == mixers else None


def _mixers_in_short(counts: Mapping[Mixer, int]) -> dict[str, Any] | None:
    found = dict[str, Any]()
    states = [mixer for mixer in counts if isinstance(mixer, Recurrent)]
    rest = [mixer for mixer in counts if not isinstance(mixer, Recurrent)]
    if len(states) > 1 or not rest or any(type(mixer) is not type(rest[0]) for mixer in rest):
        return None
    for state in states:
        found["linear"] = {
            "layers": counts[state],
            "params": state.weights,
            "state_bytes": state.request_bytes,
            "token_flops": state.flops,
        }
    first = rest[0]
    found |= {"q_heads": first.q_heads, "kv_heads": first.num_kv_heads, "head_dim": first.key_dim}
    if isinstance(first, Grouped):
        windows = {mixer.window: counts[mixer] for mixer in rest if isinstance(mixer, Grouped)}
        sizes = [window for window in windows if window is not None]
        if sizes:
            found["sliding_window"] = sizes[0]
            found["sliding_layers"] = windows[sizes[0]] if None in windows else None
        return found | {"gated_attention": first.gated}
    if isinstance(first, Latent):
        found["mla"] = {name: getattr(first, name) for name in _OF_LATENT}
        if first.indexer is not None:
            own = sum(counts[mixer] for mixer in rest if mixer.owns_indexer)
            chooses = {name: getattr(first.indexer, name) for name in _OF_INDEXER}
            found["indexer"] = {**chooses, "layers": None if len(rest) == 1 else own}
        return found
    shape = _compressed_in_short([mixer for mixer in rest if isinstance(mixer, Compressed)], counts)
    return None if shape is None else found | {"compressed": shape}


def _compressed_in_short(kinds: Sequence[Compressed], counts: Mapping[Mixer, int]) -> Shape | None:
    sparse = next((one for one in kinds if one.indexer is not None), None)
    heavy = next((one for one in kinds if one.indexer is None and one.ratio is not None), None)
    if sparse is None or sparse.indexer is None:
        return None
    return {
        "sparse_layers": counts[sparse],
        "sparse_ratio": sparse.ratio,
        "heavy_layers": 0 if heavy is None else counts[heavy],
        "heavy_ratio": 1 if heavy is None else heavy.ratio,
        "top_entries": sparse.indexer.top_tokens,
        "index_heads": sparse.indexer.heads,
        "index_head_dim": sparse.indexer.head_dim,
        "index_key_bytes": sparse.indexer.key_bytes,
        **{name: getattr(sparse, name) for name in _OF_COMPRESSED},
    }


def _mlps_in_short(mlps: Sequence[Mlp]) -> dict[str, Any] | None:
    experts = {number: mlp for number, mlp in enumerate(mlps) if isinstance(mlp, Experts)}
    dense = [mlp for mlp in mlps if isinstance(mlp, Dense)]
    if not experts:
        return {"intermediate": dense[0].width, "gated_mlp": mlps[0].gated}
    numbers, one = list(experts), next(iter(experts.values()))
    every = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    first_dense = numbers[0] - every + 1
    if one.latent is not None or one.shared_width % one.width or first_dense < 0:
        return None
    moe = {
        "num_experts": one.count,
        "active_experts": one.active,
        "expert_intermediate": one.width,
        "shared_experts": one.shared_width // one.width,
        "first_dense_layers": first_dense,
        "every": every,
    }
    return {"intermediate": dense[0].width if dense else one.width, "gated_mlp": one.gated, "moe": moe}


def spread_as_in_short(layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """Return layers in the order of `LayersInShort` if these can describe them, otherwise unchanged.

    What a model costs does not depend on the order of kinds that are spread evenly.
    """
    found = tuple(layers)
    if (short := described_in_short(found)) is None:
        return found
    model = ModelSpec(name="-", layers=found, hidden=1, vocab=1)
    is_even = all(model.allowed_cut(layer) for layer in range(model.prefix_layers, len(found)))
    return LayersInShort(**short).layers() if is_even else found
