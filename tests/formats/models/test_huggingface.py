"""Shapes from config.json agree with the catalogue and with published parameter counts."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from hetis.formats import catalogue
from hetis.formats.documents import dump
from hetis.formats.errors import DocumentError
from hetis.formats.models import checkpoint_names, families, unlike
from hetis.formats.models.config_json import NO_LINEAR_LAYERS
from hetis.formats.models.document import load_model
from hetis.formats.models.families import FAMILIES, NOT_MODELLED
from hetis.solver.model import Kernel, ModelSpec
from tests.models import InShort

FOLDER = Path(__file__).parents[1] / "huggingface"
CONFIGS = sorted(FOLDER.glob("*.json"))
KNOWN = {entry.model.name for entry in catalogue.models()}
PUBLISHED_B: dict[str, tuple[float, float | None]] = {  # billions, from the model cards; also the active ones if exact
    "google/gemma-7b": (8.54, 8.54),
    "deepseek-ai/DeepSeek-V2-Lite": (15.7, 2.66),
    "Qwen/Qwen2-57B-A14B": (57.4, 14.2),
    "TheBloke/Llama-2-70B-AWQ": (68.98, 68.98),
    "MiniMaxAI/MiniMax-Text-01": (456, None),  # see test_linear_attention.py for the active ones
    "MiniMaxAI/MiniMax-M1-80k": (456, None),
    "deepseek-ai/DeepSeek-V4-Pro": (1573, None),  # the card rounds to 1.6T; see test_compressed_attention.py
    "deepseek-ai/DeepSeek-V4-Flash": (284, None),
    "moonshotai/Kimi-Linear-48B-A3B-Instruct": (49.12, None),  # counted by transformers 5.19; its card leaves some out
    "microsoft/Phi-3-mini-4k-instruct": (3.82, 3.82),
    "microsoft/Phi-3.5-MoE-instruct": (41.9, 6.6),
    "microsoft/phi-4": (14.7, 14.7),
    "microsoft/Phi-4-mini-instruct": (3.84, 3.84),
    "Qwen/Qwen2-VL-7B-Instruct": (8.29, None),
    "Qwen/Qwen2.5-VL-7B-Instruct": (8.29, None),
    "Qwen/Qwen2.5-VL-72B-Instruct": (73.4, None),
}


def config_of(name: str) -> dict[str, Any]:
    """Return a published config, to be changed."""
    data: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return data


def load(folder: Path, data: dict[str, Any]) -> ModelSpec:
    """Return the model of a config that is written into ``folder``."""
    (folder / "config.json").write_text(json.dumps(data, indent=1))
    return load_model(folder / "config.json")


def repository(path: Path) -> str:
    return path.stem.replace("__", "/")


@pytest.mark.parametrize("path", [p for p in CONFIGS if repository(p) in KNOWN], ids=repository)
def test_a_config_gives_the_shape_of_the_catalogue(path: Path) -> None:
    entry = catalogue.find_model(repository(path))
    model = load_model(path)
    assert model.params() / 1e9 == pytest.approx(entry.params_b, rel=0.01)
    assert dataclasses.replace(model, name=entry.model.name) == entry.model


@pytest.mark.parametrize("path", [p for p in CONFIGS if repository(p) not in KNOWN], ids=repository)
def test_a_config_outside_the_catalogue_has_the_published_parameters(path: Path) -> None:
    model = load_model(path)
    total, active = PUBLISHED_B[repository(path)]
    assert model.params() / 1e9 == pytest.approx(total, rel=0.01)
    assert active is None or model.active_params() / 1e9 == pytest.approx(active, rel=0.015)


def test_every_family_with_a_reader_of_its_own_has_a_fixture_unless_renamed() -> None:
    """Families that only map names are counted against transformers in test_layered.py."""
    seen = {json.loads(path.read_text())["architectures"][0] for path in CONFIGS}
    renamed = {"KimiK2ForCausalLM", "MistralLarge3ForCausalLM", "Qwen3VLForConditionalGeneration"}
    renamed |= {"Qwen3NextForCausalLM", "MiniMaxForCausalLM", "Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM"}
    renamed |= {"Glm4MoeLiteForCausalLM", "Qwen3OmniMoeForConditionalGeneration"}
    by_layers = (unlike.by_layers, families._of_inner_model, unlike.deci)
    own = {name for name, read in FAMILIES.items() if getattr(read, "func", read) not in by_layers}
    assert own - seen == renamed


def test_a_language_model_inside_of_another_is_read_where_it_stands(tmp_path: Path) -> None:
    """Kimi K2.5 is Kimi K2 with experts of 4 bits; problems name the path of the text model's fields."""
    kimi, before = load_model(FOLDER / "moonshotai__Kimi-K2.5.json"), catalogue.find_model("Kimi-K2-Instruct").model
    assert (kimi.weights, kimi.kv_bytes) == ("int4", 2.0)
    assert kimi.layers == before.layers
    # Routed experts in 4 bits, all else in 16: 594 GB with embeddings, in groups of 32.
    layers = (kimi.num_layers - kimi.prefix_layers) * kimi.layer_params() * kimi.weight_bytes
    assert layers / 1e9 == pytest.approx(1015 * 0.5625 + 9.4 * 2, rel=0.01)
    data = json.loads((FOLDER / "moonshotai__Kimi-K2.5.json").read_text())
    data["text_config"]["hidden_size"] = 0
    data["text_config"].pop("vocab_size")
    (tmp_path / "config.json").write_text(json.dumps(data, indent=1))
    with pytest.raises(DocumentError) as caught:
        load_model(tmp_path / "config.json")
    assert "text_config.hidden_size: is 0" in str(caught.value)
    assert "vocab_size is missing" in str(caught.value)
    (tmp_path / "config.json").write_text(json.dumps(data | {"text_config": 7}))
    with pytest.raises(DocumentError, match="text_config: is 7, must be a mapping") as only:
        load_model(tmp_path / "config.json")
    assert "missing" not in str(only.value)


@pytest.mark.parametrize(
    ("name", "omitted"),
    [
        ("Qwen__Qwen2-VL-7B-Instruct", ("depth", "embed_dim", "mlp_ratio", "hidden_size", "temporal_patch_size")),
        ("Qwen__Qwen2.5-VL-7B-Instruct", ("depth", "intermediate_size", "out_hidden_size", "patch_size")),
    ],
)
def test_qwen_vl_is_read_from_a_text_config_and_without_the_defaults_of_its_library(
    tmp_path: Path, name: str, omitted: tuple[str, ...]
) -> None:
    """Newer transformers write the text model apart, and no field that equals the default of its class."""
    data = config_of(name)
    flat = load(tmp_path, data)
    outside = ("architectures", "model_type", "tie_word_embeddings", "vision_config")
    text = {field: value for field, value in data.items() if field not in (*outside, "vocab_size")}
    nested = {field: data[field] for field in outside} | {"text_config": text}
    for field in omitted:
        del nested["vision_config"][field]
    assert load(tmp_path, nested) == flat


def test_the_ratio_of_a_tower_may_be_written_with_a_point(tmp_path: Path) -> None:
    """A ratio is no count."""
    data = config_of("Qwen__Qwen2-VL-7B-Instruct")
    flat = load(tmp_path, data)
    assert load(tmp_path, data | {"vision_config": data["vision_config"] | {"mlp_ratio": 4.0}}) == flat
    for ratio in (3.7, "4", True, 0.0, 1e300):
        with pytest.raises(DocumentError, match=r"mlp_ratio: is .*, must be a whole number from 1"):
            load(tmp_path, data | {"vision_config": data["vision_config"] | {"mlp_ratio": ratio}})
    with pytest.raises(DocumentError, match=r"embed_dim: is 1280\.0, must be a whole number"):
        load(tmp_path, data | {"vision_config": data["vision_config"] | {"embed_dim": 1280.0}})


