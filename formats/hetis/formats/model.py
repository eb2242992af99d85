"""Model files, and all other ways to specify a model: the catalogue, Hugging Face folders and GGUF files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from hetis.formats import catalogue, dtypes
from hetis.formats.errors import DocumentError, Problem, shown, single_problem
from hetis.formats.fields import API_VERSION, DocumentPart, Title
from hetis.formats.loading import read_data, validated
from hetis.formats.positions import Text
from hetis.solver.model import AttentionKind, DraftShape, IndexerShape, LinearShape, MlaShape, ModelSpec, MoeShape

Whole = Annotated[int, Field(ge=1, le=10**9)]
WholeOrZero = Annotated[int, Field(ge=0, le=10**9)]
ElementBytes = Annotated[float, Field(gt=0, le=16)]


def _dtype(value: str) -> str:
    dtypes.split_dtype(value)
    return value


class MlaPart(DocumentPart):
    """Multi-head latent attention (DeepSeek-V2)."""

    kv_lora_rank: Whole
    qk_rope_head_dim: Whole
    qk_nope_head_dim: Whole
    v_head_dim: Whole
    q_lora_rank: Whole | None = None


class MoePart(DocumentPart):
    """Mixture of experts in every ``every``-th layer after the first ``first_dense_layers``; the others are dense."""

    num_experts: Whole
    active_experts: Whole
    expert_intermediate: Whole
    shared_experts: WholeOrZero = 0
    first_dense_layers: WholeOrZero = 0
    every: Annotated[int, Field(ge=1, le=10_000)] = 1


class LinearPart(DocumentPart):
    """Layers of linear attention or of a state-space model, which keep a state for each request instead of KV.

    ``params``, ``state_bytes`` (of one request, in all heads) and ``token_flops`` (of the recurrence for one token) are
    those of one such layer.
    """

    layers: Annotated[int, Field(ge=1, le=10_000)]
    params: Whole
    state_bytes: Annotated[float, Field(gt=0, le=1e12)]
    token_flops: Annotated[float, Field(ge=0, le=1e15)] = 0.0


class IndexerPart(DocumentPart):
    """Sparse attention (DeepSeek-V3.2): an indexer in every layer chooses ``top_tokens`` that a query attends to.

    ``key_bytes`` are those of one token in the indexer's cache.
    """

    top_tokens: Whole
    heads: Whole
    head_dim: Whole
    key_bytes: Annotated[float, Field(gt=0, le=1e6)]


class DraftPart(DocumentPart):
    """Multi-token prediction: ``tokens`` drafted per iteration, each accepted with probability ``acceptance`` if all
    before it were.
    """

    tokens: Annotated[int, Field(ge=1, le=16)]
    acceptance: Annotated[float, Field(ge=0, le=1)]


class PrecisionPart(DocumentPart):
    """The precision in which one GPU type holds the model; what is not given is as on the other GPUs."""

    weights: Literal["bf16", "fp8", "int8", "int4", "awq-int4", "gptq-int4", "mxfp4", "nvfp4"] | None = None
    weight_bytes: ElementBytes | None = None
    kv_bytes: ElementBytes | None = None


class ModelSpecDocument(DocumentPart):
    """The shape of a decoder-only transformer.

    ``dtype`` (``bfloat16``, ``bfloat16+fp8``, ...) sets the bytes of weights, embeddings and activations; the
    ``*_bytes`` fields, in bytes per parameter or element, go before it. The KV cache has 2 unless ``kv_bytes`` says so.
    ``weights`` is what engines call the precision, which decides on what GPUs it runs; unless given, that of ``dtype``.
    GPU types in ``precisions`` hold the model in a precision of their own.

    A ``sliding_window`` is one of all layers, or of ``sliding_layers``. Engines then free the KV that the window has
    passed, unless ``windows_free_kv`` is false (vLLM's ``--disable-hybrid-kv-cache-manager``). Older files have
    ``sliding_window_every``: 2 is a window in every second layer, and ``windows_free_kv`` false unless given.
    ``vision_params`` are held by the first stage, in 16 bits.
    """

    api_version: Annotated[Literal["hetis/v1"], Field(alias="apiVersion")]
    kind: Literal["ModelSpec"]
    name: Title
    num_layers: Annotated[int, Field(ge=1, le=10_000)]
    hidden: Whole
    intermediate: Whole
    q_heads: Whole
    kv_heads: Whole
    head_dim: Whole
    vocab: Whole
    attention: Literal["mha", "gqa", "mla"] | None = None
    dtype: Annotated[str, AfterValidator(_dtype)] = "bfloat16"
    weights: Literal["", "bf16", "fp8", "int8", "int4", "awq-int4", "gptq-int4", "mxfp4", "nvfp4"] = ""
    weight_bytes: ElementBytes | None = None
    kv_bytes: ElementBytes = 2.0
    activation_bytes: ElementBytes | None = None
    embedding_bytes: ElementBytes | None = None
    gated_mlp: bool = True
    tie_embeddings: bool = False
    max_position: Whole = 4096
    sliding_window: Whole | None = None
    sliding_window_every: Whole = 1
    sliding_layers: Annotated[int | None, Field(ge=1, le=10_000)] = None
    windows_free_kv: bool = True
    gated_attention: bool = False
    vision_params: Annotated[int, Field(ge=0, le=10**12)] = 0
    float16: bool = True
    mla: MlaPart | None = None
    moe: MoePart | None = None
    linear: LinearPart | None = None
    indexer: IndexerPart | None = None
    draft: DraftPart | None = None
    forbidden_cuts: list[Annotated[int, Field(ge=0)]] = Field(default_factory=list)
    precisions: dict[str, PrecisionPart] = Field(default_factory=dict, max_length=100)


_SHAPES: Mapping[str, type[DocumentPart]] = {
    "mla": MlaPart,
    "moe": MoePart,
    "linear": LinearPart,
    "indexer": IndexerPart,
    "draft": DraftPart,
}


def load_model(ref: str | os.PathLike[str]) -> ModelSpec:
    """Return the model that ``ref`` names.

    Args:
        ref: a catalogue name or alias (``Llama-2-70B``); the path of a ModelSpec file (``-``: standard input), of a
            Hugging Face ``config.json``, of a folder with one, or of a GGUF file. A catalogue name takes precedence
            over a path of the same spelling; write ``./NAME`` for the path.

    Raises:
        DocumentError: the name is unknown, or the file has problems (all of them).
    """
    text = os.fspath(ref)
    try:
        return catalogue.find_model(text).model
    except catalogue.UnknownNameError as error:
        if not (text == "-" or text.endswith((".json", ".yaml", ".yml", ".gguf")) or os.path.exists(text)):
            raise DocumentError([Problem(file="model", message=f"{error} (nor is there such a file)")]) from None
    if os.path.isdir(text):
        if not (Path(text) / "config.json").exists():
            raise single_problem(text, "is a folder without config.json, so not a Hugging Face model")
        text = str(Path(text) / "config.json")
    if text.lower().endswith(".gguf"):
        from hetis.formats.gguf import load_gguf

        return load_gguf(text)
    data, source = read_data(text)
    if isinstance(data, dict) and "apiVersion" not in data and ("architectures" in data or "model_type" in data):
        from hetis.formats.huggingface import model_from_config

        folder = Path(text).resolve().parent.name if Path(text).name == "config.json" else Path(text).stem
        return model_from_config(data, source, name=folder)
    return parse_model(data, source)


def parse_model(data: Any, source: Text) -> ModelSpec:
    """Return the model in a ModelSpec document's plain data.

    Raises:
        DocumentError: with every problem of the document.
    """
    return validated(ModelSpecDocument, data, source, to_value=_to_model, check=_check_model)


def drafts(text: str) -> DraftShape:
    """Return the drafts of a text: ``1:0.85`` is one token per iteration, accepted in 85% of all cases.

    Raises:
        ValueError: the text says something else.
    """
    number, _, rate = text.partition(":")
    try:
        draft = DraftPart(tokens=int(number), acceptance=float(rate))
    except ValueError:
        raise ValueError(
            f"{text[:80]!r} is not TOKENS:ACCEPTANCE, 1 to 16 tokens and a rate of 0 to 1, such as 1:0.85"
        ) from None
    return DraftShape(**dict(draft))


def model_to_data(model: ModelSpec) -> dict[str, Any]:
    """Return a model's document as plain data. Reading it again gives an equal model."""
    data: dict[str, Any] = {"apiVersion": API_VERSION, "kind": "ModelSpec", "name": model.name}
    data |= {
        name: getattr(model, name)
        for name in ("num_layers", "hidden", "intermediate", "q_heads", "kv_heads", "head_dim", "vocab")
    }
    data["attention"] = model.attention.value
    data |= {name: getattr(model, name) for name in ("weight_bytes", "kv_bytes", "activation_bytes", "embedding_bytes")}
    data |= {name: getattr(model, name) for name in ("gated_mlp", "tie_embeddings", "max_position")}
    defaults = ModelSpecDocument.model_fields
    for name in (
        "sliding_window", "sliding_layers", "windows_free_kv", "gated_attention", "vision_params", "float16",
    ):  # fmt: skip
        if (value := getattr(model, name)) != defaults[name].default:
            data[name] = value
    for name, part in _SHAPES.items():
        shape = getattr(model, name)
        if shape is not None:
            data[name] = {
                field: getattr(shape, field)
                for field, info in part.model_fields.items()
                if getattr(shape, field) is not None and (field != "every" or getattr(shape, field) != info.default)
            }
    if model.weights:
        data["weights"] = model.weights
    if model.forbidden_cuts:
        data["forbidden_cuts"] = sorted(model.forbidden_cuts)
    if model.precisions:
        data["precisions"] = {
            one.gpu: {name: getattr(one, name) for name in PrecisionPart.model_fields if getattr(one, name)}
            for one in model.precisions
        }
    return data


def _to_model(document: ModelSpecDocument) -> ModelSpec:
    fields = {
        name: getattr(document, name)
        for name in ModelSpecDocument.model_fields
        if name
        not in ("api_version", "kind", "dtype", "attention", "forbidden_cuts", "precisions", "sliding_window_every")
        and name not in _SHAPES
    }
    if document.sliding_window is not None and document.sliding_window_every > 1 and document.sliding_layers is None:
        fields["sliding_layers"] = -(-document.num_layers // document.sliding_window_every)
        if "windows_free_kv" not in document.model_fields_set:
            fields["windows_free_kv"] = False  # as their plans have counted, which may have attention workers
    base = dtypes.base_bytes(document.dtype)
    for name in ("activation_bytes", "embedding_bytes"):
        fields[name] = fields[name] or base
    kind = document.attention
    if kind is None:
        kind = "mla" if document.mla else "mha" if document.q_heads == document.kv_heads else "gqa"
    weight_bytes, quantised = fields.pop("weight_bytes"), document.dtype.partition("+")[2]
    if not fields["weights"] and quantised in dtypes.PRECISIONS:
        fields["weights"] = quantised
    model = ModelSpec(
        **fields,
        attention=AttentionKind(kind),
        mla=MlaShape(**dict(document.mla)) if document.mla else None,
        moe=MoeShape(**dict(document.moe)) if document.moe else None,
        linear=LinearShape(**dict(document.linear)) if document.linear else None,
        indexer=IndexerShape(**dict(document.indexer)) if document.indexer else None,
        draft=DraftShape(**dict(document.draft)) if document.draft else None,
        forbidden_cuts=frozenset(document.forbidden_cuts),
    )
    model = dtypes.with_weight_bytes(model, weight_bytes or dtypes.layer_weight_bytes(document.dtype, model))
    return dtypes.with_precisions(model, {gpu: _on(model, part) for gpu, part in document.precisions.items()})


def _on(model: ModelSpec, part: PrecisionPart) -> ModelSpec:
    """Return the model in the precision of a GPU type."""
    own = model if part.weights is None else dtypes.with_precision(model, weights=part.weights)
    return replace(
        own, weight_bytes=part.weight_bytes or own.weight_bytes, kv_bytes=part.kv_bytes or own.kv_bytes
    )  # fmt: skip


def _check_model(data: Mapping[str, Any]) -> list[tuple[tuple[str | int, ...], str]]:
    found: list[tuple[tuple[str | int, ...], str]] = []

    def whole(mapping: Any, name: str) -> int | None:
        value = mapping.get(name) if isinstance(mapping, dict) else None
        return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None

    q_heads, kv_heads, layers = whole(data, "q_heads"), whole(data, "kv_heads"), whole(data, "num_layers")
    if q_heads and kv_heads and q_heads % kv_heads:
        found.append((("q_heads",), f"is {q_heads}, must be a multiple of kv_heads ({kv_heads})"))
    attention = data.get("attention")
    if attention == "mla" and data.get("mla") is None:
        found.append((("attention",), "is mla, but the mla shape is missing"))
    if attention in ("mha", "gqa") and data.get("mla") is not None:
        found.append((("attention",), f"is {attention}, but an mla shape is given"))
    if attention == "mha" and q_heads and kv_heads and q_heads != kv_heads:
        found.append((("attention",), f"is mha, but kv_heads ({kv_heads}) differs from q_heads ({q_heads}): gqa"))
    moe = data.get("moe")
    experts, active = whole(moe, "num_experts"), whole(moe, "active_experts")
    if experts and active and active > experts:
        found.append((("moe", "active_experts"), f"is {active}, must be <= num_experts ({experts})"))
    dense = whole(moe, "first_dense_layers")
    if layers and dense and dense >= layers:
        found.append((("moe", "first_dense_layers"), f"is {dense}, must be < num_layers ({layers})"))
    every = whole(moe, "every")
    if layers and every and every > layers - (dense or 0) > 0:
        found.append((("moe", "every"), f"is {every}, must be <= {layers - (dense or 0)}, the layers after dense ones"))
    linear = whole(data.get("linear"), "layers")
    if layers and linear and linear >= layers:
        found.append((("linear", "layers"), f"is {linear}, must be < num_layers ({layers})"))
    sliding = whole(data, "sliding_layers")
    with_kv = layers - (linear or 0) if layers else 0
    if sliding and sliding > with_kv > 0:
        found.append((("sliding_layers",), f"is {sliding}, must be <= {with_kv}, the layers with KV"))
    if data.get("indexer") is not None and data.get("sliding_window") is not None:
        found.append((("indexer",), "and a sliding_window exclude each other"))
    if sliding and (whole(data, "sliding_window_every") or 1) > 1:
        found.append((("sliding_layers",), "and sliding_window_every exclude each other"))
    if sliding and data.get("sliding_window") is None:
        found.append((("sliding_layers",), "is given, but no sliding_window"))
    if data.get("indexer") is not None and whole(data.get("mla"), "q_lora_rank") is None:
        found.append((("indexer",), "needs latent attention (mla) with q_lora_rank"))
    cuts = data.get("forbidden_cuts")
    for i, cut in enumerate(cuts if isinstance(cuts, list) else []):
        if layers and isinstance(cut, int) and cut >= layers:
            found.append((("forbidden_cuts", i), f"is {shown(cut)}, must be < num_layers ({layers})"))
    return found
