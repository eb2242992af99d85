"""Compressed attention: DeepSeek-V4's parameters, weights, KV and FLOPs against published figures; configs refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hetis.formats.documents import dump
from hetis.formats.errors import DocumentError
from hetis.formats.models.document import load_model
from hetis.solver.model import Experts, ModelSpec
from tests.formats.models.test_huggingface import FOLDER, config_of, load
from tests.models import InShort, replace, shape_of

PRO, FLASH = "deepseek-ai__DeepSeek-V4-Pro", "deepseek-ai__DeepSeek-V4-Flash"
GIB = 2**30
KINDS = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}
# Parameters as transformers 5.23 builds them from these configs (`named_parameters` on the meta device). Beside ours
# they have norms, biases, attention sinks and position biases, and the sum over streams before the LM head.
COUNTED = {PRO: 1_572_997_179_491, FLASH: 284_332_230_231}
# Bytes of all tensors in the published checkpoints, of which one layer more is for drafts: the sum over Pro's tensors
# in GiB, and the ``total_size`` of Flash's index.
CHECKPOINT_BYTES = {PRO: 805.32 * GIB, FLASH: 159_609_485_896}
# Parameters of Pro's matrices in `named_parameters`: of every layer, of a sparse layer, of a heavy one.
EVERY = 11_010_048 + 100_663_296 + 3_670_016 + 67_108_864 + 117_440_512 + 2 * 688_128
SPARSE = 2 * 7_340_032 + 2 * 1_835_008 + 12_582_912 + 458_752
HEAVY = 2 * 3_670_016


def in_16_bits(model: ModelSpec) -> ModelSpec:
    """Return the model with KV and keys of the indexer in 16 bits, as vLLM's post on DeepSeek-V4 counts them."""
    shape = vars(InShort(model).compressed)
    keys = 2.0 * shape["index_head_dim"]
    return replace(model, kv_bytes=2.0, compressed=shape | {"index_key_bytes": keys})


def test_pro_compresses_four_tokens_in_thirty_layers_and_128_in_the_others() -> None:
    model = load_model(FOLDER / f"{PRO}.json")
    assert (model.attention.name, model.head_groups, model.queries_per_group) == ("gqa", 1, 128)
    assert model.experts == Experts(count=384, active=6, width=3072, shared_width=3072)
    assert vars(InShort(model).compressed) == shape_of(
        window=128,
        sparse_layers=30,
        sparse_ratio=4,
        heavy_layers=31,
        heavy_ratio=128,
        top_entries=1024,
        index_heads=64,
        index_head_dim=128,
        index_key_bytes=132.0,  # 128 numbers of 8 bits and a scale of 32
        rope_head_dim=64,
        q_lora_rank=1536,
        o_groups=16,
        o_lora_rank=1024,
    )
    assert (model.residual_streams, model.kv_bytes, model.weights) == (4, 1.0, "mxfp4")
    assert model.attention_params() * 61 == pytest.approx(61 * EVERY + 30 * SPARSE + 31 * HEAVY, rel=1e-12)
    assert not model.heads_can_move
    flash = InShort(load_model(FOLDER / f"{FLASH}.json")).compressed
    assert (flash.sparse_layers, flash.heavy_layers, flash.top_entries) == (21, 20, 512), "two layers have windows only"


@pytest.mark.parametrize("name", [PRO, FLASH])
def test_parameters_are_those_of_transformers_but_for_norms_and_biases(name: str) -> None:
    assert load_model(FOLDER / f"{name}.json").params() == pytest.approx(COUNTED[name], rel=1e-5)


@pytest.mark.parametrize(("name", "billions"), [(PRO, 49), (FLASH, 13)])
def test_published_active_parameters_leave_out_the_embedding_table(name: str, billions: int) -> None:
    model = load_model(FOLDER / f"{name}.json")
    assert round((model.active_params() - model.embedding_params) / 1e9) == billions


