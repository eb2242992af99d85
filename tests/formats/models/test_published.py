"""Fields of published configs, of families whose readers only map names, give the published number of parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hetis.formats.errors import DocumentError
from hetis.formats.models.document import load_model
from hetis.solver.model import Latent, ModelSpec, Recurrent

PUBLISHED = {
    one["name"]: one
    for one in map(json.loads, Path(__file__).with_name("published.jsonl").read_text(encoding="utf-8").splitlines())
}


def read(folder: Path, name: str, **fields: Any) -> ModelSpec:
    (folder / "config.json").write_text(json.dumps(PUBLISHED[name]["config"] | fields))
    return load_model(folder / "config.json")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_its_parameters(tmp_path: Path, name: str) -> None:
    assert read(tmp_path, name).params() / 1e9 == pytest.approx(PUBLISHED[name]["billions"], rel=0.01)


@pytest.mark.parametrize(
    ("name", "kv_bytes"),
    [
        ("falcon-7b", 32 * 2 * 64 * 2),  # layers, keys and values of one head, its size, bytes
        ("falcon-40b", 60 * 2 * 8 * 64 * 2),
        ("starcoder", 40 * 2 * 128 * 2),
        ("chatglm3-6b", 28 * 2 * 2 * 128 * 2),
        ("dbrx", 40 * 2 * 8 * 128 * 2),
        ("Pixtral-12B", 40 * 2 * 8 * 128 * 2),
        ("DeepSeek-OCR", 12 * 2 * 10 * 128 * 2),
        ("Ling-3.0-flash", 7 * (512 + 64) * 2),
        ("granite-4.0-h-small", 4 * 2 * 8 * 128 * 2),  # four of 40 layers have attention
        ("Falcon-H1-34B", 72 * 2 * 4 * 128 * 2),
        ("Ring-flash-linear-2.0", 4 * 2 * 4 * 128 * 2),  # every eighth layer
        ("Jamba-1.5-Large", 9 * 2 * 8 * 128 * 2),
        ("LFM2-8B-A1B", 6 * 2 * 8 * 64 * 2),
        ("GLM-4.7-Flash", 47 * (512 + 64) * 2),
        ("LongCat-Flash", 2 * 28 * (512 + 64) * 2),  # attention twice in each layer
        ("Nemotron-Nano-9B-v2", 4 * 2 * 8 * 128 * 2),
        ("Qwen2.5-Omni-7B", 28 * 2 * 4 * 128 * 2),
    ],
)
def test_a_token_keeps_the_kv_of_its_heads(tmp_path: Path, name: str, kv_bytes: int) -> None:
    assert read(tmp_path, name).kv_bytes_per_token() == pytest.approx(kv_bytes)


def test_a_third_of_longcats_choices_are_experts_that_do_nothing(tmp_path: Path) -> None:
    """Its model card: 18.6 to 31.3 billion active parameters, 27 on average."""
    assert read(tmp_path, "LongCat-Flash").active_params() / 1e9 == pytest.approx(27, rel=0.05)


def test_layers_of_ling_3_behind_the_last_whole_group_have_full_attention(tmp_path: Path) -> None:
    """As in vLLM 0.32 (``_is_kda_layer`` in bailing_moe_v3.py). A state has 32 bits, its convolutions' inputs 16."""
    layers = read(tmp_path, "Ling-3.0-flash", num_hidden_layers=45).layers
    kinds = ["full" if isinstance(one.mixers[0], Latent) else "linear" for one in layers]
    assert [n for n, kind in enumerate(kinds) if kind == "full"] == [5, 11, 17, 23, 29, 35, 41, 42, 43, 44]
    state = layers[0].mixers[0]
    assert isinstance(state, Recurrent)
    assert state.request_bytes == 4 * 32 * 128 * 128 + 2 * 3 * 3 * 32 * 128
    # q, k, v, o and both gates, a scalar per head, and three convolutions
    assert state.weights == 6 * 2560 * 4096 + 2560 * 32 + 3 * 4096 * 4


