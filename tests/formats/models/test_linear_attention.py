"""Layers of linear attention: parameters, states and FLOPs of published models; lists of layers that are refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis.formats.documents import dump
from hetis.formats.errors import DocumentError
from hetis.formats.layers import described_in_short
from hetis.formats.models.config_json import Config
from hetis.formats.models.document import load_model
from hetis.formats.models.linear_attention import lightning_attention
from hetis.formats.positions import Text
from hetis.solver.model import Experts
from tests.formats.models.test_huggingface import FOLDER, config_of, load
from tests.formats.models.test_quantisation import MODELOPT
from tests.models import shape_of

KIMI, MINIMAX = "moonshotai__Kimi-Linear-48B-A3B-Instruct", "MiniMaxAI__MiniMax-Text-01"
QWEN = "Qwen__Qwen3.5-27B"
# Parameters of the modules of one layer, as transformers 5.19 builds them (`named_parameters`), without norms, biases
# and the 32 numbers of ``A_log``: q, k, v, o; the scalar per head; both gates of low rank; the convolution.
DELTA_LAYER = 4 * 9_437_184 + 73_728 + 2 * (294_912 + 524_288) + 49_152
LATENT_LAYER = 14_155_776 + 1_327_104 + 4_194_304 + 9_437_184
LIGHTNING_LAYER = 150_994_944 + 50_331_648 + 50_331_648  # q, k, v; output; gate


def test_kimi_linear_has_latent_attention_in_seven_layers_and_keeps_a_state_in_the_others() -> None:
    model = load_model(FOLDER / f"{KIMI}.json")
    assert model.attention.name == "mla"
    assert described_in_short(model.layers)["mla"] == shape_of(
        kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128, q_lora_rank=None
    )
    assert described_in_short(model.layers)["moe"] == shape_of(
        num_experts=256, active_experts=8, expert_intermediate=1024, shared_experts=1, first_dense_layers=1, every=1
    )
    # A head's state has 128 x 128 numbers of 32 bits; three inputs of 16 bits stay in each of the 3 x 4,096 channels.
    # A head and token: q, k and v with the state; k k, (k k)^-1 k, (k k)^-1 v, q k and its product with v of 64 tokens.
    flops = 3 * 2 * 128 * 128 + 5 * 2 * 64 * 128
    state = 32 * 128 * 128 * 4 + 3 * 4096 * 3 * 2
    assert described_in_short(model.layers)["linear"] == shape_of(
        layers=20, params=DELTA_LAYER, state_bytes=state, token_flops=32 * flops
    )
    assert model.attention.params(model.hidden) == LATENT_LAYER
    assert model.kv_bytes_per_token() == pytest.approx(7 * (512 + 64) * 2, rel=1e-12)
    assert model.state_bytes() * 27 == pytest.approx(20 * state, rel=1e-12)
    assert model.max_position == 1_048_576
    assert not model.heads_can_move


@pytest.mark.parametrize("name", [MINIMAX, "MiniMaxAI__MiniMax-M1-80k"])
def test_minimax_has_softmax_in_ten_layers_and_keeps_a_state_in_the_others(name: str) -> None:
    model = load_model(FOLDER / f"{name}.json")
    assert (model.attention.name, model.kv_heads, model.sliding_window) == ("gqa", 8, None)
    experts = model.experts
    assert experts == Experts(count=32, active=2, width=9216)
    # A head's state has 128 x 128 numbers of 16 bits. A head and token: k v into the state and q with it; q k and its
    # product with v over the parts of 32 tokens up to its own in a block of 256, 32 x (1 + 2 + ... + 8) / 8 tokens.
    state, flops = 64 * 128 * 128 * 2, 2 * 2 * 128 * 128 + 2 * 2 * 144 * 128
    assert described_in_short(model.layers)["linear"] == shape_of(
        layers=70, params=LIGHTNING_LAYER, state_bytes=state, token_flops=64 * flops
    )
    assert model.kv_bytes_per_token() == pytest.approx(10 * 2 * 8 * 128 * 2, rel=1e-12)
    assert model.state_bytes() * 80 == pytest.approx(70 * state, rel=1e-12)


def test_published_counts_leave_out_embeddings_and_the_lm_head() -> None:
    """Of Kimi Linear all counts, 48B and 3B, of MiniMax that of active parameters, 45.9B (456B has both)."""
    kimi, minimax = (load_model(FOLDER / f"{name}.json") for name in (KIMI, MINIMAX))
    assert (kimi.params() - 2 * kimi.embedding_params) / 1e9 == pytest.approx(48, rel=0.01)
    assert round((kimi.active_params() - 2 * kimi.embedding_params) / 1e9) == 3
    assert (minimax.active_params() - 2 * minimax.embedding_params) / 1e9 == pytest.approx(45.9, rel=0.001)


@pytest.mark.parametrize("name", [KIMI, MINIMAX])
def test_a_model_with_states_is_the_same_after_saving(tmp_path: Path, name: str) -> None:
    model = load_model(FOLDER / f"{name}.json")
    (tmp_path / "model.yaml").write_text(dump(model))
    assert load_model(tmp_path / "model.yaml") == model


def kinds(numbers: list[int], num_layers: int) -> list[str]:
    return ["full_attention" if layer in numbers else "linear_attention" for layer in range(num_layers)]


def test_configs_that_transformers_writes_give_the_same_models(tmp_path: Path) -> None:
    """`KimiLinearConfig.to_dict` of transformers 5.19 without what it copies from Moonshot's config, and MiniMax's."""
    kimi = config_of(KIMI)
    for name in ("linear_attn_config", "first_k_dense_replace", "moe_layer_freq"):
        del kimi[name]
    kimi |= {"layer_types": kinds([3, 7, 11, 15, 19, 23, 26], 27), "mlp_layer_types": ["dense"] + ["sparse"] * 26}
    kimi |= {"linear_head_dim": 128, "linear_num_heads": 32, "linear_conv_kernel_dim": 4, "head_dim": 64}
    minimax = config_of(MINIMAX) | {"architectures": ["MiniMaxForCausalLM"], "model_type": "minimax"}
    del minimax["attn_type_list"], minimax["shared_intermediate_size"]
    minimax["layer_types"] = kinds(list(range(7, 80, 8)), 80)
    for name, data in ((KIMI, kimi), (MINIMAX, minimax)):
        before = load(tmp_path, config_of(name))
        assert load(tmp_path, data) == before
        del data["architectures"]  # the model's type stands in
        assert load(tmp_path, data) == before


OWN = config_of(KIMI)["linear_attn_config"]
WITHOUT_LISTS = {"linear_attn_config": OWN | {"kda_layers": None, "full_attn_layers": None}}
BOTH = "linear_attn_config: kda_layers and full_attn_layers must be lists that have each layer from 1 to 27 once"


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"linear_attn_config": OWN | {"kda_layers": OWN["kda_layers"][1:]}}, BOTH),
        ({"linear_attn_config": OWN | {"kda_layers": [*OWN["kda_layers"][1:], 4]}}, BOTH),
        ({"linear_attn_config": OWN | {"kda_layers": [*OWN["kda_layers"][1:], "1"]}}, BOTH),
        ({"linear_attn_config": OWN | {"kda_layers": [*OWN["kda_layers"][1:], True]}}, BOTH),
        ({"linear_attn_config": OWN | {"kda_layers": None}}, BOTH),
        ({"linear_attn_config": OWN | {"full_attn_layers": 4}}, BOTH),
        (
            {"linear_attn_config": OWN | {"short_conv_kernel_size": 0}},
            "linear_attn_config.short_conv_kernel_size: is 0, must be a whole number from 1 to",
        ),
        ({"linear_attn_config": OWN | {"head_dim": "128"}}, "linear_attn_config.head_dim: is '128', must be a whole"),
        (
            {"linear_attn_config": OWN | {"num_heads": 48}},
            "48 heads of linear attention must be a multiple of num_attention_heads (32), because ranks of tensor",
        ),
        ({"linear_attn_config": OWN | {"use_full_rank_gate": True}}, "only an output gate of low rank is modelled"),
        ({"linear_attn_config": None}, "linear_attn_config is missing, and layer_types, too"),
        ({"layer_types": ["linear_attention"] * 26}, "layer_types: has 26 items, must be a list of 27 items"),
        ({"layer_types": ["mamba"] * 27}, "layer_types: has 'mamba', only linear_attention and full_attention are"),
        (
            {**WITHOUT_LISTS, "layer_types": ["linear_attention"] * 27},
            "linear.layers is 27, must be 0 to num_layers (27) - 1",
        ),
        ({"mla_use_output_gate": True}, "mla_use_output_gate: is true, but what it adds to Kimi Linear is not"),
        ({"routed_expert_hidden_size": 1024}, "routed_expert_hidden_size: is 1024, but what it adds to Kimi"),
        ({"attn_res_block_size": 4}, "attn_res_block_size: is 4, but what it adds to Kimi Linear is not modelled"),
        ({"moe_layer_freq": 2}, "moe_layer_freq: only models with experts in every layer after the first (1) are"),
        ({"first_k_dense_replace": None}, "first_k_dense_replace is missing"),
        ({"first_k_dense_replace": 27}, "moe.first_dense_layers is 27, must be 0 to num_layers (27) - 1"),
        ({"mlp_layer_types": ["sparse"] * 26 + ["dense"]}, "mlp_layer_types: must have 'dense' for the first layers"),
        ({"num_experts_per_token": None}, "num_experts_per_token is missing"),
        ({"kv_lora_rank": None}, "kv_lora_rank is missing"),
    ],
)
def test_what_is_wrong_or_unlike_kimi_linear_is_refused(tmp_path: Path, changes: dict[str, object], what: str) -> None:
    with pytest.raises(DocumentError, match=re.escape(what)) as error:
        load(tmp_path, config_of(KIMI) | changes)
    assert len(error.value.problems) == 1


def test_a_mapping_that_is_none_is_one_problem_at_its_line(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match=r"config\.json:\d+: linear_attn_config: is 7, must be a mapping") as error:
        load(tmp_path, config_of(KIMI) | {"linear_attn_config": 7})
    assert len(error.value.problems) == 1


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"attn_type_list": [0, 1]}, "attn_type_list: has 2 items, must be a list of 80 items, one for each layer"),
        ({"attn_type_list": [0, 2] * 40}, "attn_type_list: has 2, must have 0 (linear) or 1 (softmax) for each layer"),
        ({"attn_type_list": [0, True] * 40}, "attn_type_list: has true, must have 0 (linear) or 1 (softmax)"),
        ({"attn_type_list": None}, "attn_type_list is missing, and layer_types, too"),
        ({"attn_type_list": [0] * 80}, "linear.layers is 80, must be 0 to num_layers (80) - 1"),
        ({"layer_types": ["conv"] * 80}, "layer_types: has 'conv', only linear_attention and full_attention are"),
        ({"shared_intermediate_size": 4096}, "shared_intermediate_size: is 4096, only models without a shared expert"),
        ({"shared_intermediate_size": [0]}, "shared_intermediate_size: is a list, only models without a shared expert"),
        ({"num_local_experts": [32]}, "num_local_experts: is a list, must be a whole number"),
    ],
)
def test_what_is_wrong_in_a_config_of_minimax_is_refused(tmp_path: Path, changes: dict[str, object], what: str) -> None:
    with pytest.raises(DocumentError, match=re.escape(what)) as error:
        load(tmp_path, config_of(MINIMAX) | changes)
    assert len(error.value.problems) == 1


def test_softmax_in_every_layer_leaves_an_ordinary_model(tmp_path: Path) -> None:
    assert load(tmp_path, config_of(MINIMAX) | {"attn_type_list": [1] * 80}).state_bytes() == 0


def test_layers_of_one_kind_that_are_not_spread_evenly_are_refused(tmp_path: Path) -> None:
    linear_first = {"linear_attn_config": OWN | {"kda_layers": [*range(1, 21)], "full_attn_layers": [*range(21, 28)]}}
    what = (
        "linear_attn_config: has 20 layers of linear attention in layers 0 to 19, not about 14.8, their share of 20 in "
        "27: a stage is charged the mean of all layers, so each kind must be spread evenly"
    )
    with pytest.raises(DocumentError, match=re.escape(what)):
        load(tmp_path, config_of(KIMI) | linear_first)
    qwen = config_of(QWEN)
    qwen["text_config"]["layer_types"] = ["linear_attention"] * 48 + ["full_attention"] * 16
    with pytest.raises(DocumentError, match=re.escape("text_config.layer_types: has 48 layers of linear attention in")):
        load(tmp_path, qwen)
    with pytest.raises(DocumentError, match=re.escape("attn_type_list: has 0 layers of linear attention in layers 0")):
        load(tmp_path, config_of(MINIMAX) | {"attn_type_list": [1] * 40 + [0] * 40})
    # The default of transformers, where the first full layer is the fifth, is even enough.
    default = {**WITHOUT_LISTS, "layer_types": kinds([4, 8, 12, 16, 20, 24], 27)}
    assert load(tmp_path, config_of(KIMI) | default).state_bytes() > 0


@given(st.lists(st.integers(0, 1), min_size=1, max_size=12))
def test_layers_are_even_if_no_run_has_two_more_or_fewer_than_its_share(flags: list[int]) -> None:
    total, linear = len(flags), flags.count(0)
    runs = [flags[first:end] for first in range(total) for end in range(first + 1, total + 1)]
    is_even = all(abs(run.count(0) - linear * len(run) / total) < 2 - 1e-9 for run in runs)
    data = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": total, "attn_type_list": flags}
    config = Config(data, Text(file="x", text=None))
    found = lightning_attention(config, total)
    assert (config.problems == []) == is_even
    assert found.numbers == tuple(layer for layer, flag in enumerate(flags) if flag == 0)


def test_both_lists_of_the_kinds_of_layers_must_agree(tmp_path: Path) -> None:
    minimax, kimi = config_of(MINIMAX), config_of(KIMI)
    linear = {i for i, kind in enumerate(minimax["attn_type_list"]) if kind == 0}
    for data, those in ((minimax, linear), (kimi, {i - 1 for i in kimi["linear_attn_config"]["kda_layers"]})):
        kinds = ["linear_attention" if i in those else "full_attention" for i in range(data["num_hidden_layers"])]
        assert load(tmp_path, data | {"layer_types": kinds}) == load(tmp_path, data)
    kinds = ["full_attention", *kinds[1:3], "linear_attention", *kinds[4:]]
    with pytest.raises(DocumentError) as caught:
        load(tmp_path, kimi | {"layer_types": kinds})
    (problem,) = caught.value.problems
    assert str(problem).endswith("layer_types: differs from linear_attn_config: layer 0, there 1, is in its kda_layers")
    kinds = ["full_attention" if i == 3 else "linear_attention" if i in linear else "full_attention" for i in range(80)]
    with pytest.raises(DocumentError) as caught:
        load(tmp_path, minimax | {"layer_types": kinds})
    (problem,) = caught.value.problems
    assert str(problem).endswith("layer_types[3]: is 'full_attention', but attn_type_list[3] is 0: they contradict")


def test_no_list_of_layers_is_unbounded(tmp_path: Path) -> None:
    qwen = config_of(QWEN)
    qwen["text_config"] |= {"num_hidden_layers": 10**9, "layer_types": None}
    for config in (qwen, config_of(KIMI) | {"num_hidden_layers": 10**9}):
        with pytest.raises(DocumentError) as caught:
            load(tmp_path, config)
        [problem] = caught.value.problems
        assert "num_hidden_layers: is 1000000000, must be a whole number from 1 to 10000" in str(problem)


LAYERS = "model.layers"
EXPERT = 3 * 2304 * 1024


@pytest.mark.parametrize(
    ("name", "ignore", "params"),
    [
        # Both kinds of layers of Kimi Linear have a q_proj and an o_proj in self_attn, of different sizes.
        (KIMI, f"{LAYERS}.0.self_attn.q_proj", 9_437_184),
        (KIMI, f"{LAYERS}.3.self_attn.q_proj", 14_155_776),
        (KIMI, f"{LAYERS}.3.self_attn", LATENT_LAYER),
        (KIMI, f"{LAYERS}.25.self_attn", DELTA_LAYER - 49_152),
        (KIMI, "re:.*self_attn.*", 20 * (DELTA_LAYER - 49_152) + 7 * LATENT_LAYER),
        (KIMI, "re:.*[fg]_[ab]_proj", 20 * 2 * (294_912 + 524_288)),
        (KIMI, "re:.*block_sparse_moe.shared_experts.*", 27 * EXPERT),
        (MINIMAX, f"{LAYERS}.0.self_attn", LIGHTNING_LAYER),
        (MINIMAX, f"{LAYERS}.7.self_attn", 2 * 6144 * (8192 + 1024)),
        (MINIMAX, "re:.*output_gate", 70 * 50_331_648),
        (MINIMAX, "lm_head", 0),
    ],
)
def test_modules_of_both_kinds_of_layers_that_stay_in_16_bits_count_as_such(
    tmp_path: Path, name: str, ignore: str, params: int
) -> None:
    left = MODELOPT | {"ignore": [ignore]}
    model = load(tmp_path, config_of(name) | {"quantization_config": left})
    expected = 0.5625 + 1.4375 * params / model.num_layers / model.layer_params()
    assert model.weight_bytes == pytest.approx(expected, rel=1e-12)


def test_kimi_linear_in_nvfp4_has_all_matrices_in_four_bits(tmp_path: Path) -> None:
    """As in the config of Firworks/Kimi-Linear-48B-A3B-Instruct-nvfp4."""
    weights = {"num_bits": 4, "type": "float", "group_size": 16, "strategy": "tensor_group", "symmetric": True}
    groups = {"group_0": {"format": "nvfp4-pack-quantized", "targets": ["Linear"], "weights": weights}}
    quantisation = {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": ["lm_head"]}
    model = load(tmp_path, config_of(KIMI) | {"quantization_config": quantisation})
    assert (model.weights, model.weight_bytes, model.kv_bytes) == ("nvfp4", 0.5625, 2.0)
    # Experts alone, named as in the checkpoint, leave both kinds of attention and shared experts in 16 bits.
    groups["group_0"]["targets"] = [r"re:.*block_sparse_moe\.experts\.\d+\.w[123]$"]
    model = load(tmp_path, config_of(KIMI) | {"quantization_config": quantisation})
    left = (20 * (DELTA_LAYER - 49_152) + 7 * LATENT_LAYER) / 27 + EXPERT
    assert model.weight_bytes == pytest.approx(0.5625 + 1.4375 * left / model.layer_params(), rel=0.002)