@pytest.mark.parametrize("name", [PRO, FLASH])
def test_weights_take_the_bytes_of_the_checkpoint(name: str) -> None:
    """Routed experts have MXFP4, compressors and embeddings 16 bits, the mixing of streams 32, all else FP8."""
    model = load_model(FOLDER / f"{name}.json")
    drafting = model.layer_params() + 2 * model.hidden**2
    layers = (model.num_layers * model.layer_params() + drafting) * model.weight_bytes
    tables = 2 * model.embedding_params * model.embedding_bytes
    assert layers + tables == pytest.approx(CHECKPOINT_BYTES[name], rel=1e-3)


def test_kv_of_a_million_tokens_takes_the_published_gib_and_an_eighth_of_before() -> None:
    """vLLM's post: 9.62 GiB per sequence in bfloat16, of which windows have 0.01, 8.7 times less than V3.2's."""
    pro, before = (load_model(FOLDER / f"{name}.json") for name in (PRO, "deepseek-ai__DeepSeek-V3.2"))
    assert before.indexer is not None
    indexer = vars(InShort(before).indexer) | {"key_bytes": 256.0}
    before = replace(before, kv_bytes=2.0, indexer=indexer)
    windows = 61 * 128 * 512 * 2
    of_pro, of_before = 2**20 * in_16_bits(pro).kv_bytes_per_token() + windows, 2**20 * before.kv_bytes_per_token()
    assert of_pro / GIB == pytest.approx(9.62, abs=0.005)
    assert of_before / of_pro == pytest.approx(8.7, abs=0.05)
    # 448 numbers of 8 bits, 64 of 16, a scale for each 64; a key beside it in sparse layers.
    assert pro.kv_bytes_per_token() == pytest.approx(30 * (584 + 132) / 4 + 31 * 584 / 128, rel=1e-12)


def test_a_request_keeps_a_window_and_inputs_of_compressors_whatever_its_context() -> None:
    """As in vLLM's specs: 584 bytes of 128 tokens; 2 x 2 x 512 and 2 x 2 x 128 numbers of 32 bits of 8 tokens in a
    sparse layer, 2 x 512 of 128 tokens in a heavy one. A chunk has as much of each token."""
    pro = load_model(FOLDER / f"{PRO}.json")
    sparse, heavy = 4 * (2048 + 512), 4 * 1024
    assert pro.state_bytes() * 61 == pytest.approx(61 * 128 * 584 + 30 * 8 * sparse + 31 * 128 * heavy, rel=1e-12)
    assert pro.chunk_state_bytes() * 61 == pytest.approx(61 * 584 + 30 * sparse + 31 * heavy, rel=1e-12)
    assert (pro.state_ranks(8), pro.kept_states) == (1, 1)
    # Of four tokens in a sparse layer each is written, and the last reads eight; of 128 in a heavy one, it reads 128.
    assert pro.state_traffic_bytes(1.0) * 61 == pytest.approx(30 * 3 * sparse + 31 * 2 * heavy, rel=1e-12)


@pytest.mark.parametrize("context", [100.0, 1000.0, 4096.0, 100_000.0])
def test_a_query_attends_to_its_window_and_entries_and_is_compared_with_all_keys(context: float) -> None:
    pro = load_model(FOLDER / f"{PRO}.json")
    chosen, heavy, keys = min(1024.0, context / 4), context / 128, context / 4
    attended = min(128.0, context) + (30 * chosen + 31 * heavy) / 61
    assert pro.attended_tokens(context) == pytest.approx(attended, rel=1e-12)
    read = pro.read_tokens(context) * pro.kv_bytes_per_token_group()
    assert read * 61 == pytest.approx(61 * attended * 584 + 30 * keys * 132, rel=1e-12)
    assert pro.scan_flops(context) * 61 == pytest.approx(30 * keys * 2 * 64 * 128, rel=1e-12)
    # Scores and values of one vector are 2 x 512 FLOPs each.
    assert pro.decode_attention_flops(attended, 128.0) == pytest.approx(attended * 128 * 4 * 512, rel=1e-12)
    assert pro.cached_tokens(context) == context, "entries of all tokens stay"


