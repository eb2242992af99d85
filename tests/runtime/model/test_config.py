"""What can be run is read, and what cannot is refused by name, all problems at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hetis.runtime.model.config import RopeConfig, read_config
from hetis.runtime.model.errors import ModelError
from tests.runtime.checkpoints import random_model, rewrite_config


def refused(folder: Path, tmp_path: Path, **fields: Any) -> str:
    with pytest.raises(ModelError) as caught:
        read_config(rewrite_config(folder, tmp_path / "model", **fields))
    return str(caught.value)


def test_sizes_and_heads_are_read() -> None:
    config = read_config(random_model("qwen3").folder)
    assert (config.family, config.layers, config.hidden, config.vocab) == ("qwen3", 3, 64, 97)
    assert (config.q_heads, config.kv_heads, config.head_dim, config.queries_per_group) == (8, 4, 16, 2)
    assert config.qk_norm
    assert not config.qkv_bias


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
OLD = {"rope_parameters": None}  # as transformers 4 wrote it


def test_rope_is_read_as_transformers_4_and_5_write_it(tmp_path: Path) -> None:
    folder = random_model().folder
    old = OLD | {"rope_theta": 5e5, "rope_scaling": LLAMA3}
    new = {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}
    wanted = RopeConfig(theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_tokens=8192)
    for name, fields in (("old", old), ("new", new)):
        assert read_config(rewrite_config(folder, tmp_path / name, **fields)).rope == wanted
    nulls = OLD | {"rope_theta": None, "rope_scaling": None, "partial_rotary_factor": None}
    assert read_config(rewrite_config(folder, tmp_path / "nulls", **nulls)).rope == RopeConfig(theta=1e4)


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"sliding_window": 7}, (7, 7, 7)),
        ({"sliding_window": None}, (0, 0, 0)),
        ({"sliding_window": 7, "use_sliding_window": False, "model_type": "qwen2"}, (0, 0, 0)),
        (
            {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 2, "model_type": "qwen2"},
            (0, 0, 7),
        ),
        (
            {
                "sliding_window": 7,
                "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            },
            (0, 7, 0),
        ),
    ],
)
def test_windows_are_by_layer(tmp_path: Path, fields: dict[str, Any], wanted: tuple[int, ...]) -> None:
    model = random_model("mistral")
    folder = rewrite_config(model.folder, tmp_path / "model", **({"layer_types": None} | fields))
    assert read_config(folder).windows == wanted


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("llama", {"model_type": "mamba"}, "model_type is 'mamba', must be one of llama, mistral, qwen2, qwen3, opt"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu', must be 'silu' or 'swish'"),
        ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn', must be 'default' or 'llama3'"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}, must be None"),
        ("llama", {"num_key_value_heads": 3}, "num_attention_heads is 8, must be a multiple of 3 KV heads"),
        ("llama", {"vocab_size": "many"}, "vocab_size is 'many', must be a whole number >= 1"),
        ("llama", {"vocab_size": None}, "vocab_size is missing, must be a whole number >= 1"),
        ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, must be a number > 0"),
        ("llama", OLD | {"rope_theta": "1e4"}, "rope_theta is '1e4', must be a number > 0"),
        ("llama", OLD | {"rope_theta": 0}, "rope_theta is 0, must be a number > 0"),
        ("llama", OLD | {"rope_scaling": "x"}, "rope_scaling is 'x', must be one set of numbers, for all layers"),
        ("llama", {"rope_parameters": {"full": {}}}, "is {'full': {}}, must be one set of numbers, for all layers"),
        (
            "llama",
            {"rope_parameters": {"rope_theta": True}},
            "rope_parameters.rope_theta is True, must be a number > 0",
        ),
        ("llama", {"rope_parameters": LLAMA3 | {"factor": "8"}}, "rope_parameters.factor is '8', must be a number > 0"),
        ("llama", {"rope_parameters": LLAMA3 | {"factor": None}}, ".factor is missing, must be a number > 0"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, must be 1"),
        ("llama", {"head_dim": 7}, "head_dim is 7, must be even: positions turn pairs"),
        ("llama", {"eos_token_id": ["x"]}, "eos_token_id is ['x'], must be a token id >= 0, or several, or null"),
        ("llama", {"bos_token_id": 1.5}, "bos_token_id is 1.5, must be a token id >= 0, or several, or null"),
        ("mistral", {"sliding_window": True}, "sliding_window is True, must be a whole number >= 1 or null"),
        (
            "mistral",
            {"sliding_window": 7, "layer_types": [[], [], []]},
            "layer_types is [[], [], []], must be a list of 3, each full_attention or sliding_attention",
        ),
        ("llama", {"dtype": "int8"}, "dtype is 'int8', must be one of float32, float64, bfloat16, float16"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before is False, must be True"),
        ("opt", {"word_embed_proj_dim": 32}, "word_embed_proj_dim is 32, must be 64"),
    ],
)
def test_what_cannot_be_run_is_refused(tmp_path: Path, family: str, fields: dict[str, Any], message: str) -> None:
    model = random_model(family, kv_heads=8 if family == "opt" else 4)
    assert refused(model.folder, tmp_path, **fields).endswith(message)


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    told = refused(random_model().folder, tmp_path, hidden_act="gelu", vocab_size=0)
    assert "hidden_act is 'gelu'" in told
    assert "vocab_size is 0" in told
    assert told.startswith(f"{tmp_path / 'model' / 'config.json'}: ")


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json: No such file or directory"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match=r"config\.json: no JSON"):
        read_config(tmp_path)
