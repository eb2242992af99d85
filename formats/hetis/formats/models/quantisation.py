"""How a checkpoint is quantised, as its ``config.json`` or a file beside it states."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hetis.formats.errors import shown
from hetis.formats.fields import mapping
from hetis.formats.kinds import read_data
from hetis.formats.models import dtypes
from hetis.formats.models.config_json import Config, LinearLayers
from hetis.formats.models.quantised_formats import (
    QUARK,
    compressed_groups,
    in_groups_of_torchao,
    quark_input,
    quark_precision,
)
from hetis.formats.models.quantised_modules import MODELOPT, compressed_precision, modelopt_precision, override_of_bits
from hetis.solver.model import ModelSpec

_SUPPORTED = (
    "fp8, fbgemm_fp8, mxfp4, mxfp8, bitsandbytes, modelopt, quark, awq, gptq, auto-round, torchao, "
    "compressed-tensors of 4 or 8 bits"
)
_DEEPSEEK_V4 = ("fp8", "deepseek_v4_fp8")  # names of the method that quantises DeepSeek-V4, see `_with_experts`
_QUANTISATION_FILE = "hf_quant_config.json"  # where ModelOpt's older checkpoints state how they are quantised

# What vLLM accepts in the KV scheme of compressed-tensors (`validate_kv_cache_scheme`).
_KV_SCHEME: Mapping[str, tuple[object, ...]] = {
    "type": ("float",),
    "num_bits": (8,),
    "strategy": ("tensor", "attn_head"),
    "symmetric": (True,),
}


def quantisation_of(config: Config, folder: Path | None) -> Config | None:
    """Return the part that states how weights are quantised, or None if there is none, or none that is readable."""
    if (found := config.data.get("quantization_config")) is not None:
        source, at = config.source, (*config.at, "quantization_config")
    elif (found := config.data.get("quantization")) is not None:  # MLX's, which states no method
        source, at = config.source, (*config.at, "quantization")
    elif folder is not None and (beside := folder / _QUANTISATION_FILE).is_file():
        data, source = read_data(beside)
        found, at = data.get("quantization") if isinstance(data, dict) else data, ("quantization",)
        config.problems += source.problems
        if isinstance(found, dict):
            found = {"quant_method": "modelopt", **found}
    else:
        return None
    if isinstance(found, dict):
        return Config(_with_experts(config, _in_one_form(found)), source, config.problems, at)
    config.problems.append(source.problem(at, f"is {shown(found)}, must be a mapping"))
    return None


def _in_one_form(quantisation: dict[str, Any]) -> dict[str, Any]:
    """Return a quantisation by ModelOpt or torchao, whatever name and nesting it has, in one form; vLLM reads all.

    Older versions of ModelOpt state no method, but which tool produced the checkpoint. What torchao states are groups
    as those of compressed-tensors.
    """
    stated = quantisation.get("quant_method") or mapping(quantisation.get("producer")).get("name")
    method = str(stated).lower()
    if method == "torchao":
        return in_groups_of_torchao(quantisation)
    if method.startswith("modelopt"):
        return {**quantisation, **mapping(quantisation.get("quantization")), "quant_method": "modelopt"}
    return quantisation | {"quant_method": _ALIASES[method]} if method in _ALIASES else quantisation


# Other names of methods in vLLM 0.32.
_ALIASES = dict.fromkeys(("gptq_marlin", "auto_gptq"), "gptq")
_ALIASES |= dict.fromkeys(("awq_marlin", "auto_awq"), "awq") | dict.fromkeys(("intel/auto-round", "inc"), "auto-round")
_ALIASES["gpt_oss_mxfp4"] = "mxfp4"


def _with_experts(config: Config, quantisation: dict[str, Any]) -> dict[str, Any]:
    """Return DeepSeek-V4's or Ling 3's quantisation with the format of its routed experts.

    As in vLLM 0.32 (models/deepseek_v4/quant_config.py), DeepSeek-V4's have MXFP4 unless the model's fields state
    otherwise, all else FP8. Ling's quantisation states it (``_configure_ling_fp8_quant_config``).
    """
    if of_experts := quantisation.get("routed_experts_quant_method"):
        return {**quantisation, "expert_dtype": "fp4" if of_experts == "mxfp4" else of_experts}
    method = str(quantisation.get("quant_method")).lower()
    if config.data.get("model_type") != "deepseek_v4" or method not in _DEEPSEEK_V4:
        return {name: value for name, value in quantisation.items() if name != "expert_dtype"}  # only V4 has that field
    stated = config.data.get("expert_dtype", quantisation.get("expert_dtype"))
    return {**quantisation, "expert_dtype": "fp4" if stated is None else stated}


def weights_precision(config: Config, model: ModelSpec | None, linear: LinearLayers) -> str | None:
    """Return the precision of quantised weights, a name in `dtypes.PRECISIONS`, or None if they are not quantised.

    ``model`` and the matrices of its ``linear`` attention determine what most weights are if groups of them differ.
    """
    if config.quantisation is None:
        return None
    quantisation = config.quantisation.data
    method = str(quantisation.get("quant_method", "")).lower()
    bits = quantisation.get("bits", quantisation.get("w_bit", 4))
    by_method = {"fp8": "fp8", "mxfp4": "mxfp4", "mxfp8": "fp8", "fbgemm_fp8": "fbgemm-fp8"}
    if "expert_dtype" in quantisation:
        return _of_experts(config.quantisation)
    if method in by_method:
        return by_method[method]
    if method == "auto-round" and str(quantisation.get("data_type", "int")).lower() not in ("int", "none"):
        kind = str(quantisation["data_type"]).lower()
        if (floats := _FLOATS.get(f"{kind[:5]} {bits}")) is None:
            config.quantisation.refuse("data_type", f"{shown(kind)} of {shown(bits)} bits is not supported")
        return floats
    if method in ("gptq", "auto-round") and bits in (4, 8) and model is not None:
        _refuse_other_bits(config.quantisation, bits, model, linear)
    if method in ("awq", "gptq", "auto-round") and bits in (4, 8):
        return {"awq": "awq-int4"}.get(method, "gptq-int4") if bits == 4 else "int8"
    if method == "compressed-tensors":
        return _of_groups(config.quantisation, model, linear)
    if method == "modelopt":
        precision = modelopt_precision(quantisation)
        if precision is None:
            known = f"{', '.join(MODELOPT)}, or MIXED_PRECISION of modules in quantized_layers that have one of these"
            config.quantisation.refuse("quant_algo", f"is {shown(quantisation.get('quant_algo'))}, must be {known}")
        return precision
    if method == "quark":
        precision = quark_precision(quantisation)
        if precision is None:
            known = f"{', '.join(QUARK)}, or fp4 in groups of 32 or, with a second scale, of 16"
            config.quantisation.refuse(
                "global_quant_config", f"weights must be {known}, the same in every layer (layer_quant_config)"
            )
        if (
            precision == "mxfp4"
            and model is not None
            and model.experts is None
            and quark_input(quantisation) != "mxfp4"
        ):
            # vLLM expands such weights in every step and multiplies in 16 bits (quark/schemes/quark_ocp_mx.py).
            config.quantisation.refuse(
                "global_quant_config",
                "input_tensors must be fp4 in groups of 32, as weights are, in a model without experts",
            )
        return precision
    if method == "bitsandbytes":
        return "bnb-int4" if quantisation.get("load_in_4bit") or quantisation.get("_load_in_4bit") else "bnb-int8"
    if not method:
        config.quantisation.refuse_all(f"states no quant_method; supported: {_SUPPORTED}")
        return None
    what = f"{method} with {shown(bits)} bits" if method in ("awq", "gptq") else shown(method)
    config.quantisation.refuse_all(f"{what} is not supported; supported: {_SUPPORTED}")
    return None


_FLOATS = {"mx_fp 4": "mxfp4", "mx_fp 8": "fp8", "nv_fp 4": "nvfp4", "fp8 8": "fp8"}  # AutoRound's, with their bits


def _refuse_other_bits(quantisation: Config, bits: int, model: ModelSpec, linear: LinearLayers) -> None:
    """Refuse a checkpoint of GPTQModel or AutoRound whose modules have different numbers of bits."""
    override = override_of_bits(quantisation.data, bits, model, linear)
    if override is not None:
        key, name = override
        other = quantisation.data[key][name]["bits"]
        why = "the expression cannot be read" if other == 16 else "modules of different bits are not supported"
        quantisation.refuse(key, f"{shown(name)} states {shown(other)} bits, all else has {bits}: {why}")


def _of_experts(quantisation: Config) -> str | None:
    """Return the precision of DeepSeek-V4's routed experts, which have nearly all of its weights."""
    stated = quantisation.data["expert_dtype"]
    if stated == "fp4" and str(quantisation.data.get("moe_quant_algo")).upper() == "NVFP4":
        return "nvfp4"
    known = {"fp4": "mxfp4", "fp8": "fp8"}
    if not isinstance(stated, str) or stated not in known:
        quantisation.problems.append(
            quantisation.source.problem(("expert_dtype",), f"is {shown(stated)}, must be {' or '.join(known)}")
        )
        return None
    return known[stated]


