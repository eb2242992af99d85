"""Models whose config names the kind of every layer have the parameters of transformers and the KV of engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.coverage import parameters_of
from hetis.formats.errors import DocumentError
from hetis.formats.models.document import MODEL_SPEC, load_model, parse_model
from hetis.formats.models.dtypes import weights_of
from hetis.formats.positions import Text
from hetis.solver.model import Kernel, ModelSpec

FOLDER = Path(__file__).parents[1] / "layered"
# Published parameters in billions, all and active (model cards), and bytes of KV per token and of a request's state.
PUBLISHED = {
    "nvidia__NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": (31.6, 3.6, 6 * 2 * 2 * 128 * 2),
    "nvidia__NVIDIA-Nemotron-3-Super-120B-A12B-FP8": (120.6, 12.7, 8 * 2 * 2 * 128 * 2),
    "XiaomiMiMo__MiMo-V2-Flash": (309, None, 9 * 4 * (192 + 128) * 2 + 39 * 8 * (192 + 128) * 2),
    "google__gemma-4-26B-A4B": (25.8, 3.8, 25 * 2 * 8 * 256 * 2 + 5 * 2 * 2 * 512 * 2),
    "stepfun-ai__Step-3.7-Flash": (196, 11, 45 * 2 * 8 * 128 * 2),
    # Keys and values of 60 layers, and the indexer's key of 57.
    "MiniMaxAI__MiniMax-M3": (426, 26, 60 * 2 * 4 * 128 * 2 + 57 * 128 * 2),
    "moonshotai__Kimi-K3": (2780, None, 24 * 576 * 2),
}


def load(folder: Path, data: dict[str, Any], notes: list[str] | None = None) -> ModelSpec:
    (folder / "config.json").write_text(json.dumps(data, default=str))
    return load_model(folder / "config.json", notes=notes)


def config_of(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return data


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_model_has_the_published_parameters_and_the_kv_of_its_engines(name: str) -> None:
    model = load_model(FOLDER / f"{name}.json")
    billions, active, kv_bytes = PUBLISHED[name]
    assert model.params() / 1e9 == pytest.approx(billions, rel=0.01)
    assert active is None or model.active_params() / 1e9 == pytest.approx(active, rel=0.02)
    assert model.kv_bytes_per_token() == pytest.approx(kv_bytes, rel=1e-12)
    assert parse_model(MODEL_SPEC.to_data(model), Text(file="m.yaml", text=None)) == model


def test_nemotron_keeps_states_in_23_layers_and_kv_in_six() -> None:
    """A head's state has 64 x 128 numbers of 32 bits; three inputs of 16 bits stay in each of 4,096 + 2 x 8 x 128."""
    model = load_model(FOLDER / "nvidia__NVIDIA-Nemotron-3-Nano-30B-A3B-BF16.json")
    assert (model.num_layers, model.recurrent_layers, model.kv_share) == (52, 23, 6 / 52)
    state = 64 * 64 * 128 * 4 + (4096 + 2 * 8 * 128) * 3 * 2
    assert model.num_layers * model.state_bytes() == pytest.approx(23 * state, rel=1e-12)
    assert (model.experts.gated, model.experts.shared_width) == (False, 3712)
    assert not model.heads_can_move


def test_latent_experts_compute_with_fewer_numbers() -> None:
    model = load_model(FOLDER / "nvidia__NVIDIA-Nemotron-3-Super-120B-A12B-FP8.json")
    assert model.expert_params() == 2 * 1024 * 2688
    fixed = 4096 * 512 + 2 * 4096 * 5376 + 2 * 4096 * 1024
    assert model.experts.active_params(4096) == fixed + 22 * model.expert_params()


def test_windows_may_have_heads_of_another_shape() -> None:
    gemma = load_model(FOLDER / "google__gemma-4-26B-A4B.json")
    assert (gemma.sliding_window, gemma.sliding_share, gemma.head_groups) == (1024, 25 / 30, 8)
    kept = 25 * 2 * 8 * 256 * 2 * 1024 + 5 * 2 * 2 * 512 * 2 * 100_000
    assert gemma.cached_tokens(100_000) * gemma.kv_bytes_per_token() == pytest.approx(kept, rel=1e-12)
    assert [gemma.divides(ranks) for ranks in (1, 2, 3, 4, 8)] == [True, True, False, True, True]


