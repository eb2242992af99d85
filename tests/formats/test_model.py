"""Model files and references."""

from __future__ import annotations

from pathlib import Path

import pytest

from hetis.formats import catalogue, dtypes
from hetis.formats.documents import dump
from hetis.formats.errors import DocumentError
from hetis.formats.model import load_model
from hetis.solver.model import AttentionKind, ModelSpec

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


@pytest.mark.parametrize(("kv_heads", "kind"), [(8, AttentionKind.MHA), (2, AttentionKind.GQA)])
def test_the_attention_kind_follows_from_the_heads(tmp_path: Path, kv_heads: int, kind: AttentionKind) -> None:
    assert model_of(tmp_path, SHAPE.format(kv_heads=kv_heads)).attention is kind


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
