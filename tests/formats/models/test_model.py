"""Model files and references."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from hetis.formats import catalogue
from hetis.formats.documents import dump
from hetis.formats.errors import DocumentError
from hetis.formats.models import dtypes
from hetis.formats.models.document import drafts, load_model
from hetis.solver.model import ModelSpec
from tests.models import InShort

SHAPE = """apiVersion: hetis/v1
kind: ModelSpec
name: small
num_layers: 4
hidden: 256
intermediate: 1024
q_heads: 8
kv_heads: {kv_heads}
head_dim: 32
vocab: 1000
"""


def model_of(folder: Path, text: str) -> ModelSpec:
    (folder / "model.yaml").write_text(text)
    return load_model(folder / "model.yaml")


@pytest.mark.parametrize(("kv_heads", "kind"), [(8, "mha"), (2, "gqa")])
def test_the_attention_kind_follows_from_the_heads(tmp_path: Path, kv_heads: int, kind: str) -> None:
    assert model_of(tmp_path, SHAPE.format(kv_heads=kv_heads)).attention.name == kind


@pytest.mark.parametrize(
    ("dtype", "weight_bytes", "activation_bytes"),
    [("bfloat16", 2.0, 2.0), ("fp16", 2.0, 2.0), ("bfloat16+fp8", 1.0, 2.0), ("fp8", 1.0, 2.0), ("int4", 0.53125, 2.0)],
)
def test_a_dtype_sets_the_bytes(tmp_path: Path, dtype: str, weight_bytes: float, activation_bytes: float) -> None:
    model = model_of(tmp_path, SHAPE.format(kv_heads=2) + f"dtype: {dtype}\n")
    assert (model.weight_bytes, model.activation_bytes, model.kv_bytes) == (weight_bytes, activation_bytes, 2.0)


def test_explicit_bytes_go_before_the_dtype(tmp_path: Path) -> None:
    model = model_of(tmp_path, SHAPE.format(kv_heads=2) + "dtype: bfloat16\nweight_bytes: 0.5\nkv_bytes: 1\n")
    assert (model.weight_bytes, model.kv_bytes, model.embedding_bytes) == (0.5, 1.0, 2.0)


def test_a_quantised_dtype_names_the_precision_and_both_are_written(tmp_path: Path) -> None:
    model = model_of(tmp_path, SHAPE.format(kv_heads=2) + "dtype: bfloat16+fp8\n")
    assert model.weights == "fp8"
    assert model_of(tmp_path, dump(model)) == model
    assert model_of(tmp_path, SHAPE.format(kv_heads=2) + "weights: awq-int4\n").weights == "awq-int4"


@pytest.mark.parametrize(
    ("weights", "kv", "sizes"),
    [
        ("fp8", None, (1.0, 2.0)),
        ("awq-int4", "fp8", (0.53125, 1.0)),
        ("bf16", None, (2.0, 2.0)),
        (None, "fp8", (2.0, 1.0)),
    ],
)
def test_a_model_in_another_precision(weights: str | None, kv: str | None, sizes: tuple[float, float]) -> None:
    model = catalogue.find_model("Llama-3.1-70B").model
    found = dtypes.with_precision(model, weights=weights, kv=kv)
    assert (found.weight_bytes, found.kv_bytes) == sizes
    assert found.embedding_bytes == model.embedding_bytes
    assert dtypes.weights_of(found) == (weights or "bf16")
    assert dtypes.kv_of(found) == (kv or "bf16")


def test_fbgemm_keeps_attention_in_16_bits() -> None:
    """vLLM loads 57.75 GiB of Llama 3.1 405B on each of 8 GPUs (its issue 6746), 47.7 if attention had 8 bits."""
    model = dtypes.with_precision(load_model("Meta-Llama-3.1-405B"), weights="fbgemm-fp8")
    total = model.num_layers * model.layer_params() * model.weight_bytes + 4 * model.embedding_params
    assert total / 8 / 2**30 == pytest.approx(57.75, rel=0.04)


def test_gpu_types_may_have_a_precision_of_their_own(tmp_path: Path) -> None:
    model = catalogue.find_model("Llama-3.1-70B").model
    found = dtypes.with_precision(model, weights="fp8, A100-SXM-40GB=bf16,L4=awq-int4", kv="L4=fp8")
    assert [found.on(gpu).weights for gpu in ("H100-SXM-80GB", "A100-SXM-40GB", "L4")] == ["fp8", "bf16", "awq-int4"]
    assert [found.on(gpu).kv_bytes for gpu in ("H100-SXM-80GB", "A100-SXM-40GB", "L4")] == [2.0, 2.0, 1.0]
    assert found.on("L4") == dtypes.with_precision(model, weights="awq-int4", kv="fp8")
    assert dtypes.precision_of(found) == (
        "weights fp8, KV bf16; on A100-SXM-40GB: weights bf16, KV bf16; on L4: weights awq-int4, KV fp8"
    )
    assert dtypes.precision_of(replace(model, draft=drafts("2:0.8"))) == (
        "weights bf16, KV bf16; drafts 2, accepted at 80%"
    )  # fmt: skip
    assert model_of(tmp_path, dump(found)) == found
    assert dtypes.with_precision(found, weights="int8", kv="bf16").precisions == ()  # one for all GPUs replaces them
    assert dtypes.with_precision(model, weights="A100-SXM-40GB=bf16").on("L4") == model


def test_a_file_gives_gpu_types_precisions(tmp_path: Path) -> None:
    text = SHAPE.format(kv_heads=2) + "dtype: bfloat16+fp8\nprecisions: {V100-SXM2-32GB: {weights: bf16}}\n"
    model = model_of(tmp_path, text)
    assert (model.weights, model.weight_bytes) == ("fp8", 1.0)
    assert (model.on("V100-SXM2-32GB").weights, model.on("V100-SXM2-32GB").weight_bytes) == ("bf16", 2.0)
    with pytest.raises(DocumentError, match=r"precisions\.L4\.weights"):
        model_of(tmp_path, SHAPE.format(kv_heads=2) + "precisions: {L4: {weights: fp7}}\n")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("fp9", "'fp9' is not one of bf16, fp8"),
        ("fp8,bf16", "'fp8,bf16' gives two precisions for all GPU types"),
        ("L4=fp8,L4=bf16", "'L4=fp8,L4=bf16' gives two precisions for L4"),
        ("=fp8", "'=fp8' has no GPU type before ="),
        ("L4=", "'' is not one of bf16, fp8"),
        ("", "'' is not one of bf16, fp8"),
        ("fp8," * 2000, "has 8000 characters, may have 4096"),
    ],
)
def test_a_choice_of_precisions_that_is_none(text: str, error: str) -> None:
    with pytest.raises(ValueError, match=re.escape(error)):
        dtypes.chosen_precision(text, dtypes.PRECISIONS)


def test_precisions_are_named_in_any_case() -> None:
    chosen = dtypes.chosen_precision("FP8,L4=BF16", dtypes.PRECISIONS)
    assert (chosen.everywhere, chosen.on) == ("fp8", {"L4": "bf16"})


def test_every_model_of_the_catalogue_can_be_written_and_read(tmp_path: Path) -> None:
    for entry in catalogue.models():
        assert model_of(tmp_path, dump(entry.model)) == entry.model


def test_an_ambiguous_name_lists_the_candidates() -> None:
    with pytest.raises(
        DocumentError, match=r"unknown model 'llama-70b': ambiguous, one of meta-llama/Llama-2-70b-hf, "
    ):
        load_model("llama-70b")


def test_a_missing_model_file_is_called_missing() -> None:
    with pytest.raises(DocumentError, match=r"^nowhere/model\.yaml: no such file$"):
        load_model("nowhere/model.yaml")


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        ("linear: {layers: 4, params: 1, state_bytes: 1}", "linear.layers: is 4, must be < num_layers (4)"),
        (
            "linear: {layers: 2, params: 1, state_bytes: 1}\nsliding_window: 9\nsliding_layers: 3",
            "sliding_layers: is 3, must be <= 2, the layers with KV",
        ),
        (
            "sliding_window: 9\nsliding_layers: 2\nsliding_window_every: 2",
            "sliding_layers: and sliding_window_every exclude each other",
        ),
        (
            "moe: {num_experts: 4, active_experts: 1, expert_intermediate: 9, first_dense_layers: 1, every: 4}",
            "moe.every: is 4, must be <= 3, the layers after dense ones",
        ),
        (
            "mla: {kv_lora_rank: 8, qk_rope_head_dim: 8, qk_nope_head_dim: 8, v_head_dim: 8, q_lora_rank: 8}\n"
            "indexer: {top_tokens: 9, heads: 1, head_dim: 8, key_bytes: 9}\nsliding_window: 9",
            "indexer: and a sliding_window exclude each other",
        ),
        (
            "mla: {kv_lora_rank: 8, qk_rope_head_dim: 8, qk_nope_head_dim: 8, v_head_dim: 8, q_lora_rank: 8}\n"
            "indexer: {top_tokens: 9, heads: 1, head_dim: 8, key_bytes: 9, layers: 5}",
            "indexer.layers: is 5, must be <= 4, the layers with KV",
        ),
    ],
)
def test_layers_of_several_kinds_that_cannot_be(tmp_path: Path, lines: str, error: str) -> None:
    with pytest.raises(DocumentError, match=re.escape(error)):
        model_of(tmp_path, SHAPE.format(kv_heads=2) + lines + "\n")


def test_windows_are_in_a_share_of_the_layers_with_kv(tmp_path: Path) -> None:
    """One of two layers with KV has a sliding window; two more layers keep states."""
    lines = "linear: {layers: 2, params: 1, state_bytes: 1}\nsliding_window: 100\nsliding_layers: 1\n"
    model = model_of(tmp_path, SHAPE.format(kv_heads=2) + lines)
    assert model.attended_tokens(300.0) == model.cached_tokens(300.0) == (100 + 300) / 2


def test_older_files_have_windows_that_free_nothing(tmp_path: Path) -> None:
    """The plans of older files, which may have attention workers, counted KV in that way."""
    older = SHAPE.format(kv_heads=2) + "sliding_window: 100\nsliding_window_every: 2\n"
    model = model_of(tmp_path, older)
    assert (InShort(model).sliding_layers, model.windows_free_kv, model.heads_can_move) == (2, False, True)
    assert model_of(tmp_path, older + "windows_free_kv: true\n").windows_free_kv
    assert model_of(tmp_path, SHAPE.format(kv_heads=2) + "sliding_window: 100\n").windows_free_kv


@pytest.mark.parametrize(
    ("part", "error"),
    [
        ("kind: dense, width: 0", "layers[0].mlp[0].width: is 0, must be >= 1"),
        ("kind: dense", "layers[0].mlp[0]: width is missing"),
        (
            "kind: experts, count: 2, active: 1, width: 9, acitve: 1",
            "mlp[0].acitve: unknown field, did you mean active",
        ),
    ],
)
def test_parts_of_a_list_of_layers_are_refused_at_their_place(tmp_path: Path, part: str, error: str) -> None:
    lines = f"name: m\nhidden: 8\nvocab: 9\ndtype: bfloat16\nlayers: [{{at: 0-1, mlp: [{{{part}}}]}}]\n"
    (tmp_path / "m.yaml").write_text(f"apiVersion: hetis/v1\nkind: ModelSpec\n{lines}")
    with pytest.raises(DocumentError, match=re.escape(error)):
        load_model(tmp_path / "m.yaml")
