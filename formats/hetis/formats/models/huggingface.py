"""The shape of a model from the ``config.json`` of a Hugging Face checkpoint.

Every architecture names its fields a little differently and omits what its library has defaults for: there is a
function for each family. An unlisted architecture is refused: a wrong shape would make every later figure wrong.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from hetis.formats.errors import DocumentError, did_you_mean, shown
from hetis.formats.fields import listed, mapping, whole
from hetis.formats.kinds import read_data
from hetis.formats.layers import spread_as_in_short
from hetis.formats.models import dtypes
from hetis.formats.models.config_json import NUM_EXPERTS, Config
from hetis.formats.models.families import (
    FAMILIES,
    INNER,
    LIBRARY_DEFAULTS,
    MODEL_TYPES,
    NESTED,
    NOT_MODELLED,
    supported,
)
from hetis.formats.models.layer_kinds import NAMES, in_usual_names
from hetis.formats.models.layered import unknown_fields
from hetis.formats.models.quantisation import quantisation_of, stated_kv_bytes, weights_precision
from hetis.formats.models.quantised_modules import layer_weight_bytes
from hetis.formats.models.unlike import GATED, UNGATED, activation, unknown
from hetis.formats.positions import Text
from hetis.solver.model import Experts, Kernel, ModelSpec


def model_from_config(
    data: dict[str, Any], source: Text, *, name: str, folder: Path | None = None, notes: list[str] | None = None
) -> ModelSpec:
    """Return the model of a ``config.json``. Raises DocumentError if the architecture is not supported (it lists those
    that are, or states what is not modelled), or fields are missing or impossible.

    Args:
        data: the parsed config.
        source: its text, for positions.
        name: name of the model, if the config has no ``_name_or_path``.
        folder: where the checkpoint is. A file there may state how it is quantised, if the config does not.
        notes: gets sentences about what was assumed.
    """
    architecture = _architecture(data, source)
    config = _config(data, source, architecture)
    config.quantisation = quantisation_of(config, folder)
    published = data.get("_name_or_path")  # often a path on the author's machine
    if isinstance(published, str) and re.fullmatch(r"[\w.-]{1,90}/[\w.-]{1,90}", published):
        name = published
    read = FAMILIES.get(architecture, unknown)
    model = read(config, name if name.isprintable() and name.strip() else "model")
    _refuse_lost_experts(config, model)
    linear = config.linear
    quantised = weights_precision(config, model, linear)
    dtype = _dtype(config, quantised)
    kv_bytes = stated_kv_bytes(config.quantisation, is_latent=model is not None and _is_latent(model))
    if config.problems or model is None:
        raise DocumentError(dict.fromkeys(config.problems))  # some fields are read for several parts
    base = dtypes.base_bytes(dtype)
    model = dataclasses.replace(model, activation_bytes=base, embedding_bytes=base, weights=quantised or "")
    if kv_bytes is not None:
        model = dataclasses.replace(model, kv_bytes=kv_bytes)
    if config.quantisation is None:
        weight_bytes = dtypes.layer_weight_bytes(dtype, model)
    else:
        weight_bytes = layer_weight_bytes(config.quantisation.data, model, dtype, linear)
    model = replace(model, weight_bytes=weight_bytes, layers=spread_as_in_short(model.layers))
    if quantised and dtypes.quantised_share(model) < 0.5:
        share = f"{dtypes.quantised_share(model):.0%} of its layers' parameters"
        config.notes.append(f"{model.name}: modules that its checkpoint names have {share}; the rest counts as 16 bits")
    if folder is not None:
        config.notes += _size_note(config, model, folder)
    if notes is not None:
        notes += config.notes
    return model


def _refuse_lost_experts(config: Config, model: ModelSpec | None) -> None:
    """Refuse to read a model with experts as a dense one, because their number has a name that is not known."""
    counted = any(config.data.get(name) is not None for name in NUM_EXPERTS)
    if model is None or counted or any(isinstance(mlp, Experts) for layer in model.layers for mlp in layer.mlps):
        return
    stated = [name for name in (*NAMES["num_experts_per_tok"], "moe_intermediate_size") if config.data.get(name)]
    if stated:
        known = " or ".join(NUM_EXPERTS)
        config.refuse(stated[0], f"is {shown(config.data[stated[0]])}, but no number of experts is given ({known})")


def _size_note(config: Config, model: ModelSpec, folder: Path) -> list[str]:
    """Return a sentence if a checkpoint's index states another size than its layers and tables have.

    The index counts layers that draft tokens, too.
    """
    index = folder / _INDEX
    if not index.is_file():
        return []
    data, _ = read_data(index)
    stated = whole(mapping(mapping(data).get("metadata")).get("total_size"), most=2**60)
    layers = (model.num_layers - model.prefix_layers) * model.layer_params()
    layers += model.prefix_layers * model.dense_layer_params()
    tables = model.embedding_params * (1 if model.tie_embeddings else 2) + model.vision_params
    counted = layers * model.weight_bytes + tables * model.embedding_bytes
    drafts = max((config.whole(name, 0, least=0) for name in _DRAFTING), default=0)
    most = counted + drafts * (model.layer_params() + 2 * model.hidden**2) * model.weight_bytes
    if stated is None or (1.0 - _MOST_DIFFERENCE) * counted <= stated <= (1.0 + _MOST_DIFFERENCE) * most:
        return []
    return [
        f"{model.name}: {_INDEX} states {stated / 1e9:.1f} GB, its layers and tables as read have "
        f"{counted / 1e9:.1f} GB ({counted / stated - 1.0:+.0%}): plans use the latter"
    ]


_INDEX = "model.safetensors.index.json"
_DRAFTING = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "num_mtp_modules")
_MOST_DIFFERENCE = 0.03  # between the size that a checkpoint states and that of its layers


def _is_latent(model: ModelSpec) -> bool:
    """Return whether all heads share one vector per token, which engines cache in a layout of its own."""
    return not model.kernels.isdisjoint((Kernel.LATENT, Kernel.COMPRESSED))


def _config(data: dict[str, Any], source: Text, architecture: str) -> Config:
    """Return the reader of the language model's fields."""
    at = next((name for name in INNER if isinstance(data.get(name), dict)), "text_config")
    text = data.get(at)
    if at == "thinker_config" and isinstance(text, dict):  # Qwen-Omni: what speaks is left out
        return _config({**text, "text_config": text.get("text_config")}, source, architecture)
    is_whole = {"hidden_size", "num_hidden_layers"} <= set(in_usual_names(data))  # without what is inside
    is_nested = architecture in NESTED or (isinstance(text, dict) and not is_whole)
    if not is_nested or (text is None and "hidden_size" in data):
        return Config(data, source, list(source.problems), whole_data=data)
    if not isinstance(text, dict):
        problem = source.problem((at,), f"is {shown(text)}, must be a mapping")
        raise DocumentError([*source.problems, problem])
    # The whole config of a vision model states how its checkpoint is quantised, and whether its embeddings are tied.
    shared = ("quantization_config", "tie_word_embeddings", "quantization")
    usual = LIBRARY_DEFAULTS.get(str(text.get("model_type")), {})
    whole = usual | {name: data[name] for name in shared if name in data} | text
    if str(data.get("transformers_version")).startswith("5.") and shared[1] in data:
        whole[shared[1]] = data[shared[1]]  # version 5 ties by the whole model's field alone
    return Config(whole, source, list(source.problems), (at,), whole_data=data)