def test_an_unknown_decoder_needs_the_width_of_its_mlp(tmp_path: Path) -> None:
    """Without one, Falcon-7B was read with half of its parameters, and 71 times its KV."""
    config = {"architectures": ["FalconNextForCausalLM"], "model_type": "falcon_next"}
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["falcon-7b"]["config"] | config))
    with pytest.raises(DocumentError, match="intermediate_size is missing"):
        load_model(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("name", "fields", "what"),
    [
        ("gpt2-xl", {"n_embd": "x"}, "n_embd: is 'x', must be a whole number"),
        ("chatglm3-6b", {"padded_vocab_size": 1.5}, "padded_vocab_size: is 1.5, must be a whole number"),
        ("mpt-7b", {"expansion_ratio": True}, "expansion_ratio: is true, must be a whole number"),
        ("mpt-7b", {"expansion_ratio": 5.5}, "expansion_ratio: is 5.5, must be a whole number"),
    ],
)
def test_what_is_wrong_is_named_as_in_the_file(tmp_path: Path, name: str, fields: dict[str, Any], what: str) -> None:
    with pytest.raises(DocumentError, match=f": {what}"):
        read(tmp_path, name, **fields)


def test_a_ratio_may_be_written_with_a_point(tmp_path: Path) -> None:
    assert read(tmp_path, "mpt-7b", expansion_ratio=4.0) == read(tmp_path, "mpt-7b")


def test_activations_of_classic_names_are_seen(tmp_path: Path) -> None:
    """An MLP with gelu may have two matrices or three."""
    config = {"architectures": ["StarNextForCausalLM"], "model_type": "star_next"}
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["starcoder"]["config"] | config))
    with pytest.raises(DocumentError, match="has fields of no known kind: hidden_act"):
        load_model(tmp_path / "config.json")


def test_towers_that_a_config_does_not_describe_are_said(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["DeepSeek-OCR"]["config"]))
    notes = list[str]()
    assert load_model(tmp_path / "config.json", notes=notes).vision_params == 400_000_000
    assert [note for note in notes if "which its config does not describe, count as 0.40B parameters" in note]


@pytest.mark.parametrize("name", ["Pixtral-12B", "HunyuanOCR"])
def test_a_tower_that_cannot_be_read_is_said_once(tmp_path: Path, name: str) -> None:
    config = PUBLISHED[name]["config"] | {"vision_config": {"tower_width": 1024}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    notes = list[str]()
    assert load_model(tmp_path / "config.json", notes=notes).vision_params == 0
    assert notes == ["vision_config has no sizes of known names: its tower counts as none"]


TEXT = {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 30, "num_attention_heads": 32}
TEXT |= {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 131_072, "model_type": "llama"}


@pytest.mark.parametrize(
    ("fields", "params"),
    [
        ({"hidden_act": "gelu"}, 2 * (4 * 1024**2 + 2 * 1024 * 4096)),
        ({"hidden_act": "silu"}, 2 * (4 * 1024**2 + 3 * 1024 * 4096)),  # SwiGLU
        ({"hidden_act": "gelu", "model_type": "pixtral"}, 2 * (4 * 1024**2 + 3 * 1024 * 4096)),
        ({"num_key_value_heads": 4}, 2 * (2 * 1024 * 64 * (16 + 4) + 2 * 1024 * 4096)),
        ({"head_dim": 128}, 2 * (4 * 1024 * 16 * 128 + 2 * 1024 * 4096)),
        ({"model_type": "glm_audio"}, 2 * (4 * 1024**2 + 2 * 1024 * 4096)),
    ],
)
def test_towers_have_the_matrices_that_their_fields_say(tmp_path: Path, fields: dict[str, Any], params: int) -> None:
    """The language model is inside, although its hidden size stands outside, too (Voxtral)."""
    tower = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 2, "num_attention_heads": 16}
    config = {"architectures": ["VoxNextForConditionalGeneration"], "model_type": "vox_next", "hidden_size": 3072}
    (tmp_path / "config.json").write_text(json.dumps(config | {"text_config": TEXT, "audio_config": tower | fields}))
    model = load_model(tmp_path / "config.json")
    patches = 3 * 14 * 14 * 1024
    assert (model.num_layers, model.vision_params) == (30, params + patches + 1024 * 3072)