@pytest.mark.parametrize("channels", ["in_chans", "in_channels"])
def test_channels_of_qwen_vl_count_by_either_name(tmp_path: Path, channels: str) -> None:
    """Its configs say ``in_chans``; transformers writes ``in_channels``, which precedes."""
    data = config_of("Qwen__Qwen2-VL-7B-Instruct")
    more = load(tmp_path, data | {"vision_config": data["vision_config"] | {channels: 4}})
    assert more.vision_params - load(tmp_path, data).vision_params == 1280 * 14**2 * 2


@pytest.mark.parametrize("name", ["Qwen__Qwen2-VL-7B-Instruct", "Qwen__Qwen2.5-VL-7B-Instruct"])
def test_sliding_windows_of_qwen_vl_and_impossible_towers_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DocumentError, match="use_sliding_window: is true, only models without sliding windows are"):
        load(tmp_path, config_of(name) | {"use_sliding_window": True, "max_window_layers": 0})
    data = config_of(name)
    data["vision_config"]["hidden_size"] = 0
    with pytest.raises(DocumentError, match="hidden_size: is 0, must be a whole number from 1") as caught:
        load(tmp_path, data)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(("architecture", "what"), NOT_MODELLED.items())
def test_what_is_not_modelled_is_refused_by_name(tmp_path: Path, architecture: str, what: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    with pytest.raises(DocumentError) as caught:
        load_model(tmp_path / "config.json")
    assert f"has {what}" in str(caught.value)
    assert architecture not in FAMILIES


def test_four_bit_weights_are_about_half_a_byte_and_embeddings_stay_16_bit() -> None:
    model = load_model(FOLDER / "TheBloke__Llama-2-70B-AWQ.json")
    assert model.weight_bytes == 0.53125
    assert (model.embedding_bytes, model.activation_bytes, model.kv_bytes) == (2.0, 2.0, 2.0)


@pytest.mark.parametrize("stated", ["float32", "torch.float32", "fp32"])
def test_a_checkpoint_in_32_bits_counts_as_16_which_engines_load(tmp_path: Path, stated: str) -> None:
    config = json.loads((FOLDER / f"{LLAMA}.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    in_16_bits = load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"torch_dtype": stated}))
    model = load_model(tmp_path)
    assert model == in_16_bits
    assert (model.weight_bytes, model.activation_bytes, model.embedding_bytes) == (2.0, 2.0, 2.0)
    quantised = config | {"torch_dtype": stated, "quantization_config": {"quant_method": "awq", "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(quantised))
    model = load_model(tmp_path)
    assert (model.weight_bytes, model.activation_bytes, model.embedding_bytes) == (0.53125, 2.0, 2.0)


def compressed(**weights: object) -> dict[str, object]:
    """Return a quantisation config of the library compressed-tensors."""
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}


def quark(*scales: object, **weight: object) -> dict[str, object]:
    """Return a config as written by AMD's Quark, with KV in FP8, which vLLM does not enable by itself."""
    every = {"weight": list(scales) or weight, "input_tensors": {"dtype": "fp8_e4m3"}, "output_tensors": None}
    return {
        "quant_method": "quark",
        "global_quant_config": every,
        "layer_quant_config": {"*k_proj": {**every, "output_tensors": {"dtype": "fp8_e4m3"}}},
        "exclude": ["lm_head"],
        "export": {"kv_cache_group": ["*k_proj"], "pack_method": "reorder"},
    }


@pytest.mark.parametrize(
    ("quantisation", "weight_bytes", "weights"),
    [
        ({"quant_method": "gptq", "bits": 8}, 1.0, "int8"),
        ({"quant_method": "gptq", "bits": 4}, 0.53125, "gptq-int4"),
        ({"quant_method": "awq", "bits": 4}, 0.53125, "awq-int4"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}, 0.53125, "gptq-int4"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}, 0.5625, "gptq-int4"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}, 0.578125, "gptq-int4"),
        ({"quant_method": "gptq", "bits": 4, "group_size": -1}, 0.53125, "gptq-int4"),
        ({"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True}, 0.5390625, "awq-int4"),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 32, "zero_point": True}, 0.578125, "awq-int4"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 10**400}, 0.53125, "gptq-int4"),
        ({"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True}, 0.5625, "gptq-int4"),
        (compressed(num_bits=4, type="int", group_size=32), 0.5625, "int4"),
        (compressed(num_bits=4, type="int", group_size=True), 0.53125, "int4"),
        ({"quant_method": "fp8"}, 1.0, "fp8"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 0.53125, "bnb-int4"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 1.0, "bnb-int8"),
        ({"quant_method": "fbgemm_fp8"}, 1.0, "fbgemm-fp8"),
        (compressed(num_bits=8), 1.0, "int8"),
        (compressed(num_bits=8, type="float"), 1.0, "fp8"),
        (compressed(num_bits=4, type="float"), 0.5625, "nvfp4"),
        (compressed(num_bits=4, type="float", group_size=16, strategy="tensor_group"), 0.5625, "nvfp4"),
        (compressed(num_bits=4, type="float", group_size=32, strategy="group"), 0.53125, "mxfp4"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, 0.5625, "nvfp4"),
        ({"quant_method": "modelopt_fp4", "quant_algo": "NVFP4"}, 0.5625, "nvfp4"),
        ({"quant_method": "ModelOpt", "quantization": {"quant_algo": "FP8"}}, 1.0, "fp8"),
        ({"producer": {"name": "modelopt", "version": "0.31.0"}, "quant_algo": "FP8"}, 1.0, "fp8"),
        ({"quant_method": "mxfp8", "ignored_layers": ["lm_head"]}, 1.0, "fp8"),
        (quark(dtype="fp8_e4m3", qscheme="per_tensor"), 1.0, "fp8"),
        (quark({"dtype": "fp4", "group_size": 16}, {"dtype": "fp8_e4m3"}), 0.5625, "nvfp4"),
        (quark(dtype="int8"), 1.0, "int8"),
        (quark(dtype="uint4", group_size=32, symmetric=False), 0.578125, "int4"),
        (quark(dtype="uint4", group_size=128, symmetric=False), 0.53125, "int4"),
    ],
)
def test_quantisation_is_honoured(
    tmp_path: Path, quantisation: dict[str, object], weight_bytes: float, weights: str
) -> None:
    config = json.loads((FOLDER / "meta-llama__Llama-2-70b-hf.json").read_text()) | {
        "quantization_config": quantisation
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load_model(tmp_path)
    assert (model.weight_bytes, model.weights) == (weight_bytes, weights)


def test_groups_of_eight_bits_do_not_make_four_bits_larger(tmp_path: Path) -> None:
    """The MLP has groups of 128 in 4 bits. Attention is in 8 bits, whose smaller groups are not those of int4."""
    groups = {
        "mlp": {"targets": ["re:.*mlp.*"], "weights": {"num_bits": 4, "type": "int", "group_size": 128}},
        "attention": {"targets": ["re:.*self_attn.*"], "weights": {"num_bits": 8, "type": "int", "group_size": 32}},
    }
    config = json.loads((FOLDER / "meta-llama__Llama-2-70b-hf.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors", "config_groups": groups}
    (tmp_path / "config.json").write_text(json.dumps(config))
    share = 150_994_944 / 855_638_016  # of attention
    assert load_model(tmp_path).weight_bytes == pytest.approx(share + (1 - share) * 0.53125)


ATTENTION_LEFT, SHARED_LEFT = "model.layers.*.self_attn*", "re:.*shared_experts.*"
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4"}


@pytest.mark.parametrize(
    ("published", "left", "weight_bytes"),
    [
        # A layer of Llama-2-70B has 855,638,016 parameters, 150,994,944 of them in attention.
        (
            "meta-llama__Llama-2-70b-hf",
            {"exclude_modules": [ATTENTION_LEFT]},
            0.5625 + 1.4375 * 150_994_944 / 855_638_016,
        ),
        (
            "meta-llama__Llama-2-70b-hf",
            {"exclude_modules": ["model.layers.0.self_attn.q_proj"]},
            0.5625 + 1.4375 * 8192**2 / 80 / 855_638_016,
        ),
        ("meta-llama__Llama-2-70b-hf", {"exclude_modules": ["model.layers.*.self_attn.q_norm", "lm_head"]}, 0.5625),
        # One of DeepSeek-V3 has 11,507,269,632; attention 187,105,280, of which the output takes 117,440,512, and the
        # shared expert 44,040,192.
        (
            "deepseek-ai__DeepSeek-V3",
            {
                "ignore": [
                    f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(61) for name in ("q_a", "q_b")
                ]
            },
            0.5625 + 1.4375 * 1536 * (7168 + 128 * 192) / 11_507_269_632,
        ),
        ("deepseek-ai__DeepSeek-V3", {"ignore": [SHARED_LEFT]}, 0.5625 + 1.4375 * 44_040_192 / 11_507_269_632),
        (
            "deepseek-ai__DeepSeek-V3",
            {"modules_to_not_convert": [ATTENTION_LEFT, SHARED_LEFT]},
            0.5625 + 1.4375 * (11_507_269_632 - 256 * 44_040_192) / 11_507_269_632,
        ),
    ],
)
def test_modules_that_are_left_in_16_bits_count_as_such(
    tmp_path: Path, published: str, left: dict[str, object], weight_bytes: float
) -> None:
    config = json.loads((FOLDER / f"{published}.json").read_text()) | {"quantization_config": MODELOPT | left}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_model(tmp_path).weight_bytes == pytest.approx(weight_bytes, rel=1e-12)


@pytest.mark.parametrize(
    ("left", "share"),
    [
        (["model.layers.*.self_attn.qkv_proj"], 5120 * (5120 + 2 * 1280)),
        (["model.layers.*.mlp.gate_up_proj"], 2 * 5120 * 17920),
        (["model.layers.*.self_attn*", "re:.*down_proj"], 5120 * (2 * 5120 + 2 * 1280 + 17920)),
    ],
)
def test_matrices_that_phi_joins_count_where_they_are_left_in_16_bits(
    tmp_path: Path, left: list[str], share: int
) -> None:
    layer = 5120 * (2 * 5120 + 2 * 1280 + 3 * 17920)
    model = load(tmp_path, config_of("microsoft__phi-4") | {"quantization_config": MODELOPT | {"ignore": left}})
    assert model.weight_bytes == pytest.approx(0.5625 + 1.4375 * share / layer, rel=1e-12)


def test_a_checkpoint_of_quark_leaves_out_what_it_excludes_and_has_one_format(tmp_path: Path) -> None:
    config = json.loads((FOLDER / "meta-llama__Llama-2-70b-hf.json").read_text())
    found = quark(dtype="fp8_e4m3")

    def load(**changes: object) -> ModelSpec:
        (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {**found, **changes}}))
        return load_model(tmp_path)

    left = load(exclude=["lm_head", "re:.*self_attn.*"])
    assert left.weight_bytes == pytest.approx(1.0 + 150_994_944 / 855_638_016, rel=1e-12)
    assert left.kv_bytes == 2.0
    other = {"*down_proj": {"weight": {"dtype": "int4"}}}
    unknown = {"weight": {"dtype": "fp6_e3m2"}}
    wrong: list[dict[str, object]] = [
        {"layer_quant_config": other},
        {"global_quant_config": unknown, "layer_quant_config": {}},
        {"global_quant_config": None, "layer_quant_config": None},
        {"layer_quant_config": {"*self_attn*": {"weight": None}}},
        {"layer_quant_config": [1]},
        {"layer_type_quant_config": {"linear": 3}},
    ]
    for changes in wrong:
        with pytest.raises(DocumentError, match=r"global_quant_config: weights must be fp8_e4m3, int8, "):
            load(**changes)


def test_a_dense_checkpoint_of_quark_in_mxfp4_has_activations_in_it(tmp_path: Path) -> None:
    """Engines multiply in four bits only if both are; experts alone may be MXFP4 with activations of any format."""
    mxfp4 = {"dtype": "fp4", "group_size": 32, "qscheme": "per_group", "scale_format": "e8m0"}

    def load(name: str, inputs: object, **of_layers: object) -> ModelSpec:
        every = {"weight": mxfp4, "input_tensors": inputs}
        quantisation = {"quant_method": "quark", "global_quant_config": every, "layer_quant_config": of_layers}
        config = json.loads((FOLDER / f"{name}.json").read_text()) | {"quantization_config": quantisation}
        (tmp_path / "config.json").write_text(json.dumps(config))
        return load_model(tmp_path)

    llama, mixtral = "meta-llama__Llama-2-70b-hf", "mistralai__Mixtral-8x7B-v0.1"
    dynamic = mxfp4 | {"is_dynamic": True}
    model = load(llama, dynamic, k_proj={"weight": mxfp4, "input_tensors": dynamic})
    assert (model.weights, model.weight_bytes) == ("mxfp4", 0.53125)
    for inputs in (None, {"dtype": "fp8_e4m3"}):
        assert load(mixtral, inputs).weights == "mxfp4"
        with pytest.raises(DocumentError, match="global_quant_config: input_tensors must be fp4 in groups of 32"):
            load(llama, inputs)
    with pytest.raises(DocumentError, match="input_tensors must be fp4"):
        load(llama, dynamic, k_proj={"weight": mxfp4})


def test_a_checkpoint_of_mixed_precision_counts_each_module_by_its_own_format(tmp_path: Path) -> None:
    """Llama-2-70B with attention in 8 bits and the MLP in 4, except an unlisted matrix in 16."""
    formats = {"self_attn.q": "FP8", "self_attn.k": "FP8", "self_attn.v": "FP8", "self_attn.o": "FP8"}
    formats |= {"mlp.gate": "W4A16_NVFP4", "mlp.up": "W4A16_NVFP4", "mlp.down": "NVFP4"}
    modules = {
        f"model.layers.{layer}.{name}_proj": {"quant_algo": found}
        for layer in range(80)
        for name, found in formats.items()
    }
    del modules["model.layers.7.mlp.up_proj"]
    quantisation = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": modules}
    config = json.loads((FOLDER / "meta-llama__Llama-2-70b-hf.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": quantisation}))
    model = load_model(tmp_path)
    assert model.weights == "nvfp4"
    plain = (2 - 0.5625) * 8192 * 28672 / 80
    expected = 0.5625 + ((1 - 0.5625) * 150_994_944 + plain) / 855_638_016
    assert model.weight_bytes == pytest.approx(expected, rel=1e-12)


def group(precision: str, *targets: str) -> dict[str, object]:
    """Return a group of compressed-tensors as llm-compressor writes it."""
    forms: dict[str, tuple[int, str, str, int | None]] = {
        "fp8": (8, "float", "channel", None),
        "nvfp4": (4, "float", "tensor_group", 16),
        "mxfp4": (4, "float", "group", 32),
        "int4": (4, "int", "group", None),
    }
    names = ("num_bits", "type", "strategy", "group_size")
    return {"targets": list(targets), "weights": dict(zip(names, forms[precision], strict=True))}


def load_grouped(folder: Path, published: str, groups: list[dict[str, object]], *ignore: str) -> ModelSpec:
    config = json.loads((FOLDER / f"{published}.json").read_text())
    named = {f"group_{i}": each for i, each in enumerate(groups)}
    quantisation = {"quant_method": "compressed-tensors", "config_groups": named, "ignore": ["lm_head", *ignore]}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantisation}))
    return load_model(folder)


LLAMA, DEEPSEEK = "meta-llama__Llama-2-70b-hf", "deepseek-ai__DeepSeek-V3"
OF_ATTENTION, OF_MLP = "re:.*self_attn.*", "re:.*mlp.*"
# Parameters of a layer of Llama-2-70B, of its attention, and of a matrix of its MLP; then of a layer of DeepSeek-V3, of
# routed experts and of its shared one; the rest is attention and the router.
LAYER, ATTENTION, MATRIX = 855_638_016, 150_994_944, 8192 * 28672
EXPERTS_LAYER, ROUTED, SHARED = 11_507_269_632, 256 * 44_040_192, 44_040_192


@pytest.mark.parametrize(
    ("published", "groups", "ignore", "weights", "weight_bytes"),
    [
        # The order of groups does not matter.
        (LLAMA, [group("fp8", OF_ATTENTION), group("nvfp4", OF_MLP)], (), "nvfp4", 0.5625 + 0.4375 * ATTENTION / LAYER),
        (LLAMA, [group("nvfp4", OF_MLP), group("fp8", OF_ATTENTION)], (), "nvfp4", 0.5625 + 0.4375 * ATTENTION / LAYER),
        # Modules in no group and ignored modules stay in 16 bits.
        (LLAMA, [group("int4", OF_MLP)], (), "int4", 0.53125 + 1.46875 * ATTENTION / LAYER),
        (LLAMA, [group("fp8", OF_ATTENTION)], (), "fp8", 2.0 - ATTENTION / LAYER),
        (LLAMA, [group("fp8", "Linear")], (OF_ATTENTION,), "fp8", 1.0 + ATTENTION / LAYER),
        (
            LLAMA,
            [group("fp8", OF_ATTENTION), group("nvfp4", OF_MLP)],
            ("re:.*down_proj",),
            "nvfp4",
            0.5625 + (0.4375 * ATTENTION + 1.4375 * MATRIX) / LAYER,
        ),
        # A name takes precedence over an expression, and that over a class; of two expressions the first counts.
        (
            LLAMA,
            [group("nvfp4", "Linear"), group("fp8", OF_ATTENTION)],
            (),
            "nvfp4",
            0.5625 + 0.4375 * ATTENTION / LAYER,
        ),
        (
            LLAMA,
            [group("nvfp4", OF_MLP), group("fp8", "re:.*up_proj", "model.layers.7.mlp.down_proj", OF_ATTENTION)],
            (),
            "nvfp4",
            0.5625 + 0.4375 * (ATTENTION + MATRIX / 80) / LAYER,
        ),
        # Routed experts are in a group like any other matrix.
        (
            DEEPSEEK,
            [group("fp8", "Linear"), group("nvfp4", r"re:.*mlp\.experts\.\d+\.(gate|up|down)_proj$")],
            (),
            "nvfp4",
            0.5625 + 0.4375 * (EXPERTS_LAYER - ROUTED - 7168 * 256) / EXPERTS_LAYER,
        ),
        (
            DEEPSEEK,
            [group("mxfp4", "Linear")],
            (OF_ATTENTION,),
            "mxfp4",
            0.53125 + 1.46875 * (EXPERTS_LAYER - ROUTED - SHARED - 7168 * 256) / EXPERTS_LAYER,
        ),
        (
            DEEPSEEK,
            [group("fp8", OF_ATTENTION, "re:.*shared_experts.*")],
            (),
            "fp8",
            1.0 + ROUTED / EXPERTS_LAYER,
        ),
    ],
)
def test_groups_of_compressed_tensors_count_for_their_own_modules(
    tmp_path: Path,
    published: str,
    groups: list[dict[str, object]],
    ignore: tuple[str, ...],
    weights: str,
    weight_bytes: float,
) -> None:
    model = load_grouped(tmp_path, published, groups, *ignore)
    assert model.weights == weights
    assert model.weight_bytes == pytest.approx(weight_bytes, rel=1e-12)


@pytest.mark.parametrize(
    ("group_1", "what"),
    [
        (
            {"targets": [OF_MLP], "weights": {"num_bits": 6, "type": "float"}},
            "quantization_config: compressed-tensors with 6 bits in group_1 is not supported; supported: fp8, ",
        ),
        (
            {"targets": [OF_MLP], "weights": {"num_bits": 4, "type": "float", "group_size": 64}},
            "quantization_config: compressed-tensors with floats of 4 bits in groups of 64 in group_1 is not supported",
        ),
        (
            {"targets": [OF_MLP], "weights": None},
            "quantization_config: compressed-tensors with null bits in group_1 is not supported; supported: fp8, ",
        ),
        (
            group("nvfp4", "re:(.*)*mlp"),
            "quantization_config: compressed-tensors with the target 're:(.*)*mlp' in group_1 is not supported; ",
        ),
        (
            group("nvfp4", *(f"re:{layer}" for layer in range(1001))),
            "quantization_config: compressed-tensors with more than 1000 regular expressions as targets is not ",
        ),
    ],
)
def test_a_group_whose_weights_or_modules_are_not_known_is_refused_by_name(
    tmp_path: Path, group_1: dict[str, object], what: str
) -> None:
    with pytest.raises(DocumentError, match=re.escape(what)):
        load_grouped(tmp_path, LLAMA, [group("fp8", OF_ATTENTION), group_1])


def test_groups_that_quantise_no_matrix_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match=r"config_groups: have the targets 're:vision.*', but no matrix of the"):
        load_grouped(tmp_path, LLAMA, [group("fp8", "re:vision.*")])