def _of_groups(quantisation: Config, model: ModelSpec | None, linear: LinearLayers) -> str | None:
    """Return the precision of most weights of a checkpoint of compressed-tensors, whose groups may differ."""
    data = quantisation.data
    if data.get("config_groups") == {}:
        return None  # only KV is quantised
    try:
        groups = compressed_groups(data)
    except ValueError as unknown:
        quantisation.refuse_all(f"compressed-tensors {unknown} is not supported; supported: {_SUPPORTED}")
        return None
    if model is None:
        return None  # the caller reports what is wrong with it
    precision = compressed_precision(data, model, linear)
    if precision is None:
        targets = shown(", ".join(target for group in groups for target in group.targets))
        what = f"have the targets {targets}, but no matrix of the model's layers matches, or all are ignored"
        quantisation.refuse("config_groups", what)
    return precision


def stated_kv_bytes(quantisation: Config | None, *, is_latent: bool) -> float | None:
    """Return the bytes of an element of the quantised KV cache that a checkpoint states; None: it states none.

    It is read as vLLM 0.32 does (`resolve_kv_cache_dtype_string` in vllm/utils/torch_utils.py), which ignores unknown
    values of ModelOpt's, and does not apply the scheme of compressed-tensors to latent attention.
    """
    data = {} if quantisation is None else quantisation.data
    method, scheme = str(data.get("quant_method", "")).lower(), data.get("kv_cache_scheme")
    if method == "modelopt":
        stated = scheme or data.get("kv_cache_quant_algo")
        if isinstance(stated, dict):
            number = [stated.get("type"), stated.get("num_bits")]
            is_fp8 = number == ["float", 8] and stated.get("dynamic") is False
            stated = "fp8" if is_fp8 else "nvfp4" if number == ["float", 4] else None
        algorithm = str(stated).lower()
        return dtypes.BYTES_PER_PARAMETER[algorithm] if algorithm in ("fp8", "nvfp4") else None
    if method != "compressed-tensors" or quantisation is None or scheme is None or is_latent:
        return None
    for name, possible in _KV_SCHEME.items():
        if not isinstance(scheme, dict) or scheme.get(name) not in possible:
            is_what = f"has {name} {shown(scheme.get(name))}" if isinstance(scheme, dict) else f"is {shown(scheme)}"
            wanted = ", ".join(f"{name} {' or '.join(map(shown, known))}" for name, known in _KV_SCHEME.items())
            quantisation.refuse("kv_cache_scheme", f"{is_what}, must have {wanted}, the only ones in vLLM")
            break
    return dtypes.BYTES_PER_PARAMETER["fp8"]
