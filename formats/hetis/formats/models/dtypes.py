"""Bytes per parameter of the number formats of checkpoints, including the scales of quantised ones."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from hetis.formats.errors import did_you_mean
from hetis.solver.model import GpuPrecision, ModelSpec

BYTES_PER_PARAMETER = {
    "float32": 4.0,
    "float16": 2.0,
    "bfloat16": 2.0,
    "fp8": 1.0,  # one scale per 128 x 128 block (or per tensor), which is negligible
    "int8": 1.0,
    "int4": 0.53125,  # 4 bits and a 16-bit scale (AWQ, GPTQ: zero point too) per group of 64 to 128: 4.25 bits
    "mxfp4": 0.53125,  # 4 bits and an 8-bit scale per 32: 4.25 bits
    "nvfp4": 0.5625,  # 4 bits and an 8-bit scale per 16: 4.5 bits
}

# Common names of weight precisions, and the formats that they mean; `ModelSpec.weights` holds such a name.
PRECISIONS = {"bf16": "bfloat16", "fp8": "fp8", "int8": "int8", "int4": "int4", "awq-int4": "int4", "gptq-int4": "int4"}
PRECISIONS |= {"mxfp4": "mxfp4", "nvfp4": "nvfp4"}
# Methods that not all engines load, or only on request: bitsandbytes, and FBGEMM's fp8 with scales per row.
PRECISIONS |= {"bnb-int4": "int4", "bnb-int8": "int8", "fbgemm-fp8": "fp8"}
_PLAIN_ATTENTION = ("fbgemm-fp8",)  # whose published checkpoints keep the matrices of attention in 16 bits (Llama 3.1)
LONGEST_CHOICE = 4096  # characters of a choice of precisions
KV_PRECISIONS = {"bf16": 2.0, "fp8": 1.0}  # bytes per element of the KV cache

_ALIASES = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32", "float": "float32"}
_ALIASES |= {"float8": "fp8", "awq": "int4", "gptq": "int4", "fp4": "mxfp4"}


def split_dtype(dtype: str) -> tuple[str, str]:
    """Return the formats of activations and weights, split at ``+`` or twice the same. Raises ValueError if unknown."""
    base, _, quantised = dtype.lower().replace("torch.", "").partition("+")
    formats = [_ALIASES.get(part, part) for part in (base, quantised or base)]
    for part in formats:
        if part not in BYTES_PER_PARAMETER:
            known = f"one of {', '.join(BYTES_PER_PARAMETER)} or base+quantised"
            raise ValueError(f"unknown dtype {dtype!r}, expected {known}")
    return formats[0], formats[1]


def layer_weight_bytes(dtype: str, model: ModelSpec) -> float:
    """Return the mean bytes per parameter of a repeated layer. ``mxfp4`` quantises only routed experts."""
    _, weights = split_dtype(dtype)
    return experts_weight_bytes(dtype, model) if weights == "mxfp4" else BYTES_PER_PARAMETER[weights]


def mean_weight_bytes(usual: float, model: ModelSpec, exceptions: Iterable[tuple[float, float]]) -> float:
    """Return the mean bytes per parameter of a repeated layer whose parameters have ``usual`` bytes but for
    ``exceptions``: numbers of parameters with a format of their own, and the bytes of each.
    """
    params = model.layer_params()
    return usual + sum(of_part / params * (own - usual) for of_part, own in exceptions)


def experts_weight_bytes(dtype: str, model: ModelSpec, sizes: Mapping[str, float] = BYTES_PER_PARAMETER) -> float:
    """Return the mean bytes per parameter of a repeated layer of which only routed experts are quantised.

    ``sizes`` are the bytes per parameter of every format.
    """
    base, weights = split_dtype(dtype)
    if model.experts is None:
        return sizes[weights]
    experts = model.expert_share * model.expert_params() * model.experts.count
    total = model.layer_params()
    return (experts * sizes[weights] + (total - experts) * base_bytes(base)) / total


def base_bytes(dtype: str) -> float:
    """Return the bytes of an activation or embedding element: a model stored in 8 bits or less still computes in 16."""
    return max(2.0, BYTES_PER_PARAMETER[split_dtype(dtype)[0]])


def with_weight_bytes(model: ModelSpec, weight_bytes: float) -> ModelSpec:
    """Return the same model with another number of bytes per weight."""
    return replace(model, weight_bytes=weight_bytes)


@dataclass(frozen=True, slots=True)
class Chosen:
    """A choice of precision: ``everywhere``, except for the GPU types in ``on``. None: unchanged."""

    everywhere: str | None = None
    on: Mapping[str, str] = field(default_factory=dict)


def chosen_precision(text: str, known: Collection[str]) -> Chosen:
    """Return the choice in ``fp8`` or ``fp8,V100-SXM2-32GB=bf16``: a precision, in any case, and those of GPU types.
    Raises ValueError if a precision is unknown, or given twice.
    """
    if len(text) > LONGEST_CHOICE:
        raise ValueError(f"has {len(text)} characters, may have {LONGEST_CHOICE}")
    everywhere: str | None = None
    on: dict[str, str] = {}
    for part in text.split(","):
        gpu, is_of_type, given = (word.strip() for word in part.rpartition("="))
        name = given.lower()
        if name not in known:
            raise ValueError(f"{given[:80]!r} is not one of {', '.join(known)}{did_you_mean(name[:80], known)}")
        if is_of_type and not gpu:
            raise ValueError(f"{part.strip()!r} has no GPU type before =")
        if gpu in on or (not gpu and everywhere is not None):
            raise ValueError(f"{text!r} gives two precisions for {gpu or 'all GPU types'}")
        if gpu:
            on[gpu] = name
        else:
            everywhere = name
    return Chosen(everywhere, on)


def with_precision(
    model: ModelSpec, *, weights: str | Chosen | None = None, kv: str | Chosen | None = None
) -> ModelSpec:  # fmt: skip
    """Return the same model with its layers' weights or its KV, but not its embeddings and LM head, in another
    precision: a choice of names in `PRECISIONS` and `KV_PRECISIONS`, or its text (`chosen_precision`). None changes
    nothing. Raises ValueError if a text is not a choice.
    """
    of_weights, of_kv = _chosen(weights, PRECISIONS), _chosen(kv, KV_PRECISIONS)
    found = _in(model, of_weights.everywhere, of_kv.everywhere)
    # A precision for all GPU types takes precedence over one that the model's file has for some of them.
    of_file = {one.gpu: _in(model.on(one.gpu), of_weights.everywhere, of_kv.everywhere) for one in model.precisions}
    of_types = {
        gpu: _in(of_file.get(gpu, found), of_weights.on.get(gpu), of_kv.on.get(gpu))
        for gpu in dict.fromkeys((*of_file, *of_weights.on, *of_kv.on))
    }
    return with_precisions(found, of_types)


def _chosen(given: str | Chosen | None, known: Collection[str]) -> Chosen:
    if given is None:
        return Chosen()
    return chosen_precision(given, known) if isinstance(given, str) else given


def with_precisions(model: ModelSpec, of_types: Mapping[str, ModelSpec]) -> ModelSpec:
    """Return the model with GPU types in the precisions of these models, without those that make no difference."""
    found = [
        GpuPrecision(gpu=gpu, weights=own.weights, weight_bytes=own.weight_bytes, kv_bytes=own.kv_bytes)
        for gpu, own in of_types.items()
        if (own.weights, own.weight_bytes, own.kv_bytes) != (model.weights, model.weight_bytes, model.kv_bytes)
    ]
    return replace(model, precisions=tuple(found))


def _in(model: ModelSpec, weights: str | None, kv: str | None) -> ModelSpec:
    if weights is not None:
        dtype = f"bfloat16+{PRECISIONS[weights]}"
        size = layer_weight_bytes(dtype, model)
        if weights in _PLAIN_ATTENTION:
            size = mean_weight_bytes(size, model, [(model.attention_params(), base_bytes(dtype))])
        model = replace(model, weights=weights, weight_bytes=size)
    return model if kv is None else replace(model, kv_bytes=KV_PRECISIONS[kv])


def weights_of(model: ModelSpec) -> str:
    """Return the precision of the layers' weights for display: its name, or the number of bytes if it has none."""
    if model.weights:
        share = quantised_share(model)
        return model.weights if share >= 0.5 else f"{model.weights} in {share:.0%} of the layers, bf16 in the rest"
    return "bf16" if model.weight_bytes == 2 else f"{model.weight_bytes:.3g} bytes per parameter"