# Qwen3.5-27B has 48 layers of linear attention and 16 of full attention: parameters of a layer of each.
LINEAR, FULL = 5120 * (10240 + 6144 + 96) + 6144 * 5120, 5120 * (2 * 6144 + 2 * 1024 + 6144)


@pytest.mark.parametrize("path", CONFIGS, ids=repository)
def test_matrices_add_up_to_what_the_model_has(path: Path) -> None:
    """Attention that stays in 16 bits has all of attention's parameters except the indexer's and the convolution's."""
    model = load_model(path)
    found = [one for one in checkpoint_names.modules(model, NO_LINEAR_LAYERS) if one.repeated is None]
    matrices = sum(one.params * one.num_layers for one in found)
    states = sum(n * kind.params(model.hidden) for kind, n in model.mixers if kind.kernel is Kernel.RECURRENT)
    indexers = 0
    if model.indexer is not None:
        rank, one = InShort(model).mla.q_lora_rank, model.indexer
        indexers = model.indexer_layers * (rank * one.heads * one.head_dim + model.hidden * (one.head_dim + one.heads))
    assert matrices + states + indexers == pytest.approx(model.num_layers * model.attention_params(), rel=1e-12)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        (LLAMA, {"num_hidden_layers": 10_001}, "num_hidden_layers: is 10001, must be a whole number from 1 to 10000"),
        ("Qwen__Qwen3-30B-A3B", {"num_experts_per_tok": 129}, "num_experts_per_tok: is 129, must be at most num_ex"),
        ("mistralai__Mixtral-8x7B-v0.1", {"num_local_experts": 1}, "num_experts_per_tok: is 2, must be at most num_lo"),
        ("deepseek-ai__DeepSeek-V3.2", {"index_head_dim": 10**6}, "indexer.key_bytes: is 1000004.0, must be <= 100000"),
        ("Qwen__Qwen-72B", {"intermediate_size": 1}, "intermediate: is 0, must be >= 1"),
        (
            LLAMA,
            {"num_attention_heads": 63, "num_key_value_heads": 7},
            "hidden_size: is 8192, must be a multiple of num_",
        ),
        (LLAMA, {"architectures": None, "model_type": ["llama"]}, "architecture a list is not supported; supported: "),
        (LLAMA, {"quantization_config": {"quant_method": "gptq", "bits": "4"}}, "gptq with '4' bits is not supported"),
        ("google__gemma-3-1b-it", {"layer_types": ["x"] * 3}, "layer_types: has 3 items, must be a list of 26 items"),
        (
            "google__gemma-3-1b-it",
            {"layer_types": [], "num_hidden_layers": "26"},
            "num_hidden_layers: is '26', must be",
        ),
    ],
)
def test_a_model_that_its_own_file_could_not_hold_is_refused(
    tmp_path: Path, name: str, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(DocumentError) as caught:
        load(tmp_path, config_of(name) | changes)
    [problem] = caught.value.problems
    assert said in str(problem)
    assert problem.file.endswith("config.json")


@pytest.mark.parametrize(
    ("name", "dynamic", "refused"),
    [
        (LLAMA, {"+:.*mlp.*": {"bits": 8}}, "'+:.*mlp.*' states 8 bits, all else has 4: modules of different bits are"),
        (LLAMA, {"-:.*attn.*": {}, r".*\.7\..*down.*": {"bits": 8, "group_size": 32}}, "down.*' states 8 bits"),
        (DEEPSEEK, {r"+:.*\.experts\..*": {"bits": 8}}, "states 8 bits"),
        (LLAMA, {"+:((a+)+)+": {"bits": 8}}, "states 8 bits"),
        (LLAMA, {f"+:visual.{i}": {"bits": 8} for i in range(1001)}, "'+:visual.0' states 8 bits"),
        (LLAMA, {"+:.*mlp.*": {"bits": 4, "group_size": 64}, "+:.*attn.*": {"desc_act": True}}, ""),
        (LLAMA, {"-:.*mlp.*": {"bits": 8}, "+:lm_head": {"bits": 8}, "+:visual.*": {"bits": 8}}, ""),
        (LLAMA, {"+:.*mlp.*": None}, ""),
        (LLAMA, None, ""),
    ],
)
def test_overrides_of_bits_are_refused_by_name(
    tmp_path: Path, name: str, dynamic: dict[str, object] | None, refused: str
) -> None:
    quantisation = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "dynamic": dynamic}
    config = config_of(name) | {"quantization_config": quantisation}
    if not refused:
        assert load(tmp_path, config).weights == "gptq-int4"
        return
    with pytest.raises(DocumentError) as caught:
        load(tmp_path, config)
    [problem] = caught.value.problems
    assert problem.path == "quantization_config.dynamic"
    assert refused in problem.message


