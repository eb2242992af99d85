"""Bytes per parameter of the number formats of checkpoints, including the scales of quantised ones."""

from __future__ import annotations

from dataclasses import replace

from hetis.solver.model import ModelSpec

BYTES_PER_PARAMETER = {
    "float32": 4.0,
    "float16": 2.0,
    "bfloat16": 2.0,
    "fp8": 1.0,  # one scale per 128 x 128 block (or per tensor), which is negligible
    "int8": 1.0,
    "int4": 0.53125,  # 4 bits and a 16-bit scale (AWQ, GPTQ: zero point too) per group of 64 to 128, padded: 4.25 bits
    "mxfp4": 0.53125,  # 4 bits and an 8-bit scale per 32: 4.25 bits
    "nvfp4": 0.5625,  # 4 bits and an 8-bit scale per 16: 4.5 bits
}

# Common names of weight precisions, and the formats that they mean; `ModelSpec.weights` holds such a name.
PRECISIONS = {
    "bf16": "bfloat16",
    "fp8": "fp8",
    "int8": "int8",
    "int4": "int4",
    "awq-int4": "int4",
    "gptq-int4": "int4",
    "mxfp4": "mxfp4",
    "nvfp4": "nvfp4",
}
KV_PRECISIONS = {"bf16": 2.0, "fp8": 1.0}  # bytes per element of the KV cache

_ALIASES = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32", "float": "float32"} | {
    "float8": "fp8",
    "awq": "int4",
    "gptq": "int4",
    "fp4": "mxfp4",
}


def split_dtype(dtype: str) -> tuple[str, str]:
    """Return the formats of activations and weights: (``bfloat16``, ``fp8``) for ``bfloat16+fp8``, otherwise twice the
    same.

    Raises:
        ValueError: the format is unknown.
    """
    base, _, quantised = dtype.lower().replace("torch.", "").partition("+")
    formats = [_ALIASES.get(part, part) for part in (base, quantised or base)]
    for part in formats:
        if part not in BYTES_PER_PARAMETER:
            raise ValueError(
                f"unknown dtype {dtype!r}, expected one of {', '.join(BYTES_PER_PARAMETER)} or base+quantised"
            )
    return formats[0], formats[1]


def layer_weight_bytes(dtype: str, model: ModelSpec) -> float:
    """Return the mean bytes per parameter of a repeated layer. ``mxfp4`` quantises only routed experts."""
    base, weights = split_dtype(dtype)
    if weights != "mxfp4" or model.moe is None:
        return BYTES_PER_PARAMETER[weights]
    per_expert = (3 if model.gated_mlp else 2) * model.hidden * model.moe.expert_intermediate
    experts, total = per_expert * model.moe.num_experts, model.layer_params()
    return (experts * BYTES_PER_PARAMETER[weights] + (total - experts) * base_bytes(base)) / total


def base_bytes(dtype: str) -> float:
    """Return the bytes of an activation or embedding element: a model stored in 8 bits or less still computes in 16."""
    return max(2.0, BYTES_PER_PARAMETER[split_dtype(dtype)[0]])


def with_weight_bytes(model: ModelSpec, weight_bytes: float) -> ModelSpec:
    """Return the same model with another number of bytes per weight."""
    return replace(model, weight_bytes=weight_bytes)


def with_precision(model: ModelSpec, *, weights: str | None = None, kv: str | None = None) -> ModelSpec:
    """Return the same model with its layers' weights or its KV in another precision. None changes nothing.

    Args:
        model: its embeddings and LM head stay the same.
        weights: a name in `PRECISIONS`.
        kv: a name in `KV_PRECISIONS`.
    """
    if weights is not None:
        dtype = f"bfloat16+{PRECISIONS[weights]}"
        model = replace(model, weights=weights, weight_bytes=layer_weight_bytes(dtype, model))
    return model if kv is None else replace(model, kv_bytes=KV_PRECISIONS[kv])


def weights_of(model: ModelSpec) -> str:
    """Return the precision of the layers' weights, for people: its name, or the number of bytes if it has none."""
    if model.weights:
        return model.weights
    return "bf16" if model.weight_bytes == 2 else f"{model.weight_bytes:.3g} bytes a parameter"


def kv_of(model: ModelSpec) -> str:
    """Return the precision of the KV cache, for people."""
    return next(
        (n for n, size in KV_PRECISIONS.items() if size == model.kv_bytes), f"{model.kv_bytes:g} bytes a number"
    )