def quantised_share(model: ModelSpec) -> float:
    """Return the share of the layers' parameters that have the named precision, if all others have 16 bits."""
    usual = BYTES_PER_PARAMETER[PRECISIONS[model.weights]] if model.weights in PRECISIONS else 2.0
    return 1.0 if usual >= 2.0 else min(1.0, max(0.0, (2.0 - model.weight_bytes) / (2.0 - usual)))


def kv_of(model: ModelSpec) -> str:
    """Return the precision of the KV cache for display."""
    names = {size: name for name, size in KV_PRECISIONS.items()} | {BYTES_PER_PARAMETER["nvfp4"]: "nvfp4"}
    return names.get(model.kv_bytes, f"{model.kv_bytes:g} bytes per element")


def precision_of(model: ModelSpec) -> str:
    """Return the precision of weights and KV for display, with that of GPU types that have their own, and drafts."""
    usual = f"weights {weights_of(model)}, KV {kv_of(model)}"
    alike: dict[str, list[str]] = {}
    for one in model.precisions:
        own = model.on(one.gpu)
        alike.setdefault(f"weights {weights_of(own)}, KV {kv_of(own)}", []).append(one.gpu)
    drafts = "" if model.draft is None else f"; drafts {model.draft.tokens}, accepted at {model.draft.acceptance:.0%}"
    return "; ".join([usual, *(f"on {', '.join(gpus)}: {text}" for text, gpus in alike.items())]) + drafts