@pytest.mark.parametrize(
    ("left", "params"),
    [
        ({"dynamic": {"-:.*attn.*": {}, "-:.*shared_expert.*": {}}}, 48 * LINEAR + 16 * FULL),  # GPTQ
        ({"ignored_layers": ["re:.*linear_attn.*"]}, 48 * LINEAR),
        ({"ignore": [r"re:.*self_attn\..*"]}, 16 * FULL),
        ({"ignore": [r"re:.*self_attn\.(q|k|v|o)_proj$"]}, 16 * FULL),
        ({"ignore": [f"model.language_model.layers.{i}.self_attn" for i in range(3, 64, 4)]}, 16 * FULL),
        (
            {"ignore": [f"model.layers.{i}.linear_attn.in_proj_{x}" for i in range(64) for x in "ab"]},
            48 * 2 * 5120 * 48,
        ),
        ({"ignore": ["re:model.layers.(0|1|2).linear_attn.*", "re:((a+)+)+", "re:["]}, 3 * LINEAR),
        ({"ignore": [f"vision_tower.encoder.layers.{i}.self_attn.q_proj" for i in range(64)] + ["mtp*", 3, None]}, 0),
    ],
)
def test_modules_are_matched_as_checkpoints_name_them(tmp_path: Path, left: dict[str, object], params: float) -> None:
    config = json.loads((FOLDER / "Qwen__Qwen3.5-27B.json").read_text()) | {"quantization_config": MODELOPT | left}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load_model(tmp_path)
    assert model.weight_bytes == pytest.approx(0.5625 + 1.4375 * params / 64 / model.layer_params(), rel=1e-12)


