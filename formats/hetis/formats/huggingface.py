"""The shape of a model from the ``config.json`` of a Hugging Face checkpoint.

`architectures.py` turns the fields of each architecture into a `ModelSpec`; the formats of activations and weights are
read here. An unlisted architecture is refused, because a wrong shape would make every later figure wrong.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from hetis.formats import dtypes
from hetis.formats.architectures import FAMILIES, MODEL_TYPES, NESTED, NOT_MODELLED, Config
from hetis.formats.errors import DocumentError, did_you_mean, shown
from hetis.formats.positions import Text
from hetis.solver.model import ModelSpec


def model_from_config(data: dict[str, Any], source: Text, *, name: str) -> ModelSpec:
    """Return the model of a ``config.json``.

    Args:
        data: the parsed config.
        source: its text, for positions.
        name: of the model, if the config has no ``_name_or_path``.

    Raises:
        DocumentError: the architecture is not supported (it lists those that are, or says what is not modelled), or
            fields are missing or impossible.
    """
    architecture = _architecture(data, source)
    config = _config(data, source, architecture)
    published = data.get("_name_or_path")  # often a path on the author's machine
    if isinstance(published, str) and re.fullmatch(r"[\w.-]{1,90}/[\w.-]{1,90}", published):
        name = published
    model = FAMILIES[architecture](config, name if name.isprintable() and name.strip() else "model")
    quantised = _quantised(config)
    dtype = _dtype(config, quantised)
    if config.problems or model is None:
        raise DocumentError(config.problems)
    base = dtypes.base_bytes(dtype)
    model = dataclasses.replace(model, activation_bytes=base, embedding_bytes=base, weights=quantised or "")
    if _quantises_experts_alone(config):
        return dtypes.with_weight_bytes(model, dtypes.experts_weight_bytes(dtype, model))
    return dtypes.with_weight_bytes(model, dtypes.layer_weight_bytes(dtype, model))


def _quantises_experts_alone(config: Config) -> bool:
    """Return whether attention and shared experts are among what compressed-tensors leaves in 16 bits."""
    quantisation = config.data.get("quantization_config")
    ignored = quantisation.get("ignore") if isinstance(quantisation, dict) else None
    names = " ".join(name for name in ignored if isinstance(name, str)) if isinstance(ignored, list) else ""
    return "self_attn" in names and "shared_experts" in names


def _config(data: dict[str, Any], source: Text, architecture: str) -> Config:
    """Return the reader of the language model's fields."""
    text = data.get("text_config")
    if architecture not in NESTED or (text is None and "hidden_size" in data):
        return Config(data, source, list(source.problems), whole_data=data)
    if not isinstance(text, dict):
        problem = source.problem(("text_config",), f"is {shown(text)}, must be a mapping")
        raise DocumentError([*source.problems, problem])
    # The whole config says how checkpoints of a vision model are quantised, and what their embeddings share.
    shared: dict[str, Any] = {
        name: data[name] for name in ("quantization_config", "tie_word_embeddings") if name in data
    }
    return Config(shared | text, source, list(source.problems), ("text_config",), whole_data=data)


def _architecture(data: dict[str, Any], source: Text) -> str:
    listed = data.get("architectures")
    name = listed[0] if isinstance(listed, list) and listed else None
    if name is None:
        name = MODEL_TYPES.get(str(data.get("model_type")), data.get("model_type"))
    if isinstance(name, str) and name in FAMILIES:
        return name
    path = ("architectures",) if "architectures" in data else ("model_type",)
    if isinstance(name, str) and name in NOT_MODELLED:
        what = f"architecture {shown(name)} has {NOT_MODELLED[name]}, which is not modelled yet"
        raise DocumentError([source.problem(path, what)])
    hint = did_you_mean(name, FAMILIES) if isinstance(name, str) else ""
    supported = ", ".join(FAMILIES)
    raise DocumentError(
        [source.problem(path, f"architecture {shown(name)} is not supported{hint}; supported: {supported}")]
    )


def _dtype(config: Config, quantised: str | None) -> str:
    """Return the formats of activations and weights; see `hetis.formats.dtypes`."""
    base = config.data.get("torch_dtype") or config.data.get("dtype") or "bfloat16"
    dtype = f"{base}+{dtypes.PRECISIONS[quantised]}" if quantised else str(base)
    try:
        dtypes.split_dtype(dtype)
    except ValueError:
        config.refuse("torch_dtype", f"{shown(base)} is not one of {', '.join(dtypes.BYTES_PER_PARAMETER)}")
        return "bfloat16"
    return dtype


def _quantised(config: Config) -> str | None:
    """Return the precision of quantised weights, a name in `dtypes.PRECISIONS`, or None if they are not quantised."""
    quantisation = config.data.get("quantization_config")
    if quantisation is None:
        return None
    if not isinstance(quantisation, dict):
        config.refuse("quantization_config", f"is {shown(quantisation)}, must be a mapping")
        return None
    method = str(quantisation.get("quant_method", "")).lower()
    bits = quantisation.get("bits", quantisation.get("w_bit", 4))
    by_method = {"fp8": "fp8", "mxfp4": "mxfp4", "fbgemm_fp8": "fp8"}
    if method in by_method:
        return by_method[method]
    if method in ("awq", "gptq", "auto-round") and bits in (4, 8):
        return {"awq": "awq-int4"}.get(method, "gptq-int4") if bits == 4 else "int8"
    if method == "compressed-tensors":
        groups = quantisation.get("config_groups")
        first = next(iter(groups.values()), None) if isinstance(groups, dict) else None
        weights = first.get("weights") if isinstance(first, dict) else None
        weights = weights if isinstance(weights, dict) else {}
        bits, is_float = weights.get("num_bits"), weights.get("type") == "float"
        if bits in (4, 8):
            return {(4, True): "nvfp4", (8, True): "fp8", (4, False): "int4", (8, False): "int8"}[bits, is_float]
    if method == "modelopt":
        bits = str(quantisation.get("quant_algo", "")).upper()
        if bits in ("FP8", "NVFP4"):
            return bits.lower()
    if method == "bitsandbytes":
        return "int4" if quantisation.get("load_in_4bit") or quantisation.get("_load_in_4bit") else "int8"
    what = (
        f"{method} with {bits} bits" if method in ("awq", "gptq", "compressed-tensors", "modelopt") else shown(method)
    )
    config.refuse(
        "quantization_config",
        f"{what} is not supported; supported: fp8, mxfp4, bitsandbytes, modelopt, awq, gptq, "
        "compressed-tensors of 4 or 8 bits",
    )
    return None
