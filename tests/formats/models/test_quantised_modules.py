"""Modules of checkpoints that keep 16 bits, or have a format of their own."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from hetis.formats.errors import DocumentError
from hetis.formats.models import checkpoint_names
from hetis.formats.models.config_json import NO_LINEAR_LAYERS
from hetis.formats.models.document import load_model
from hetis.solver.model import Kernel
from tests.formats.models.test_huggingface import CONFIGS, FOLDER, config_of, load, repository
from tests.formats.models.test_quantisation import (
    ATTENTION,
    DEEPSEEK,
    FULL,
    LAYER,
    LINEAR,
    LLAMA,
    MATRIX,
    MODELOPT,
    ROUTED,
)
from tests.models import InShort


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
        (
            "mistralai__Mixtral-8x7B-v0.1",
            {"num_experts_per_tok": 9},
            "num_experts_per_tok: is 9, must be at most num_lo",
        ),
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