def experts_of(layers: Iterable[int]) -> list[str]:
    """Return the names of the matrices of two experts in these layers."""
    names = ("gate_proj", "up_proj", "down_proj")
    return [f"model.layers.{layer}.mlp.experts.{i}.{name}" for layer in layers for i in range(2) for name in names]


# Parameters of the routed experts and of attention of one of the 94 layers of Qwen3-235B.
QWEN, QWEN_EXPERTS, QWEN_ATTENTION = "Qwen__Qwen3-235B-A22B", 128 * 3 * 4096 * 1536, 4096 * 128 * 2 * (64 + 4)
FIRST_AND_LAST = (*range(5), *range(89, 94))
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}
BITSANDBYTES = {"quant_method": "bitsandbytes", "load_in_4bit": True}


@pytest.mark.parametrize(
    ("published", "quantisation", "usual", "params"),
    [
        # Experts of ten layers of Qwen3-235B; patterns of whole layers have attention, too.
        (QWEN, {"quant_method": "fp8", "modules_to_not_convert": experts_of(range(84, 94))}, 1.0, 10 * QWEN_EXPERTS),
        (
            QWEN,
            {"quant_method": "fp8", "ignored_layers": [f"model.layers.{i}.mlp.experts" for i in range(84, 94)]},
            1.0,
            10 * QWEN_EXPERTS,
        ),
        (
            QWEN,
            MODELOPT | {"ignore": [f"model.layers.{i}.*" for i in FIRST_AND_LAST]},
            0.5625,
            10 * (QWEN_EXPERTS + QWEN_ATTENTION),
        ),
        (
            QWEN,
            GPTQ | {"dynamic": {rf"-:model\.layers\.({'|'.join(map(str, FIRST_AND_LAST))})\..*": {}}},
            0.53125,
            10 * (QWEN_EXPERTS + QWEN_ATTENTION),
        ),
        # Routers are named like a part of an expert.
        (QWEN, GPTQ | {"dynamic": {"-:.*gate.*": {}}}, 0.53125, 0),
        (QWEN, {"quant_method": "fp8", "modules_to_not_convert": ["gate", "lm_head"]}, 1.0, 0),
        # AWQ matches parts of names.
        (
            QWEN,
            AWQ | {"modules_to_not_convert": ["mlp.gate.", "indexer", "model.layers.1.", "model.layers.93."]},
            0.53125,
            2 * (QWEN_EXPERTS + QWEN_ATTENTION),
        ),
        (QWEN, AWQ | {"modules_to_not_convert": ["layers.9", "gate"]}, 0.53125, 5 * (QWEN_EXPERTS + QWEN_ATTENTION)),
        (QWEN, AWQ | {"modules_to_not_convert": ["n.k_", "q" * 4096]}, 0.53125, 94 * 4096 * 128 * 4),
        (LLAMA, AWQ | {"modules_to_not_convert": [f"model.layers.{i}." for i in range(10)]}, 0.53125, 10 * LAYER),
        # The first three of DeepSeek-V3's 61 layers have no experts; the mean goes over the others.
        (DEEPSEEK, MODELOPT | {"ignore": experts_of((0, 1, 2, 60))}, 0.5625, 61 / 58 * ROUTED),
        (DEEPSEEK, MODELOPT | {"ignore": experts_of(range(61))}, 0.5625, 61 * ROUTED),
    ],
)
def test_routed_experts_that_are_left_in_16_bits_count_as_such(
    tmp_path: Path, published: str, quantisation: dict[str, object], usual: float, params: float
) -> None:
    model = load(tmp_path, config_of(published) | {"quantization_config": quantisation})
    expected = usual + (2.0 - usual) * params / model.num_layers / model.layer_params()
    assert model.weight_bytes == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("left", ["self_attn", "shared_expert", "feed_forward", "experts"])
def test_modules_of_llama_4_are_matched_by_its_names(tmp_path: Path, left: str) -> None:
    """Maverick has experts in layers 1, 3 and so on, and a wide dense MLP in the others."""
    mlp = [(layer, "feed_forward") for layer in range(0, 48, 2)]
    shared = [(layer, "feed_forward.shared_expert") for layer in range(1, 48, 2)]
    three = ("gate_proj", "up_proj", "down_proj")
    names = {
        "self_attn": [f"{layer}.self_attn.{x}_proj" for layer in range(48) for x in "qkvo"],
        "shared_expert": [f"{layer}.{parent}.{name}" for layer, parent in shared for name in three],
        "feed_forward": [f"{layer}.{parent}.{name}" for layer, parent in mlp for name in three],
        "experts": [f"{layer}.feed_forward.experts" for layer in range(1, 48, 2)],
    }
    expert = 3 * 5120 * 8192
    params = {
        "self_attn": 48 * 5120 * 128 * 2 * (40 + 8),
        "shared_expert": 24 * expert,
        "feed_forward": 24 * 3 * 5120 * 16_384,
        "experts": 24 * 128 * expert,
    }
    ignored = [f"language_model.model.layers.{name}" for name in (*names[left], "1.feed_forward.router")]
    config = config_of("meta-llama__Llama-4-Maverick-17B-128E-Instruct")
    model = load(tmp_path, config | {"quantization_config": {"quant_method": "fp8", "ignored_layers": ignored}})
    assert model.weight_bytes == pytest.approx(1.0 + params[left] / 48 / model.layer_params(), rel=1e-12)


