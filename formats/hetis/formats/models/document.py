"""Model files, and all other ways to specify a model: the catalogue and Hugging Face folders."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from hetis.formats import catalogue
from hetis.formats.errors import DocumentError, Problem, shown, single_problem
from hetis.formats.fields import Document, DocumentPart, Found, Title, listed, mapping, plain, value_of, whole
from hetis.formats.kinds import kind_of, read_data
from hetis.formats.layers import IN_SHORT, LayersInShort, described_in_short
from hetis.formats.models import dtypes
from hetis.formats.models.config_json import MAX_LAYERS, MAX_STREAMS
from hetis.formats.models.layer_parts import (
    CompressedPart,
    IndexerPart,
    LayerPart,
    LinearPart,
    MlaPart,
    MoePart,
    Whole,
    layers_of_list,
    listed_layers,
)
from hetis.formats.positions import Text
from hetis.solver.model import DraftShape, ModelSpec

_CONFIG = "config.json"
_ADAPTER = "adapter_config.json"
ElementBytes = Annotated[float, Field(gt=0, le=16)]


def _dtype(value: str) -> str:
    dtypes.split_dtype(value)
    return value


class DraftPart(DocumentPart):
    """Multi-token prediction: ``tokens`` drafts per iteration, each accepted with probability ``acceptance`` if all
    earlier ones were.
    """

    tokens: Annotated[int, Field(ge=1, le=16)]
    acceptance: Annotated[float, Field(ge=0, le=1)]


WeightsName = Literal[
    "bf16", "fp8", "int8", "int4", "awq-int4", "gptq-int4", "mxfp4", "nvfp4", "bnb-int4", "bnb-int8", "fbgemm-fp8"
]  # the names in `dtypes.PRECISIONS`


class PrecisionPart(DocumentPart):
    """The precision in which one GPU type holds the model; a field left out is as on the other GPUs."""

    weights: WeightsName | None = None
    weight_bytes: ElementBytes | None = None
    kv_bytes: ElementBytes | None = None


class ModelSpecDocument(Document):
    """The shape of a decoder-only transformer.

    ``dtype`` (``bfloat16``, ``bfloat16+fp8``, ...) sets the bytes of weights, embeddings and activations; the
    ``*_bytes`` fields, in bytes per parameter or element, override it. The KV cache has 2 unless ``kv_bytes`` is set.
    ``weights`` is the engines' name of the precision, which decides on which GPUs the model runs; its default follows
    from ``dtype``. GPU types in ``precisions`` hold the model in a precision of their own.

    A ``sliding_window`` applies to all layers, or to ``sliding_layers`` of them. Engines then free the KV outside the
    window, unless ``windows_free_kv`` is false (vLLM's ``--disable-hybrid-kv-cache-manager``). Older files have
    ``sliding_window_every``: 2 means a window in every second layer, and ``windows_free_kv`` then defaults to false.
    ``vision_params`` are held by the first stage, in 16 bits. Layers mix ``residual_streams`` copies of the residual.
    With ``norms_span_heads`` TP ranks sum the squares of queries and keys.

    Models whose layers differ in other ways have ``layers``, a list, instead of ``num_layers``, ``intermediate``, heads
    and the shapes from ``mla`` to ``compressed``.
    """

    kind: Literal["ModelSpec"]
    name: Title
    num_layers: Annotated[int | None, Field(ge=1, le=MAX_LAYERS)] = None
    hidden: Whole
    intermediate: Whole | None = None
    q_heads: Whole | None = None
    kv_heads: Whole | None = None
    head_dim: Whole | None = None
    vocab: Whole
    attention: Literal["mha", "gqa", "mla"] | None = None
    dtype: Annotated[str, AfterValidator(_dtype)] = "bfloat16"
    weights: Literal["", WeightsName] = ""
    weight_bytes: ElementBytes | None = None
    kv_bytes: ElementBytes = 2.0
    activation_bytes: ElementBytes | None = None
    embedding_bytes: ElementBytes | None = None
    gated_mlp: bool = True
    tie_embeddings: bool = False
    max_position: Whole = 4096
    sliding_window: Whole | None = None
    sliding_window_every: Whole = 1
    sliding_layers: Annotated[int | None, Field(ge=1, le=MAX_LAYERS)] = None
    windows_free_kv: bool = True
    gated_attention: bool = False
    residual_streams: Annotated[int, Field(ge=1, le=MAX_STREAMS)] = 1
    norms_span_heads: bool = False
    vision_params: Annotated[int, Field(ge=0, le=10**12)] = 0
    float16: bool = True
    mla: MlaPart | None = None
    moe: MoePart | None = None
    linear: LinearPart | None = None
    indexer: IndexerPart | None = None
    compressed: CompressedPart | None = None
    layers: list[LayerPart] | None = Field(default=None, min_length=1, max_length=1000)
    draft: DraftPart | None = None
    forbidden_cuts: list[Annotated[int, Field(ge=0)]] = Field(default_factory=list)
    precisions: dict[str, PrecisionPart] = Field(default_factory=dict, max_length=100)


# A model is written with these fields in this order, of which those that are not in _ALWAYS only if they are unusual.
_NEEDED = ("num_layers", "intermediate", "q_heads", "kv_heads", "head_dim")  # of a model in short
_ALWAYS = (
    *("name", "num_layers", "hidden", "intermediate", "q_heads", "kv_heads", "head_dim", "vocab", "attention"),
    *("weight_bytes", "kv_bytes", "activation_bytes", "embedding_bytes"),
    *("gated_mlp", "tie_embeddings", "max_position"),
)
_UNLESS_USUAL = (
    *("sliding_window", "sliding_layers", "windows_free_kv", "gated_attention", "residual_streams"),
    *("norms_span_heads", "vision_params", "float16"),
)
_SHAPES = ("mla", "moe", "linear", "indexer", "compressed")


def load_model(ref: str | os.PathLike[str], *, notes: list[str] | None = None) -> ModelSpec:
    """Return the model that ``ref`` names. Raises DocumentError if the name is unknown, or the file has problems (all
    of them).

    ``ref``: a catalogue name or alias (``Llama-2-70B``); the path of a ModelSpec file (``-``: standard input), of a
    Hugging Face ``config.json``, or of a folder with one. A catalogue name takes precedence over a path
    of the same spelling; write ``./NAME`` for the path. ``notes`` gets sentences about what was assumed.
    """
    text = os.fspath(ref)
    try:
        return catalogue.find_model(text).model
    except catalogue.UnknownNameError as error:
        if not (text == "-" or text.endswith((".json", ".yaml", ".yml")) or os.path.exists(text)):
            raise DocumentError([Problem(file="model", message=f"{error} (and no such file exists)")]) from None
    if os.path.isdir(text):
        if not (Path(text) / _CONFIG).exists():
            raise single_problem(text, f"is a folder without {_CONFIG}, so it is not a Hugging Face model{_base(text)}")
        text = str(Path(text) / _CONFIG)
    data, source = read_data(text)
    if is_config(text, data):
        from hetis.formats.models.huggingface import model_from_config

        folder = Path(text).resolve().parent if Path(text).name == _CONFIG else None
        name = Path(text).stem if folder is None else folder.name
        model = model_from_config(data, source, name=name, folder=folder, notes=notes)
        return _as_saved(model, Text(file=source.file, text=None))
    return parse_model(data, source)


def _base(folder: str) -> str:
    """Return what to pass instead of a folder that holds an adapter (LoRA) of another model, or nothing."""
    adapter = Path(folder) / _ADAPTER
    if not adapter.exists():
        return ""
    data, _ = read_data(os.fspath(adapter))
    base = data.get("base_model_name_or_path") if isinstance(data, dict) else None
    known = f", {shown(base)}" if isinstance(base, str) and base else ""
    return f"; it has an adapter ({_ADAPTER}): pass the model that it adapts{known}"


def is_config(path: str, data: Any) -> bool:
    """Return whether a file with this data is a Hugging Face ``config.json``, perhaps of another name."""
    if not isinstance(data, dict) or "apiVersion" in data:
        return False
    return Path(path).name == _CONFIG or not data.keys().isdisjoint({"architectures", "model_type"})


def _as_saved(model: ModelSpec, source: Text) -> ModelSpec:
    """Return a model of another form. Raises DocumentError if its model file, or a plan with it, could not be read."""
    parse_model(MODEL_SPEC.to_data(model), source)
    return model


def drafts(text: str) -> DraftShape:
    """Return drafts: ``1:0.85`` is one token per iteration, accepted in 85% of all cases. Raises ValueError."""
    number, _, rate = text.partition(":")
    try:
        return value_of(DraftShape, DraftPart(tokens=int(number), acceptance=float(rate)))
    except ValueError:
        form = "TOKENS:ACCEPTANCE, 1 to 16 tokens and a rate of 0 to 1, such as 1:0.85"
        raise ValueError(f"{text[:80]!r} is not {form}") from None


def _model_data(model: ModelSpec) -> dict[str, Any]:
    short = described_in_short(model.layers)
    in_short = short is not None and LayersInShort(**short).layers() == model.layers
    found = {**(short or {}), "attention": model.attention.name} if in_short else {}
    given, usual = {**plain(model), **found}, ModelSpecDocument.model_fields
    data = {name: given[name] for name in _ALWAYS if name in given and (in_short or name != "attention")}
    data |= {name: given[name] for name in _UNLESS_USUAL if name in given and given[name] != usual[name].default}
    for name in _SHAPES:
        if (shape := found.get(name)) is not None:
            data[name] = {k: v for k, v in shape.items() if v is not None and (k, v) != ("every", 1)}
    precisions = {one.pop("gpu"): {k: v for k, v in one.items() if v} for one in given["precisions"]}
    rest = {
        "layers": [] if in_short else listed_layers(model.layers),
        "draft": given["draft"],
        "weights": model.weights,
        "forbidden_cuts": sorted(model.forbidden_cuts),
        "precisions": precisions,
    }
    return data | {name: value for name, value in rest.items() if value}


def _to_model(document: ModelSpecDocument) -> ModelSpec:
    changes: dict[str, Any] = {}
    in_short = {name: plain(getattr(document, name)) for name in IN_SHORT}
    if document.sliding_window is not None and document.sliding_window_every > 1 and document.sliding_layers is None:
        in_short["sliding_layers"] = -(-(document.num_layers or 1) // document.sliding_window_every)
        if "windows_free_kv" not in document.model_fields_set:
            changes["windows_free_kv"] = False  # as plans from these files assume, which may have attention workers
    base = dtypes.base_bytes(document.dtype)
    for name in ("activation_bytes", "embedding_bytes"):
        changes[name] = getattr(document, name) or base
    quantised = document.dtype.partition("+")[2]
    if not document.weights and quantised in dtypes.PRECISIONS:
        changes["weights"] = quantised
    layers = LayersInShort(**in_short).layers() if document.layers is None else layers_of_list(document.layers)
    fields = {name: getattr(document, name) for name in _OF_MODEL} | changes
    model = ModelSpec(
        **fields,
        layers=layers,
        weight_bytes=document.weight_bytes or base,
        draft=None if document.draft is None else value_of(DraftShape, document.draft),
        forbidden_cuts=frozenset(document.forbidden_cuts),
    )
    if document.weight_bytes is None:
        model = replace(model, weight_bytes=dtypes.layer_weight_bytes(document.dtype, model))
    return dtypes.with_precisions(model, {gpu: _on(model, part) for gpu, part in document.precisions.items()})


_OF_MODEL = (
    *("name", "hidden", "vocab", "weights", "kv_bytes", "tie_embeddings", "max_position", "windows_free_kv"),
    *("residual_streams", "norms_span_heads", "vision_params", "float16"),
)


def _on(model: ModelSpec, part: PrecisionPart) -> ModelSpec:
    """Return the model in the precision of a GPU type."""
    own = model if part.weights is None else dtypes.with_precision(model, weights=part.weights)
    weight_bytes, kv_bytes = part.weight_bytes or own.weight_bytes, part.kv_bytes or own.kv_bytes
    return replace(own, weight_bytes=weight_bytes, kv_bytes=kv_bytes)


def _check_model(data: Mapping[str, Any]) -> Found:
    def number(name: str, of: Any = data) -> int | None:
        return whole(mapping(of).get(name), most=math.inf)

    if data.get("layers") is not None:
        for name in (*_NEEDED, *_SHAPES, "attention", "sliding_window", "sliding_layers"):
            if data.get(name) is not None:
                yield (name,), "and layers exclude each other"
        return
    yield from (((), f"{name} is missing") for name in _NEEDED if name not in data)
    q_heads, kv_heads, layers = number("q_heads"), number("kv_heads"), number("num_layers")
    attention, mla, moe = data.get("attention"), data.get("mla"), data.get("moe")
    if q_heads and kv_heads and q_heads % kv_heads:
        yield ("q_heads",), f"is {q_heads}, must be a multiple of kv_heads ({kv_heads})"
    if attention == "mla" and mla is None:
        yield ("attention",), "is mla, but the mla shape is missing"
    if attention in ("mha", "gqa") and mla is not None:
        yield ("attention",), f"is {attention}, but an mla shape is given"
    if attention == "mha" and q_heads and kv_heads and q_heads != kv_heads:
        yield ("attention",), f"is mha, but kv_heads ({kv_heads}) differs from q_heads ({q_heads}): use gqa"
    experts, active = number("num_experts", moe), number("active_experts", moe)
    if experts and active and active > experts:
        yield ("moe", "active_experts"), f"is {active}, must be <= num_experts ({experts})"
    dense, every = number("first_dense_layers", moe), number("every", moe)
    if layers and dense and dense >= layers:
        yield ("moe", "first_dense_layers"), f"is {dense}, must be < num_layers ({layers})"
    if layers and every and every > layers - (dense or 0) > 0:
        yield ("moe", "every"), f"is {every}, must be <= {layers - (dense or 0)}, the layers after dense ones"
    linear, sliding = number("layers", data.get("linear")), number("sliding_layers")
    if layers and linear and linear >= layers:
        yield ("linear", "layers"), f"is {linear}, must be < num_layers ({layers})"
    with_kv = layers - (linear or 0) if layers else 0
    if sliding and sliding > with_kv > 0:
        yield ("sliding_layers",), f"is {sliding}, must be <= {with_kv}, the layers with KV"
    indexers = number("layers", data.get("indexer"))
    if indexers and indexers > with_kv > 0:
        yield ("indexer", "layers"), f"is {indexers}, must be <= {with_kv}, the layers with KV"
    has_indexer, has_window = (data.get(name) is not None for name in ("indexer", "sliding_window"))
    if has_indexer and has_window:
        yield ("indexer",), "and a sliding_window exclude each other"
    yield from _check_compressed(data)
    if sliding and (number("sliding_window_every") or 1) > 1:
        yield ("sliding_layers",), "and sliding_window_every exclude each other"
    if sliding and not has_window:
        yield ("sliding_layers",), "is given, but no sliding_window"
    if has_indexer and number("q_lora_rank", mla) is None:
        yield ("indexer",), "needs latent attention (mla) with q_lora_rank"
    for i, cut in enumerate(listed(data.get("forbidden_cuts"))):
        if layers and isinstance(cut, int) and cut >= layers:
            yield ("forbidden_cuts", i), f"is {shown(cut)}, must be < num_layers ({layers})"


def _check_compressed(data: Mapping[str, Any]) -> Found:
    if (shape := data.get("compressed")) is None:
        return

    def number(name: str, of: Any = shape) -> int | None:
        return whole(mapping(of).get(name), most=math.inf)

    for name in ("mla", "indexer", "linear", "sliding_window"):
        if data.get(name) is not None:
            yield ("compressed",), f"and {name} exclude each other"
    kv_heads, layers = number("kv_heads", data), number("num_layers", data)
    if kv_heads and kv_heads != 1:
        yield ("kv_heads",), f"is {kv_heads}, must be 1 with compressed attention"
    sparse, heavy = number("sparse_layers"), number("heavy_layers")
    if layers and sparse is not None and heavy is not None and not 1 <= sparse + heavy <= layers:
        yield ("compressed",), f"has {sparse} sparse and {heavy} heavy layers, must have 1 to {layers} together"
    size, rope = number("head_dim", data), number("rope_head_dim")
    if size and rope and rope > size:
        yield ("compressed", "rope_head_dim"), f"is {rope}, must be <= head_dim ({size})"
    heads, groups = number("q_heads", data), number("o_groups")
    if heads and groups and heads % groups:
        yield ("compressed", "o_groups"), f"is {groups}, must divide q_heads ({heads})"


MODEL_SPEC = kind_of(ModelSpecDocument, ModelSpec, to_value=_to_model, to_data=_model_data, check=_check_model)
parse_model = MODEL_SPEC.parse
