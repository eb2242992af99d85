"""Layers in a model's file: the shapes of usual kinds, and the entries of a list of layers that differ otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from hetis.formats.fields import DocumentPart, plain, value_of
from hetis.formats.models.config_json import MAX_LAYERS
from hetis.solver.errors import InvalidProblemError
from hetis.solver.model import Compressed, Dense, Experts, Grouped, Latent, Layer, Mixer, Mlp, Recurrent

Whole = Annotated[int, Field(ge=1, le=10**9)]
WholeOrZero = Annotated[int, Field(ge=0, le=10**9)]
_Layers = Annotated[int, Field(ge=1, le=MAX_LAYERS)]
_KeyBytes = Annotated[float, Field(gt=0, le=1e6)]
_StateBytes = Annotated[float, Field(gt=0, le=1e12)]
_TokenFlops = Annotated[float, Field(ge=0, le=1e15)]


class MlaPart(DocumentPart):
    """Multi-head latent attention (DeepSeek-V2)."""

    kv_lora_rank: Whole
    qk_rope_head_dim: Whole
    qk_nope_head_dim: Whole
    v_head_dim: Whole
    q_lora_rank: Whole | None = None


class MoePart(DocumentPart):
    """Mixture of experts in every ``every``-th layer after the first ``first_dense_layers``; the other layers are
    dense.
    """

    num_experts: Whole
    active_experts: Whole
    expert_intermediate: Whole
    shared_experts: WholeOrZero = 0
    first_dense_layers: WholeOrZero = 0
    every: _Layers = 1


class LinearPart(DocumentPart):
    """Layers of linear attention or of a state-space model, which keep a state for each request instead of KV.

    ``params``, ``state_bytes`` (of one request, in all heads) and ``token_flops`` (of the recurrence for one token) are
    per layer.
    """

    layers: _Layers
    params: Whole
    state_bytes: _StateBytes
    token_flops: _TokenFlops = 0.0


class IndexerPart(DocumentPart):
    """Sparse attention (DeepSeek-V3.2): an indexer chooses the ``top_tokens`` that a query attends to. ``key_bytes`` is
    the size of one token in the indexer's cache. All layers have an indexer, or ``layers`` of them, whose choice the
    others share (GLM-5.2).
    """

    top_tokens: Whole
    heads: Whole
    head_dim: Whole
    key_bytes: _KeyBytes
    layers: Annotated[int | None, Field(ge=1, le=MAX_LAYERS)] = None


class CompressedPart(DocumentPart):
    """Compressed attention (DeepSeek-V4): all heads share one vector per token, and all layers attend to the last
    ``window`` of them. ``sparse_layers`` have an entry per ``sparse_ratio`` tokens, of which an indexer chooses
    ``top_entries``; ``heavy_layers`` attend to all entries, of ``heavy_ratio`` tokens each. ``index_key_bytes`` is the
    size of one entry in the indexer's cache.
    """

    window: Whole
    sparse_layers: Annotated[int, Field(ge=0, le=MAX_LAYERS)]
    sparse_ratio: Annotated[int, Field(ge=1, le=1_000_000)]
    heavy_layers: Annotated[int, Field(ge=0, le=MAX_LAYERS)]
    heavy_ratio: Annotated[int, Field(ge=1, le=1_000_000)]
    top_entries: Whole
    index_heads: Whole
    index_head_dim: Whole
    index_key_bytes: _KeyBytes
    rope_head_dim: WholeOrZero
    q_lora_rank: Whole
    o_groups: Whole
    o_lora_rank: Whole


class _IndexerOfLayer(DocumentPart):
    """Chooses the ``top_tokens`` (or entries) to which a query attends."""

    top_tokens: Whole
    heads: Whole
    head_dim: Whole
    key_bytes: _KeyBytes


class GroupedPart(DocumentPart):
    """Softmax attention whose query heads share KV heads; ``window`` limits it to the last tokens."""

    kind: Literal["grouped"]
    query_heads: Whole
    kv_heads: Whole
    head_dim: Whole
    value_dim: Whole | None = None
    window: Whole | None = None
    gated: bool = False
    key_is_value: bool = False
    has_own_kv: bool = True
    indexer: _IndexerOfLayer | None = None


class LatentPart(MlaPart):
    """Latent attention; without an indexer of its own, a layer attends to what an earlier one chose."""

    kind: Literal["latent"]
    query_heads: Whole
    gated: bool = False
    indexer: _IndexerOfLayer | None = None
    has_own_indexer: bool = True


class CompressedLayerPart(DocumentPart):
    """Compressed attention: a window, and entries of ``ratio`` tokens each."""

    kind: Literal["compressed"]
    query_heads: Whole
    head_dim: Whole
    window: Whole
    ratio: Annotated[int | None, Field(ge=1, le=1_000_000)] = None
    indexer: _IndexerOfLayer | None = None
    rope_head_dim: WholeOrZero
    q_lora_rank: Whole
    o_groups: Whole
    o_lora_rank: Whole


class RecurrentPart(DocumentPart):
    """Linear attention or a state space, which keeps ``request_bytes`` for a request instead of KV."""

    kind: Literal["recurrent"]
    weights: Whole
    request_bytes: _StateBytes
    flops: _TokenFlops = 0.0
    heads: Whole | None = None


class DensePart(DocumentPart):
    """A dense MLP."""

    kind: Literal["dense"]
    width: Whole
    gated: bool = True


class ExpertsPart(DocumentPart):
    """Experts, of which ``active`` compute a token; ``latent`` is the size with which routed ones compute."""

    kind: Literal["experts"]
    count: Whole
    active: Whole
    width: Whole
    shared_width: WholeOrZero = 0
    latent: Whole | None = None
    gated: bool = True


def _numbers(text: str) -> str:
    numbers_of(text)
    return text


class LayerPart(DocumentPart):
    """Layers that are alike: their numbers, from 0, as ``0-2,4``, and what each has; nothing, one part, or several side
    by side.
    """

    at: Annotated[str, AfterValidator(_numbers), Field(max_length=60_000)]
    attention: list[
        Annotated[GroupedPart | LatentPart | CompressedLayerPart | RecurrentPart, Field(discriminator="kind")]
    ] = Field(default_factory=list, max_length=4)
    mlp: list[Annotated[DensePart | ExpertsPart, Field(discriminator="kind")]] = Field(
        default_factory=list, max_length=4
    )


_KINDS: dict[str, type[Mixer] | type[Mlp]] = {
    "grouped": Grouped,
    "latent": Latent,
    "compressed": Compressed,
    "recurrent": Recurrent,
    "dense": Dense,
    "experts": Experts,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}
_USUAL = {
    part.model_fields["kind"].annotation.__args__[0]: {  # type: ignore[union-attr]
        name: field.default for name, field in part.model_fields.items() if not field.is_required()
    }
    for part in (GroupedPart, LatentPart, CompressedLayerPart, RecurrentPart, DensePart, ExpertsPart)
}


def numbers_of(text: str) -> list[int]:
    """Return the numbers in ``0-2,4``. Raises ValueError if it has none, or too many."""
    found = list[int]()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"{text[:80]!r} is not a list of layers, such as 0-2,4")
        begin, end = int(first), int(last) if dash else int(first)
        if not begin <= end < MAX_LAYERS:
            raise ValueError(f"{text[:80]!r} has layers {part.strip()[:20]}, must be rising and below {MAX_LAYERS}")
        found += range(begin, end + 1)
    return found


def _ranges(numbers: Sequence[int]) -> str:
    runs = list[list[int]]()
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def layers_of_list(parts: Sequence[LayerPart]) -> tuple[Layer, ...]:
    """Return the listed layers. Raises InvalidProblemError unless each number from 0 on is in one entry."""
    found = dict[int, Layer]()
    total = 0
    for part in parts:
        layer = Layer(mixers=tuple(map(_value, part.attention)), mlps=tuple(map(_value, part.mlp)))
        numbers = numbers_of(part.at)
        total += len(numbers)
        found |= dict.fromkeys(numbers, layer)
    if total != len(found) or sorted(found) != list(range(len(found))):
        raise InvalidProblemError("layers must have each number from 0 on in one entry")
    return tuple(found[number] for number in range(len(found)))


def _value(part: DocumentPart) -> Any:
    given = part.model_dump()
    return value_of(_KINDS[given.pop("kind")], given)


def listed_layers(layers: Sequence[Layer]) -> list[dict[str, Any]]:
    """Return layers as the entries of a file."""
    numbers = dict[Layer, list[int]]()
    for number, layer in enumerate(layers):
        numbers.setdefault(layer, []).append(number)
    return [
        {"at": _ranges(those)}
        | {name: list(map(_data, parts)) for name, parts in (("attention", layer.mixers), ("mlp", layer.mlps)) if parts}
        for layer, those in numbers.items()
    ]


def _data(value: Mixer | Mlp) -> dict[str, Any]:
    name = _NAMES[type(value)]
    given = plain(value)
    return {"kind": name} | {key: one for key, one in given.items() if _USUAL[name].get(key, _MISSING) != one}


_MISSING = object()