def test_experts_that_quark_leaves_out_of_mxfp4_have_16_bits_as_all_else(tmp_path: Path) -> None:
    mxfp4 = {"dtype": "fp4", "group_size": 32}
    quantisation = {"quant_method": "quark", "global_quant_config": {"weight": mxfp4, "input_tensors": mxfp4}}
    quantisation["exclude"] = [f"re:model.layers.{layer}.block_sparse_moe.*" for layer in range(8)]
    model = load(tmp_path, config_of("mistralai__Mixtral-8x7B-v0.1") | {"quantization_config": quantisation})
    quantised = 24 / 32 * 8 * model.expert_params() / model.layer_params()
    assert model.weight_bytes == pytest.approx(2.0 - (2.0 - 0.53125) * quantised, rel=1e-12)
    quantisation["exclude"] = ["re:.*self_attn.*"]
    model = load(tmp_path, config_of(LLAMA) | {"quantization_config": quantisation})
    assert model.weight_bytes == pytest.approx(0.53125 + 1.46875 * ATTENTION / LAYER, rel=1e-12)


def test_experts_that_a_list_of_formats_leaves_out_have_16_bits(tmp_path: Path) -> None:
    """An expert in the list stands for all of its layer, as in vLLM."""
    listed = {name: {"quant_algo": "NVFP4"} for name in experts_of(range(10, 94)) if ".experts.1." in name}
    listed |= {f"model.layers.{i}.self_attn.{x}_proj": {"quant_algo": "FP8"} for i in range(94) for x in "qkvo"}
    mixed = {"quant_algo": "MIXED_PRECISION", "quantized_layers": listed}
    model = load(tmp_path, config_of(QWEN) | {"quantization_config": MODELOPT | mixed})
    others = 0.4375 * QWEN_ATTENTION + 10 / 94 * 1.4375 * QWEN_EXPERTS
    assert model.weight_bytes == pytest.approx(0.5625 + others / model.layer_params(), rel=1e-12)


def auto_round(**entries: object) -> dict[str, object]:
    """Return a config of AutoRound in 4 bits, with entries for modules; names have ``__`` for a dot."""
    own = {name.replace("__", "."): entry for name, entry in entries.items()}
    return {"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True, "extra_config": own}


def in_blocks(*names: object) -> dict[str, object]:
    """Return a config of GPTQ that lists the quantised modules of each layer."""
    return GPTQ | {"modules_in_block_to_quantize": list(names)}


IN_16 = {"bits": 16, "data_type": "float"}
OPT, OPT_MATRIX = "facebook__opt-6.7b", 4096 * 4096


@pytest.mark.parametrize(
    ("published", "quantisation", "params"),
    [
        # AutoRound: names, the ends of names, expressions, of which a name takes precedence.
        (LLAMA, auto_round(model__layers__7__mlp__down_proj=IN_16, lm_head={"bits": 8}), MATRIX),
        (LLAMA, auto_round(down_proj=IN_16, model__layers__7__mlp=IN_16), 80 * MATRIX),
        (LLAMA, auto_round(**{r"layers\.[0-9]\..*(up|gate)_proj": IN_16}), 20 * MATRIX),
        (
            LLAMA,
            auto_round(**{".*mlp.*": IN_16, "model__layers__7__mlp__down_proj": {"bits": 4}}),
            239 * MATRIX,
        ),
        (LLAMA, auto_round(down_proj=None, up_proj={}, gate_proj={"bits": 4, "group_size": 32}), 0),
        (QWEN, auto_round(**{name.replace(".", "__"): IN_16 for name in experts_of(range(3))}), 3 * QWEN_EXPERTS),
        (LLAMA, {"quant_method": "auto-round", "bits": 4, "extra_config": None}, 0),
        # GPTQ lists what is quantised, sometimes in groups.
        (LLAMA, in_blocks(["mlp.gate_proj", "mlp.up_proj"], ["self_attn."]), 80 * MATRIX),
        (LLAMA, in_blocks("self_attn", "model.layers.3.mlp.up_proj"), 239 * MATRIX),
        (LLAMA, in_blocks("_proj") | {"dynamic": {"-:.*down_proj": {}}}, 80 * MATRIX),
        (LLAMA, in_blocks(), 0),
        (LLAMA, in_blocks("self_attn") | AWQ, 0),
        (QWEN, in_blocks(["self_attn"], ["mlp.experts.0.up_proj"]), 0),
        (QWEN, in_blocks("q_proj", "k_proj", "v_proj", "o_proj"), 94 * QWEN_EXPERTS),
        (OPT, in_blocks(["self_attn.q_proj", "out_proj"], ["fc1"], ["fc2"]), 64 * OPT_MATRIX),
        # bitsandbytes
        (LLAMA, BITSANDBYTES | {"llm_int8_skip_modules": ["lm_head", "model.layers.7.mlp"]}, 3 * MATRIX),
    ],
)
def test_methods_name_what_they_leave_in_16_bits_under_keys_of_their_own(
    tmp_path: Path, published: str, quantisation: dict[str, object], params: float
) -> None:
    model = load(tmp_path, config_of(published) | {"quantization_config": quantisation})
    expected = 0.53125 + 1.46875 * params / model.num_layers / model.layer_params()
    assert model.weight_bytes == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("entries", "refused"),
    [
        ({"model__layers__7__mlp__down_proj": {"bits": 8}}, "'model.layers.7.mlp.down_proj' states 8 bits, all else"),
        ({"o_proj": {"bits": 2}, "up_proj": IN_16}, "'o_proj' states 2 bits, all else has 4: modules of different"),
        ({".*attn.*": {"bits": 8}}, "'.*attn.*' states 8 bits"),
        ({".*attn.*": {"bits": None}}, "'.*attn.*' states null bits"),
        ({"((a+)+)+": IN_16}, "'((a+)+)+' states 16 bits, all else has 4: the expression cannot be read"),
        ({f"visual.{i}.*": {"bits": 8} for i in range(1001)}, "'visual.0.*' states 8 bits"),
    ],
)
def test_other_bits_of_auto_round_are_refused_by_name(tmp_path: Path, entries: dict[str, object], refused: str) -> None:
    with pytest.raises(DocumentError) as caught:
        load(tmp_path, config_of(LLAMA) | {"quantization_config": auto_round(**entries)})
    [problem] = caught.value.problems
    assert problem.path == "quantization_config.extra_config"
    assert refused in problem.message


SCHEME = {"type": "float", "num_bits": 8, "dynamic": False, "strategy": "tensor", "symmetric": True}
OF_TENSORS = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": SCHEME}}}
STATED_KV = [  # a checkpoint's quantisation, and the KV dtype that vLLM chooses by itself
    (MODELOPT | {"kv_cache_quant_algo": "FP8"}, "fp8"),
    (MODELOPT | {"kv_cache_quant_algo": "NVFP4"}, "nvfp4"),
    (MODELOPT | {"kv_cache_quant_algo": "INT8"}, "auto"),
    (MODELOPT | {"kv_cache_quant_algo": None}, "auto"),
    (MODELOPT | {"kv_cache_scheme": SCHEME, "kv_cache_quant_algo": "NVFP4"}, "fp8"),
    (MODELOPT | {"kv_cache_scheme": "fp8"}, "fp8"),
    (MODELOPT | {"kv_cache_scheme": SCHEME | {"dynamic": True}}, "auto"),
    (MODELOPT | {"kv_cache_scheme": SCHEME | {"num_bits": 4}}, "nvfp4"),
    (MODELOPT | {"kv_cache_scheme": SCHEME | {"num_bits": [8]}}, "auto"),
    (MODELOPT | {"kv_cache_scheme": {"type": "float", "num_bits": 8}}, "auto"),
    (MODELOPT | {"kv_cache_scheme": {"type": "int", "num_bits": 4}}, "auto"),
    (MODELOPT | {"kv_cache_quant_algo": SCHEME}, "fp8"),
    (OF_TENSORS, "auto"),
    (OF_TENSORS | {"config_groups": {}, "kv_cache_scheme": SCHEME}, "fp8"),
    (OF_TENSORS | {"kv_cache_scheme": SCHEME}, "fp8"),
    (OF_TENSORS | {"kv_cache_scheme": SCHEME | {"dynamic": True}}, "fp8"),
    ({"quant_method": "fp8", "kv_cache_scheme": "static"}, "auto"),
]