def test_a_token_at_a_million_takes_a_quarter_of_the_flops_of_before() -> None:
    """The report: 27% of V3.2's FLOPs per token. (It counts those of the indexer in FP4 as fewer.)"""
    pro, before = (load_model(FOLDER / f"{name}.json") for name in (PRO, "deepseek-ai__DeepSeek-V3.2"))
    x, layers = 2.0**20, 61
    now = 2 * (pro.active_params() - pro.embedding_params)
    now += layers * (pro.decode_attention_flops(pro.attended_tokens(x), 128) + pro.scan_flops(x))
    indexer = before.indexer
    then = 2 * (before.active_params() - before.embedding_params)
    then += layers * (2 * 2048 * 128 * (512 + 64 + 512) + 2 * x * indexer.heads * indexer.head_dim)
    assert now / then == pytest.approx(0.27, abs=0.01)


@pytest.mark.parametrize("name", [PRO, FLASH])
def test_a_compressed_model_is_the_same_after_saving(tmp_path: Path, name: str) -> None:
    model = load_model(FOLDER / f"{name}.json")
    (tmp_path / "model.yaml").write_text(dump(model))
    assert load_model(tmp_path / "model.yaml") == model


def test_layers_as_transformers_names_them_are_the_same_model(tmp_path: Path) -> None:
    data = config_of(FLASH)
    ratios = data.pop("compress_ratios")[: data["num_hidden_layers"]]
    data["layer_types"] = [KINDS[ratio] for ratio in ratios]
    data["compress_rates"] = {KINDS[4]: 4, KINDS[128]: 128}
    data["partial_rotary_factor"] = data.pop("qk_rope_head_dim") / data["head_dim"]
    model = load(tmp_path, data)
    assert replace(model, name="") == replace(load_model(FOLDER / f"{FLASH}.json"), name="")


@pytest.mark.parametrize(
    ("changes", "weights", "weight_bytes"),
    [
        ({"expert_dtype": None}, "mxfp4", 0.54296),
        ({"expert_dtype": "fp8"}, "fp8", 1.00145),
        ({"quantization_config": None}, "", 2.0),
    ],
)
def test_experts_have_their_own_format(
    tmp_path: Path, changes: dict[str, Any], weights: str, weight_bytes: float
) -> None:
    """FP8 experts are those of the base models; vLLM takes FP4 where nothing is stated."""
    model = load(tmp_path, config_of(FLASH) | changes)
    assert (model.weights, model.weight_bytes) == (weights, pytest.approx(weight_bytes, rel=1e-4))


def test_the_name_of_a_method_may_be_written_in_capitals(tmp_path: Path) -> None:
    data = config_of(FLASH)
    quantisation = data["quantization_config"] | {"quant_method": "FP8"}
    changed = load(tmp_path, data | {"quantization_config": quantisation})
    assert changed.weight_bytes == load_model(FOLDER / f"{FLASH}.json").weight_bytes


def test_another_models_experts_are_not_read_as_those_of_this_family(tmp_path: Path) -> None:
    data = json.loads((FOLDER / "Qwen__Qwen3-30B-A3B.json").read_text())
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    plain = load(tmp_path, data | {"quantization_config": fp8})
    assert load(tmp_path, data | {"quantization_config": fp8 | {"expert_dtype": "fp4"}}) == plain


def test_nvfp4_experts_are_known(tmp_path: Path) -> None:
    data = config_of(FLASH)
    data["quantization_config"]["moe_quant_algo"] = "NVFP4"
    model = load(tmp_path, data)
    assert (model.weights, model.weight_bytes) == ("nvfp4", pytest.approx(0.5735, rel=1e-3))


