"""The precision of weights and KV that checkpoints state."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from hetis.formats.errors import DocumentError
from hetis.formats.models.document import load_model
from hetis.solver.model import ModelSpec
from tests.formats.models.test_huggingface import FOLDER, config_of, load


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


def torchao(kind: object, **data: object) -> dict[str, object]:
    return {"quant_method": "torchao", "quant_type": {"default": {"_type": kind, "_version": 1, "_data": data}}}


INTX = "Int8DynamicActivationIntxWeightConfig"


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
        ({"quant_method": "gptq_marlin", "bits": 4}, 0.53125, "gptq-int4"),
        ({"quant_method": "awq_marlin", "bits": 4}, 0.53125, "awq-int4"),
        ({"quant_method": "intel/auto-round", "bits": 4, "sym": True}, 0.53125, "gptq-int4"),
        ({"quant_method": "auto-round", "bits": 4, "group_size": 32, "data_type": "mx_fp"}, 0.53125, "mxfp4"),
        (
            {"quant_method": "auto-round", "bits": 4, "group_size": 16, "data_type": "nv_fp4_with_static_gs"},
            0.5625,
            "nvfp4",
        ),
        (torchao("Int4WeightOnlyConfig", group_size=128), 0.53125, "int4"),
        (torchao("Int4WeightOnlyConfig", group_size=32), 0.5625, "int4"),
        (torchao("Int8WeightOnlyConfig"), 1.0, "int8"),
        (torchao("Float8DynamicActivationFloat8WeightConfig"), 1.0, "fp8"),
        (torchao(INTX, weight_dtype={"_type": "torch.dtype", "_data": "int4"}), 0.53125, "int4"),
        ({"quant_method": "torchao", "quant_type": "int4_weight_only"}, 0.53125, "int4"),
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


def test_torchao_states_modules_by_name_and_by_expression(tmp_path: Path) -> None:
    """A layer of Llama-2-70B has 855,638,016 parameters, 150,994,944 of them in attention; these have 16 bits."""
    int4, own = {"_type": "Int4WeightOnlyConfig", "_data": {"group_size": 128}}, {"_type": "IntxWeightOnlyConfig"}
    modules = {"_default": int4, "model.embed_tokens": own, "re:.*self_attn.*": None}
    stated = torchao("ModuleFqnToConfig", module_fqn_to_config=modules)
    assert load(
        tmp_path, config_of("meta-llama__Llama-2-70b-hf") | {"quantization_config": stated}
    ).weight_bytes == pytest.approx(0.53125 + 1.46875 * 150_994_944 / 855_638_016)


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        (torchao("UIntXWeightOnlyConfig"), "'torchao with uintxweightonlyconfig' is not supported"),
        ({"bits": 4, "group_size": 64, "mode": "affine"}, "quantization_config: states no quant_method; supported: "),
        ({"quant_method": "auto-round", "bits": 4, "data_type": "rotated"}, "data_type: 'rotated' of 4 bits is not"),
        ({"quant_method": "auto-round", "bits": [4], "data_type": "mx_fp"}, "data_type: 'mx_fp' of a list bits is not"),
    ],
)
def test_other_methods_are_refused_in_their_own_words(tmp_path: Path, stated: dict[str, object], said: str) -> None:
    with pytest.raises(DocumentError, match=re.escape(said)):
        load(tmp_path, config_of("meta-llama__Llama-2-70b-hf") | {"quantization_config": stated})


def test_a_checkpoint_of_mlx_does_not_count_as_16_bits(tmp_path: Path) -> None:
    stated = {"quantization": {"group_size": 64, "bits": 4}}
    with pytest.raises(DocumentError, match="quantization: states no quant_method"):
        load(tmp_path, config_of("meta-llama__Llama-2-70b-hf") | stated)


def test_routed_experts_of_ling_may_have_a_format_of_their_own(tmp_path: Path) -> None:
    """All of Ling-3.0-flash but embeddings in FP8, and routed experts in MXFP4: 68 GB, which counted as 125."""
    lines = (Path(__file__).with_name("published.jsonl")).read_text().splitlines()
    config = next(one["config"] for one in map(json.loads, lines) if one["name"] == "Ling-3.0-flash")
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "routed_experts_quant_method": "mxfp4"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": fp8}))
    model = load_model(tmp_path)
    experts = 40 * 512 * 3 * 2560 * 768
    layers = model.params() - 2 * 157_184 * 2560
    assert model.weights == "mxfp4"
    assert model.weight_bytes * layers == pytest.approx(experts * 0.53125 + (layers - experts), rel=0.01)


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