@pytest.mark.parametrize(("quantisation", "dtype"), STATED_KV)
def test_a_quantised_kv_cache_is_that_of_the_checkpoint(
    tmp_path: Path, quantisation: dict[str, object], dtype: str
) -> None:
    config = json.loads((FOLDER / "meta-llama__Llama-2-70b-hf.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": quantisation}))
    model = load_model(tmp_path)
    assert model.kv_bytes == {"auto": 2.0, "fp8": 1.0, "nvfp4": 0.5625}[dtype]
    assert (model.weights == "") == (model.weight_bytes == 2.0) == (quantisation.get("config_groups") == {})


def test_vllm_leaves_latent_attention_of_compressed_tensors_in_16_bits(tmp_path: Path) -> None:
    config = json.loads((FOLDER / "deepseek-ai__DeepSeek-V3.json").read_text())
    for quantisation, kv_bytes in ((OF_TENSORS, 2.0), (MODELOPT | {"kv_cache_quant_algo": "FP8"}, 1.0)):
        config["quantization_config"] = quantisation | {"kv_cache_scheme": SCHEME}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert load_model(tmp_path).kv_bytes == kv_bytes


@pytest.mark.parametrize(
    ("scheme", "what"),
    [
        (SCHEME | {"type": "int"}, "has type 'int'"),
        (SCHEME | {"num_bits": [8]}, "has num_bits a list"),
        (SCHEME | {"strategy": "channel"}, "has strategy 'channel'"),
        ({"type": "float", "num_bits": 8, "strategy": "tensor"}, "has symmetric null"),
        ("static", "is 'static'"),
    ],
)
def test_a_kv_cache_that_vllm_refuses_is_refused(tmp_path: Path, scheme: object, what: str) -> None:
    config = json.loads((FOLDER / "meta-llama__Llama-2-70b-hf.json").read_text())
    config["quantization_config"] = OF_TENSORS | {"kv_cache_scheme": scheme}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(DocumentError) as refused:
        load_model(tmp_path)
    wanted = "type 'float', num_bits 8, strategy 'tensor' or 'attn_head', symmetric true, the only ones in vLLM"
    assert str(refused.value).endswith(
        f"config.json:1: quantization_config.kv_cache_scheme: {what}, must have {wanted}"
    )


def test_older_checkpoints_of_modelopt_say_how_they_are_quantised_in_a_file_of_their_own(tmp_path: Path) -> None:
    config = json.loads((FOLDER / "meta-llama__Llama-2-70b-hf.json").read_text())
    beside = tmp_path / "hf_quant_config.json"
    (tmp_path / "config.json").write_text(json.dumps(config))
    beside.write_text(
        '{"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}}'
    )
    model = load_model(tmp_path)
    assert (model.weight_bytes, model.weights, model.kv_bytes) == (1.0, "fp8", 1.0)
    assert load_model(tmp_path / "config.json") == model
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": None}))
    assert load_model(tmp_path) == model

    beside.write_text('{\n"quantization": {"quant_algo": "MIXED_PRECISION"}}')
    with pytest.raises(DocumentError) as refused:
        load_model(tmp_path)
    assert str(refused.value).endswith(
        "hf_quant_config.json:2: quantization.quant_algo: is 'MIXED_PRECISION', must be FP8, "
        "FP8_PER_CHANNEL_PER_TOKEN, FP8_PB_WO, MXFP8, NVFP4, W4A16_NVFP4, or MIXED_PRECISION of modules in "
        "quantized_layers that have one of these"
    )
    beside.write_text("[]")
    with pytest.raises(DocumentError, match=r"hf_quant_config\.json:1: quantization: is a list, must be a mapping"):
        load_model(tmp_path)
    beside.write_text("")
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    assert load_model(tmp_path).weights == "fp8"


def test_a_folder_with_a_config_is_named_after_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "my-finetune"
    folder.mkdir()
    (folder / "config.json").write_text((FOLDER / "meta-llama__Llama-2-70b-hf.json").read_text())
    assert load_model(folder).name == "my-finetune"


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match=r"is a folder without config\.json, so it is not a Hugging Face model"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("adapter", "base"),
    [({"base_model_name_or_path": "meta-llama/Llama-3.1-8B"}, ", 'meta-llama/Llama-3.1-8B'"), ({}, "")],
)
def test_a_folder_with_an_adapter_is_refused_with_the_model_that_it_adapts(
    tmp_path: Path, adapter: Mapping[str, str], base: str
) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **adapter}))
    with pytest.raises(DocumentError) as caught:
        load_model(tmp_path)
    hint = f"; it has an adapter (adapter_config.json): pass the model that it adapts{base}"
    assert str(caught.value).endswith("so it is not a Hugging Face model" + hint)


def test_a_config_without_an_architecture_is_told_what_it_lacks(tmp_path: Path) -> None:
    data = config_of(LLAMA)
    del data["architectures"], data["model_type"]
    with pytest.raises(DocumentError, match="model_type: architecture null is not supported; supported: Llama"):
        load(tmp_path, data)


def test_an_unsupported_architecture_lists_the_supported_ones(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}')
    with pytest.raises(DocumentError) as caught:
        load_model(tmp_path)
    assert "architecture 'BertModel' is not supported" in str(caught.value)
    assert "MixtralForCausalLM" in str(caught.value)
    assert str(caught.value).endswith("can be described in a file of its own: hetis-plan schema ModelSpec")


@pytest.mark.parametrize("name", ["Phi5ForCausalLM", "MiMo9ForCausalLM", "Step9ForCausalLM"])
def test_another_library_s_model_is_not_taken_for_one_of_a_like_name(tmp_path: Path, name: str) -> None:
    """Phi-3 has three matrices in its MLP, Phi two: a hint like that would have led to a quarter fewer weights."""
    config = {"architectures": [name], "model_type": name.removesuffix("ForCausalLM").lower()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(DocumentError) as caught:
        load_model(tmp_path)
    assert f"architecture '{name}' is not supported; supported: Llama" in str(caught.value)


def test_the_model_type_stands_in_for_missing_architectures(tmp_path: Path) -> None:
    config = json.loads((FOLDER / "Qwen__Qwen3-32B.json").read_text())
    del config["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_model(tmp_path).num_layers == 64


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        ("Qwen__Qwen3.5-27B", {"layer_types": ["full_attention"] * 64}),
        ("google__gemma-3-27b-it", {"sliding_window_pattern": 1}),
        ("meta-llama__Llama-4-Scout-17B-16E-Instruct", {"no_rope_layers": [0] * 48}),
    ],
)
def test_layers_that_are_all_alike_after_all_can_be_saved(tmp_path: Path, config: str, changes: dict[str, Any]) -> None:
    data = json.loads((FOLDER / f"{config}.json").read_text())
    data["text_config"] |= changes
    (tmp_path / "config.json").write_text(json.dumps(data))
    model = load_model(tmp_path)
    assert (model.sliding_window, model.state_bytes()) == (None, 0)
    (tmp_path / "model.yaml").write_text(dump(model))
    assert load_model(tmp_path / "model.yaml") == model