@pytest.mark.parametrize("parent", ["ffn", "moe_block"])  # of DeepSeek's own checkpoints, and an unknown one
def test_experts_that_a_checkpoint_lists_have_their_format(tmp_path: Path, parent: str) -> None:
    """NVIDIA's checkpoint of NVFP4 experts takes 163 to 171 GB; all else stays in FP8, as DeepSeek stores it."""
    data = config_of(FLASH)
    data["quantization_config"] = {
        "quant_method": "fp8",
        "moe_quant_algo": "NVFP4",
        "quant_algo": "MIXED_PRECISION",
        "ignore": ["*.attn.*", "*.ffn.shared_experts.*", "head", "mtp.*"],
        "quantized_layers": {
            f"layers.{i}.{parent}.experts": {"quant_algo": "NVFP4", "group_size": 16} for i in range(43)
        },
    }
    model = load(tmp_path, data)
    total = model.num_layers * model.layer_params() * model.weight_bytes + 4 * model.embedding_params
    assert model.weights == "nvfp4"
    assert 163e9 < total < 171e9


PLAIN = [0, 0, *[4, 128] * 20, 4]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"compress_ratios": None}, "compress_ratios is missing, and layer_types, too"),
        ({"compress_ratios": 4}, "compress_ratios: is 4, must be a list of 43 (44 with the drafting layers)"),
        ({"compress_ratios": PLAIN[:-1]}, "compress_ratios: has 42 items, must be a list of 43 (44 with"),
        ({"compress_ratios": [2, *PLAIN[1:]]}, "compress_ratios: has 2, must have 0, 4 or 128 for each layer"),
        ({"compress_ratios": [True, *PLAIN[1:]]}, "compress_ratios: has true, must have 0, 4 or 128 for each layer"),
        ({"compress_ratios": [0] * 43}, "compress_ratios: has no layer that compresses"),
        (
            {"compress_ratios": [4] * 22 + [128] * 21},
            "compress_ratios: has 22 layers of compressed sparse attention in layers 0 to 21, not about 11.3",
        ),
        ({"layer_types": ["full_attention"] * 43}, "layer_types: has 'full_attention', only sliding_attention and"),
        ({"num_key_value_heads": 2}, "num_key_value_heads: must be 1"),
        ({"qk_rope_head_dim": 1024}, "qk_rope_head_dim: is 1024, must be at most head_dim (512)"),
        ({"o_groups": 7}, "o_groups: is 7, must divide num_attention_heads (64)"),
        ({"hc_mult": 0}, "hc_mult: is 0, must be a whole number from 1 to 64"),
        ({"hc_mult": 65}, "hc_mult: is 65, must be a whole number from 1 to 64"),
        ({"index_topk": None}, "index_topk is missing"),
        ({"sliding_window": None}, "sliding_window is missing"),
        ({"o_lora_rank": "1024"}, "o_lora_rank: is '1024', must be a whole number"),
        ({"vision_n_layers": 24}, "vision_n_layers: is 24, but its vision tower is not modelled"),
        ({"expert_dtype": "int4"}, "expert_dtype: is 'int4', must be fp4 or fp8"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(DocumentError) as caught:
        load(tmp_path, config_of(FLASH) | changes)
    assert said in str(caught.value)


def test_both_lists_of_the_kinds_of_layers_must_agree(tmp_path: Path) -> None:
    data = config_of(FLASH)
    both = data | {"layer_types": [KINDS[ratio] for ratio in data["compress_ratios"][: data["num_hidden_layers"]]]}
    assert load(tmp_path, both) == load(tmp_path, data)
    both["layer_types"][2:4] = reversed(both["layer_types"][2:4])
    with pytest.raises(DocumentError) as caught:
        load(tmp_path, both)
    [problem] = caught.value.problems
    assert problem.path == "layer_types[2]"
    assert problem.message == "is 'heavily_compressed_attention', but compress_ratios[2] is 4: they contradict"


def test_other_ratios_of_transformers_are_refused(tmp_path: Path) -> None:
    data = config_of(FLASH)
    data["layer_types"] = [KINDS[ratio] for ratio in PLAIN]
    data["compress_rates"] = {KINDS[4]: 8, KINDS[128]: 128}
    with pytest.raises(DocumentError, match=r"compress_rates: is .*, must have compressed_sparse_attention 4"):
        load(tmp_path, data)