def _architecture(data: dict[str, Any], source: Text) -> str:
    name = next(iter(listed(data.get("architectures"))), None)
    if name is None:
        name = MODEL_TYPES.get(str(data.get("model_type")), data.get("model_type"))
    if isinstance(name, str) and name in FAMILIES:
        return name
    path = ("architectures",) if "architectures" in data else ("model_type",)
    if isinstance(name, str) and name in NOT_MODELLED:
        what = f"architecture {shown(name)} has {NOT_MODELLED[name]}, which is not modelled yet"
        raise DocumentError([source.problem(path, what)])
    if isinstance(name, str) and _is_decoder(data, name):
        config = _config(data, source, name)
        unknown = [*unknown_fields(config), *([] if activation(config) in GATED | UNGATED else ["hidden_act"])]
        if not unknown:
            return name
        what = f"architecture {shown(name)} is not supported, and has fields of no known kind: {', '.join(unknown[:8])}"
        own = "a model can be described in a file of its own: hetis-plan schema ModelSpec"
        raise DocumentError([source.problem(path, f"{what}; {own}")])
    # A type of model that is not ours is no slip of the pen: Phi-3 is unlike Phi, whatever its name is like.
    is_other = data.get("model_type") is not None and str(data["model_type"]) not in MODEL_TYPES
    hint = did_you_mean(name, FAMILIES) if isinstance(name, str) and not is_other else ""
    what = f"architecture {shown(name)} is not supported{hint}; {supported()}"
    own = "a decoder built like one of these can be described in a file of its own: hetis-plan schema ModelSpec"
    raise DocumentError([source.problem(path, f"{what}; {own}")])


def _is_decoder(data: dict[str, Any], name: str) -> bool:
    """Return whether an architecture that is not known has the fields of a decoder, so that it may be read by these."""
    text = in_usual_names(next((data[each] for each in INNER if isinstance(data.get(each), dict)), data))
    has_heads = all(text.get(each) is not None for each in ("hidden_size", "num_attention_heads", "vocab_size"))
    is_decoder = name.endswith(("ForCausalLM", "ForConditionalGeneration", "LMHeadModel", "ChatModel"))
    return is_decoder and has_heads and not data.get("is_encoder_decoder") and data.get("model_type") is not None


def _dtype(config: Config, quantised: str | None) -> str:
    """Return the formats of activations and weights; see `hetis.formats.models.dtypes`.

    Weights stored in 32 bits count as 16, since engines load them so by default: vLLM 0.32 in
    ``_resolve_auto_dtype`` (vllm/config/model.py), SGLang in ``_get_and_verify_dtype`` (srt/configs/model_config.py).
    """
    stated = config.data.get("torch_dtype") or config.data.get("dtype") or "bfloat16"
    try:
        base, weights = dtypes.split_dtype(f"{stated}+{dtypes.PRECISIONS[quantised]}" if quantised else str(stated))
    except ValueError:
        config.refuse("torch_dtype", f"{shown(stated)} is not one of {', '.join(dtypes.BYTES_PER_PARAMETER)}")
        return "bfloat16"
    base, weights = ("bfloat16" if part == "float32" else part for part in (base, weights))
    return f"{base}+{weights}"