@pytest.mark.parametrize(
    ("fields", "window", "layers"),
    [
        ({"use_sliding_window": False}, None, None),
        ({"max_window_layers": 0}, 4096, None),
        ({"max_window_layers": 64}, None, None),
        ({"max_window_layers": 100}, None, None),
        ({"max_window_layers": 48}, 4096, 16),
        ({}, 4096, 36),  # from layer 28 on by default
        ({"max_window_layers": 0, "layer_types": ["full_attention"] * 63 + ["sliding_attention"]}, 4096, 1),
    ],
)
@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_layers_of_qwen_slide_from_the_stated_one_on(
    tmp_path: Path, architecture: str, fields: dict[str, Any], window: int | None, layers: int | None
) -> None:
    """The expected numbers are those of ``layer_types`` in transformers 5.23 (``Qwen2Config``, ``Qwen3Config``)."""
    data = json.loads((FOLDER / "Qwen__Qwen3-32B.json").read_text())
    for name in ("max_window_layers", "layer_types"):
        data.pop(name, None)
    data |= {"architectures": [architecture], "use_sliding_window": True, "sliding_window": 4096} | fields
    (tmp_path / "config.json").write_text(json.dumps(data))
    model = load_model(tmp_path)
    short = InShort(model)
    assert (model.sliding_window, short.sliding_layers) == (window, layers)


@pytest.mark.parametrize(("fields", "full"), [({"no_rope_layers": []}, 12), ({"no_rope_layer_interval": 8}, 6)])
def test_llama_4_attends_to_everything_in_every_fourth_layer_or_as_it_says(
    tmp_path: Path, fields: dict[str, Any], full: int
) -> None:
    data = json.loads((FOLDER / "meta-llama__Llama-4-Scout-17B-16E-Instruct.json").read_text())
    data["text_config"] |= fields
    (tmp_path / "config.json").write_text(json.dumps(data))
    assert load_model(tmp_path).sliding_share == (48 - full) / 48
    data["text_config"]["moe_layers"] = [1, 2]
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(DocumentError, match="moe_layers: only models with experts in every layer number 1 are"):
        load_model(tmp_path)


@pytest.mark.parametrize("config", ["zai-org__GLM-5", "zai-org__GLM-4.5", "deepseek-ai__DeepSeek-V3"])
def test_dense_layers_are_read_from_either_field(tmp_path: Path, config: str) -> None:
    data = json.loads((FOLDER / f"{config}.json").read_text())
    layers = data["num_hidden_layers"]
    del data["first_k_dense_replace"]
    data["mlp_layer_types"] = ["dense"] * 5 + ["sparse"] * (layers - 5)
    (tmp_path / "config.json").write_text(json.dumps(data))
    assert load_model(tmp_path).prefix_layers == 5
    data["mlp_layer_types"][7] = "dense"
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(DocumentError, match="must have 'dense' for the first layers only"):
        load_model(tmp_path)


def test_more_dense_layers_than_layers_are_refused(tmp_path: Path) -> None:
    data = json.loads((FOLDER / "zai-org__GLM-4.5.json").read_text()) | {"first_k_dense_replace": 92}
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(
        DocumentError, match=re.escape("moe.first_dense_layers is 92, must be 0 to num_layers (92) - 1")
    ):
        load_model(tmp_path)


def test_kinds_of_layers_that_are_not_modelled_are_named(tmp_path: Path) -> None:
    config = json.loads((FOLDER / "Qwen__Qwen3.5-27B.json").read_text())
    config["text_config"]["layer_types"][3] = "sliding_attention"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(DocumentError, match="has 'sliding_attention', only linear_attention and full_attention are"):
        load_model(tmp_path)


# GLM-5.2 has indexers in 21 of 78 layers: 0, 1, 2, and every fourth from 6 on.
SCHEDULES = ("indexer_types", "index_topk_pattern", "index_topk_freq", "index_skip_topk_offset")


def load_glm(tmp_path: Path, **changes: object) -> ModelSpec:
    """Return GLM-5.2 with these fields about indexers only."""
    config = json.loads((FOLDER / "zai-org__GLM-5.2.json").read_text())
    config = {name: value for name, value in config.items() if name not in SCHEDULES} | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    return load_model(tmp_path)


def test_layers_that_share_an_indexer_have_no_keys_and_parameters_of_it() -> None:
    """Only 21 layers of GLM-5.2 cache 132 bytes beside the latent; GLM-5 is equal except for its 78 indexers."""
    glm, before = (load_model(FOLDER / f"zai-org__{name}.json") for name in ("GLM-5.2", "GLM-5"))
    assert before.indexer is not None
    assert before.indexer_layers == 78
    assert before.kv_bytes_per_token() == 78 * (2 * 576 + 132)
    assert glm.kv_bytes_per_token() == pytest.approx(78 * 2 * 576 + 21 * 132, rel=1e-12)
    indexer = 2048 * 32 * 128 + 6144 * (128 + 32)
    assert before.params() - glm.params() == (78 - 21) * indexer
    # A query reads the latents of 2,048 tokens in all layers, and all keys of the indexers.
    read = 78 * 2 * 576 * 2048 + 21 * 132 * 100_000
    assert glm.read_tokens(100_000) * glm.kv_bytes_per_token() == pytest.approx(read, rel=1e-12)


@pytest.mark.parametrize(
    ("fields", "layers"),
    [
        ({"index_topk_freq": 4, "index_skip_topk_offset": 3}, 21),
        ({"index_topk_freq": 4, "index_skip_topk_offset": 78}, None),
        ({"index_topk_freq": 4}, 21),  # 0, 1, 5, 9, ..., 77
        ({"index_topk_freq": 78, "index_skip_topk_offset": 1}, 1),
        ({"index_topk_pattern": "FS" * 39}, 39),
        ({"index_topk_pattern": "FS" * 39, "index_topk_freq": 4}, 39),
        ({"index_topk_pattern": "F" * 78}, None),
        ({"indexer_types": ["full", "shared", "shared"] * 26, "index_topk_pattern": "F" * 78}, 26),
        ({"indexer_types": ["full"] * 78, "index_topk_freq": 4}, None),
        (dict.fromkeys(SCHEDULES), None),
        ({}, None),
    ],
)
def test_layers_share_indexers_as_transformers_and_vllm_read_it(
    tmp_path: Path, fields: dict[str, object], layers: int | None
) -> None:
    assert load_glm(tmp_path, **fields).indexer_layers == (layers or 78)


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        (
            {"indexer_types": ["full"] * 77},
            "indexer_types: has 77 items, must be a list of 78 items, one for each layer",
        ),
        ({"indexer_types": "full"}, "indexer_types: is 'full', must be a list of 78 items, one for each layer"),
        (
            {"indexer_types": ["full"] * 77 + ["half"]},
            "indexer_types: has 'half', must have full or shared for each layer",
        ),
        ({"indexer_types": ["full"] * 77 + [None]}, "indexer_types: has null, must have full or shared for each layer"),
        (
            {"indexer_types": ["shared"] + ["full"] * 77},
            "indexer_types: has 'shared' for layer 0, which no layer precedes whose indexer it could share",
        ),
        ({"index_topk_pattern": "FSS"}, "index_topk_pattern: is 'FSS', must be a text of 78 letters"),
        ({"index_topk_pattern": ["F", "S"]}, "index_topk_pattern: is a list, must be a text of 78 letters"),
        ({"index_topk_pattern": "FX" * 39}, "index_topk_pattern: has 'X', must have F or S for each layer"),
        ({"index_topk_pattern": "SF" * 39}, "index_topk_pattern: has 'S' for layer 0, which no layer precedes"),
        ({"index_topk_freq": 0}, "index_topk_freq: is 0, must be a whole number from 1 to"),
        ({"index_topk_freq": 4, "index_skip_topk_offset": -1}, "index_skip_topk_offset: is -1, must be a whole number"),
        (
            {"index_topk_freq": 4, "index_skip_topk_offset": 0},
            "index_skip_topk_offset: is 0, so layer 0 would share the indexer of an earlier layer",
        ),
    ],
)
def test_layers_that_cannot_share_an_indexer_are_refused(tmp_path: Path, fields: dict[str, object], what: str) -> None:
    with pytest.raises(DocumentError, match=re.escape(what)) as error:
        load_glm(tmp_path, **fields)
    assert len(error.value.problems) == 1