def test_an_indexer_of_grouped_attention_chooses_blocks() -> None:
    model = load_model(FOLDER / "MiniMaxAI__MiniMax-M3.json")
    assert (model.kernel, model.indexer_layers, model.attention_limit) == (Kernel.SPARSE, 57, 17 * 128)
    assert model.prefix_layers == 3


# Fields that differ from the defaults of transformers' class, whose parameters are counted.
FAMILIES: dict[str, dict[str, Any]] = {
    "granite": {"num_hidden_layers": 2},
    "granitemoe": {"num_hidden_layers": 2},
    "granitemoehybrid": {
        "layer_types": ["mamba", "mamba", "attention"], "num_hidden_layers": 3, "hidden_size": 512, "mamba_n_heads": 16,
        "num_attention_heads": 8, "num_key_value_heads": 4, "mamba_d_head": 64, "intermediate_size": 256,
    },
    "olmo3": {"num_hidden_layers": 4},
    "falcon_h1": {"num_hidden_layers": 2, "mamba_d_ssm": 4096, "mamba_n_heads": 64},
    "hunyuan_v1_dense": {"num_hidden_layers": 2, "head_dim": 128},
    "ernie4_5_moe": {"num_hidden_layers": 3},
    "jamba": {"num_hidden_layers": 8},
    "seed_oss": {"num_hidden_layers": 2},
    "cohere2": {"num_hidden_layers": 4},
    "exaone4": {"num_hidden_layers": 4},
    "smollm3": {"num_hidden_layers": 4},
    "lfm2": {"num_hidden_layers": 3, "layer_types": ["conv", "conv", "full_attention"]},
    "lfm2_moe": {"num_hidden_layers": 3, "layer_types": ["conv", "conv", "full_attention"]},
    "glm4_moe_lite": {"num_hidden_layers": 3},
    "nemotron_h": {"hybrid_override_pattern": "MEM*E-M*", "moe_intermediate_size": 1024, "moe_latent_size": 512},
    "gemma4_text": {"num_hidden_layers": 12, "num_kv_shared_layers": 6, "use_double_wide_mlp": True},
    "qwen3_5_text": {"num_hidden_layers": 4},
    "bamba": {"num_hidden_layers": 3, "attn_layer_indices": [1]},
    "laguna": {"num_hidden_layers": 3, "num_attention_heads_per_layer": [48, 64, 64]},
    "inkling_text": {"num_hidden_layers": 6},
    "afmoe": {"num_hidden_layers": 4},
    "olmo_hybrid": {"num_hidden_layers": 4},
    "qwen3_moe": {"num_hidden_layers": 2},
    "qwen3_vl_moe": {},
    "muse_glimmer": {},
    "glm_ocr": {},
    "paddleocr_vl": {},
    "minicpmv4_6": {},
    "mistral3": {},
    "minicpm3": {"num_hidden_layers": 2},
    "starcoder2": {"num_hidden_layers": 2},
    "vaultgemma": {"num_hidden_layers": 2},
    "llama4_text": {"num_hidden_layers": 4},
    "falcon": {"num_hidden_layers": 2},
    "bloom": {"n_layer": 2, "hidden_size": 512},
    "gpt_neox": {"num_hidden_layers": 2},
    "mpt": {"n_layers": 2},
    "bailing_hybrid": {"num_hidden_layers": 6},
    "inkling2_text": {"num_hidden_layers": 6},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_the_parameters_of_transformers(tmp_path: Path, family: str) -> None:
    counted = parameters_of(family, **FAMILIES[family])
    if counted is None:
        pytest.skip("torch or transformers lacks it")
    data, params = counted
    within = 0.01 if family == "minicpmv4_6" else 0.005  # no field describes what its tower inserts
    assert load(tmp_path, data).params() == pytest.approx(params, rel=within)


def test_experts_whose_number_has_an_unknown_name_are_not_read_as_a_dense_model(tmp_path: Path) -> None:
    data = json.loads((FOLDER.parent / "huggingface" / "Qwen__Qwen3-VL-30B-A3B-Instruct.json").read_text())
    text = data["text_config"]
    usual = load(tmp_path, data)
    text["num_local_experts"] = text.pop("num_experts")  # as transformers 5 writes it
    assert load(tmp_path, data).layers == usual.layers
    text["number_of_experts"] = text.pop("num_local_experts")
    with pytest.raises(DocumentError, match="num_experts_per_tok: is 8, but no number of experts is given"):
        load(tmp_path, data)


def test_short_convolutions_beside_attention_keep_their_last_inputs(tmp_path: Path) -> None:
    """Inkling, in the publisher's form and in that of transformers: each layer has four convolutions of four inputs."""
    common = {
        "architectures": ["InklingForCausalLM"], "hidden_size": 512, "num_hidden_layers": 4, "vocab_size": 1000,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "swa_num_key_value_heads": 4, "d_rel": 16,
        "sliding_window_size": 128, "n_routed_experts": 8, "num_experts_per_tok": 2,
    }  # fmt: skip
    own = {"local_layer_ids": [0, 1, 2], "dense_intermediate_size": 2048, "intermediate_size": 256, "dense_mlp_idx": 1}
    kinds = ["hybrid_sliding"] * 3 + ["hybrid"]
    theirs = {"layer_types": kinds, "mlp_layer_types": ["dense"] + ["sparse"] * 3, "intermediate_size": 2048}
    model = load(tmp_path, common | own)
    assert model == load(tmp_path, common | theirs | {"moe_intermediate_size": 256})
    inputs = 3 * (2 * 256 + 2 * 512) + (2 * 128 + 2 * 512)
    assert model.num_layers * model.state_bytes() == 2 * 3 * inputs
    assert model.kv_bytes_per_token() == 2 * 2 * (3 * 256 + 128)
    assert (model.sliding_share, model.prefix_layers, model.heads_can_move) == (0.75, 1, False)


def test_layers_may_state_fields_of_their_own(tmp_path: Path) -> None:
    data = config_of("XiaomiMiMo__MiMo-V2-Flash") | {"per_layer_config": {"00": {"num_attention_heads": 32}}}
    usual, own = load_model(FOLDER / "XiaomiMiMo__MiMo-V2-Flash.json"), load(tmp_path, data)
    assert own.layers[1:] == usual.layers[1:]
    assert own.layers[0].mixers[0].q_heads == 32
    with pytest.raises(DocumentError, match=r"per_layer_config\.99: must be a layer from 0 to 47"):
        load(tmp_path, data | {"per_layer_config": {"99": {}}})


def test_an_unknown_architecture_is_read_with_a_note_if_all_of_its_fields_are_known(tmp_path: Path) -> None:
    data = config_of("XiaomiMiMo__MiMo-V2-Flash") | {"architectures": ["NewForCausalLM"], "model_type": "new"}
    notes: list[str] = []
    model = load(tmp_path, data | {"hidden_act": "silu"}, notes)
    assert model.layers == load_model(FOLDER / "XiaomiMiMo__MiMo-V2-Flash.json").layers
    assert "its architecture is not known" in notes[0]
    with pytest.raises(DocumentError, match="has fields of no known kind: memory_heads, depth_loops; a model can be"):
        load(tmp_path, data | {"memory_heads": 8, "depth_loops": 3})
    for name, value in {"use_residual": True, "ngram_vocab_size": 1_000_000, "num_recurrences": 2}.items():
        with pytest.raises(DocumentError, match=f"has fields of no known kind: {name};"):
            load(tmp_path, data | {"hidden_act": "silu", name: value})
    load(tmp_path, data | {"hidden_act": "silu", "no_repeat_ngram_size": 3, "use_residual": False})
    with pytest.raises(DocumentError, match="has fields of no known kind: hidden_act"):
        load(tmp_path, data | {"hidden_act": "gelu"})


def test_layers_of_unlike_shape_are_counted_and_stay_together_where_they_are_not_spread_evenly(tmp_path: Path) -> None:
    """DeciLM-51B's form: attention with groups of its own, none, or one matrix for it; MLPs of different widths."""
    full = {"attention": {"n_heads_in_group": 8}, "ffn": {"ffn_mult": 1.0}}
    blocks = [full] * 4 + [{"attention": {"no_op": True}, "ffn": {"ffn_mult": 0.5}}] * 3
    blocks += [{"attention": {"replace_with_linear": True}, "ffn": {"no_op": True}}]
    data = {
        "architectures": ["DeciLMForCausalLM"], "model_type": "nemotron-nas", "hidden_size": 1024,
        "num_attention_heads": 16, "num_hidden_layers": 8, "vocab_size": 1000, "block_configs": blocks,
    }  # fmt: skip
    model = load(tmp_path, data)
    attention = 2 * 1024 * 1024 + 2 * 1024 * 2 * 64
    mlps = 4 * 3 * 1024 * 768 + 3 * 3 * 1024 * 512 + 1024 * 1024
    assert model.params() == 4 * attention + mlps + 2 * 1000 * 1024
    assert model.kv_bytes_per_token() == 4 * 2 * 2 * 64 * 2
    assert [layer for layer in range(8) if model.allowed_cut(layer)] == [0, 1, 7]
    assert parse_model(MODEL_SPEC.to_data(model), Text(file="m.yaml", text=None)) == model


def test_a_checkpoint_of_another_size_than_its_index_states_is_said(tmp_path: Path) -> None:
    data = config_of("google__gemma-4-26B-A4B")
    size = load(tmp_path, data).params() * 2
    for stated, is_said in ((size, False), (round(size * 1.02), False), (round(size * 1.05), True), ("?", False)):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": stated}}))
        notes: list[str] = []
        load(tmp_path, data, notes)
        assert any("model.safetensors.index.json states" in note for note in notes) is is_said


def test_a_precision_that_few_parameters_have_does_not_stand_alone(tmp_path: Path) -> None:
    data = config_of("moonshotai__Kimi-K3")
    group = data["text_config"]["quantization_config"]["config_groups"]["group_0"]
    group["targets"] = ["re:.*self_attn.*"]
    data["text_config"]["quantization_config"]["ignore"] = []
    notes: list[str] = []
    model = load(tmp_path, data, notes)
    assert weights_of(model).startswith("mxfp4 in 1% of the layers, bf16 in the rest")
    assert "the rest counts as 16 bits" in notes[0]
    assert weights_of(load(tmp_path, config_of("moonshotai__Kimi-K3"))) == "mxfp4"


def test_experts_beside_an_mlp_are_not_meant_by_its_name(tmp_path: Path) -> None:
    """NVIDIA's checkpoint of Gemma 4 26B-A4B leaves attention and the MLP of all layers in 16 bits, and no expert."""
    data = config_of("google__gemma-4-26B-A4B")
    ignored = [f"model.language_model.layers.{i}.{part}*" for i in range(30) for part in ("mlp", "router", "self_attn")]
    data["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head", *ignored]}
    model = load(tmp_path, data)
    assert weights_of(model) == "nvfp4"
    experts = model.num_layers * model.expert_params() * 128
    rest = model.num_layers * model.layer_params() - experts
    assert model.weight_bytes == pytest.approx((0.5625 * experts + 2 * rest) / (experts + rest), rel=1e-3)


@pytest.mark.parametrize(("parent", "is_meant"), [("backbone", True), ("model", True), ("mtp", False)])
def test_what_precedes_layers_in_a_checkpoint_differs_but_drafting_layers_are_others(
    tmp_path: Path, parent: str, is_meant: bool
) -> None:
    data = config_of("nvidia__NVIDIA-Nemotron-3-Nano-30B-A3B-BF16")
    ignored = [f"{parent}.layers.{i}.mixer.in_proj" for i in range(len(data["hybrid_override_pattern"]))]
    data["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ignored}
    assert (load(tmp_path, data).weight_bytes > 1.0) is is_meant


def test_layers_whose_kinds_are_stated_as_none_have_no_attention(tmp_path: Path) -> None:
    counted = parameters_of("bamba", num_hidden_layers=3, attn_layer_indices=[1])
    if counted is None:
        pytest.skip("torch or transformers lacks it")
    with pytest.raises(DocumentError, match="has no layer with attention"):
        load(tmp_path, counted[0] | {"attn_layer_indices": None})
