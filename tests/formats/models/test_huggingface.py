"""Shapes from config.json agree with the catalogue and with published parameter counts."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from hetis.formats import catalogue
from hetis.formats.documents import dump
from hetis.formats.errors import DocumentError
from hetis.formats.models import families, unlike
from hetis.formats.models.document import load_model
from hetis.formats.models.families import FAMILIES, NOT_MODELLED
from hetis.solver.model import Dense, ModelSpec
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
    renamed = {"Qwen3NextForCausalLM", "MiniMaxForCausalLM", "Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM"}
    renamed |= {"Llama4ForCausalLM", "InternS2PreviewForConditionalGeneration"}
    by_layers = (unlike.by_layers, families._of_inner_model, families._with_towers, unlike.deci)
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
    data = config_of("meta-llama__Llama-2-70b-hf")
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


@pytest.mark.parametrize("config", ["zai-org__GLM-5", "deepseek-ai__DeepSeek-V3"])
def test_dense_layers_are_read_from_either_field(tmp_path: Path, config: str) -> None:
    data = json.loads((FOLDER / f"{config}.json").read_text())
    layers = data["num_hidden_layers"]
    del data["first_k_dense_replace"]
    data["mlp_layer_types"] = ["dense"] * 5 + ["sparse"] * (layers - 5)
    (tmp_path / "config.json").write_text(json.dumps(data))
    assert load_model(tmp_path).prefix_layers == 5
    data["mlp_layer_types"][7] = "dense"
    (tmp_path / "config.json").write_text(json.dumps(data))
    assert [n for n, one in enumerate(load_model(tmp_path).layers) if isinstance(one.mlps[0], Dense)] == [
        0,
        1,
        2,
        3,
        4,
        7,
    ]


def test_more_dense_layers_than_layers_are_refused(tmp_path: Path) -> None:
    data = json.loads((FOLDER / "zai-org__GLM-4.5.json").read_text()) | {"first_k_dense_replace": 92}
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(
        DocumentError, match=re.escape("first_k_dense_replace: is 92, must be less than the number of layers (92)")
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


def test_checkpoints_saved_by_transformers_5_name_the_attention_of_layers(tmp_path: Path) -> None:
    """NVIDIA's NVFP4 checkpoint of GLM-5.2 does; later versions have another name for it."""
    plain = load_model(FOLDER / "zai-org__GLM-5.2.json")
    config = json.loads((FOLDER / "zai-org__GLM-5.2.json").read_text())
    for kind in ("deepseek_sparse_attention", "indexed_attention"):
        (tmp_path / "config.json").write_text(json.dumps(config | {"layer_types": [kind] * 78}))
        assert load_model(tmp_path).layers == plain.layers


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
