"""Headers of GGUF files become models; anything else in a file is one clear error."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

import pytest

from hetis.formats.catalogue import find_model
from hetis.formats.documents import load_model
from hetis.formats.errors import DocumentError

Value = int | float | str | bool | list[str] | list[int]
F32, F16, Q4_K, Q6_K = 0, 1, 12, 14


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def value_bytes(value: Value) -> bytes:
    """Return type and value as encoded by gguf-py's writer."""
    match value:
        case bool():
            return struct.pack("<I?", 7, value)
        case int():
            return struct.pack("<II", 4, value)
        case float():
            return struct.pack("<If", 6, value)
        case str():
            return struct.pack("<I", 8) + text(value)
        case [str(), *_]:
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(text(str(one)) for one in value)
        case _:
            return struct.pack("<IIQ", 9, 5, len(value)) + struct.pack(f"<{len(value)}i", *value)


def gguf(metadata: Mapping[str, Value], tensors: Mapping[str, tuple[tuple[int, ...], int]]) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(text(key) + value_bytes(value) for key, value in metadata.items())
    for name, (shape, kind) in tensors.items():
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, 0)
    return head


LLAMA: dict[str, Value] = {
    "general.architecture": "llama",
    "general.name": "Llama 2 7B",
    "general.file_type": 15,
    "llama.block_count": 32,
    "llama.context_length": 4096,
    "llama.embedding_length": 4096,
    "llama.feed_forward_length": 11008,
    "llama.attention.head_count": 32,
    "llama.attention.head_count_kv": 32,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.dimension_count": 128,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.ggml.tokens": [f"t{i}" for i in range(32000)],
    "tokenizer.ggml.token_type": [1] * 32000,
}
TENSORS = {
    "token_embd.weight": ((4096, 32000), Q6_K),
    "output.weight": ((4096, 32000), Q6_K),
    "blk.0.attn_q.weight": ((4096, 4096), Q4_K),
    "blk.0.attn_norm.weight": ((4096,), F32),
}


def load(folder: Path, raw: bytes) -> object:
    (folder / "model.gguf").write_bytes(raw)
    return load_model(folder / "model.gguf")


def test_a_head_is_the_model_with_the_sizes_of_its_tensors(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(gguf(LLAMA, TENSORS) + b"weights")
    model = load_model(tmp_path / "model.gguf")
    known = find_model("Llama-2-7B").model
    assert model.name == "Llama 2 7B"
    for field in ("num_layers", "hidden", "inner", "q_heads", "kv_heads", "head_dim", "vocab", "max_position"):
        assert getattr(model, field) == getattr(known, field), field
    assert model.layer_params() == known.layer_params()
    assert not model.tie_embeddings
    assert model.embedding_bytes == 210 / 256
    elements = 4096 * 4096 + 4096
    assert model.weight_bytes == pytest.approx((4096 * 4096 * 144 / 256 + 4096 * 4) / elements)


def test_a_model_without_a_head_of_its_own_ties_it(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in TENSORS.items() if name != "output.weight"}
    for metadata, tied in ((LLAMA, True), (LLAMA | {"split.count": 2}, False)):
        (tmp_path / "model.gguf").write_bytes(gguf(metadata, tensors))
        assert load_model(tmp_path / "model.gguf").tie_embeddings is tied


def test_experts_are_experts(tmp_path: Path) -> None:
    qwen: dict[str, Value] = {
        key.replace("llama.", "qwen3moe.", 1): value for key, value in LLAMA.items() if key != "general.name"
    } | {
        "general.architecture": "qwen3moe",
        "qwen3moe.expert_count": 128,
        "qwen3moe.expert_used_count": 8,
        "qwen3moe.expert_feed_forward_length": 768,
        "qwen3moe.attention.key_length": 128,
    }
    for metadata in (qwen, LLAMA | {"llama.expert_count": 8, "llama.expert_used_count": 2}):
        (tmp_path / "model.gguf").write_bytes(gguf(metadata, {}))
        moe = load_model(tmp_path / "model.gguf").experts
        assert (moe.count, moe.active) in ((128, 8), (8, 2))


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "ends within its header, at byte 0"),
        (b"GGML....", "is not a GGUF file: it does not begin with GGUF"),
        (b"GGUF" + struct.pack("<I", 1), "is GGUF of version 1, expected 2 or 3"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is GGUF of version 50331648, expected 2 or 3 with little-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), f"has {2**60} tensors, at most 100000 are read"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**40), f"has {2**40} bytes of a text, at most 65535 are read"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("a") + struct.pack("<I", 77), "'a' has a value of type 77"),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("a") + struct.pack("<IIQ", 9, 9, 2),
            "'a' is an array of type 9, expected numbers or texts",
        ),
        (gguf(LLAMA, TENSORS)[:-9], "ends within its header, at byte"),
        (
            gguf({"general.architecture": "rwkv7"}, {}),
            "architecture 'rwkv7' is not supported in GGUF; supported: llama",
        ),
        (gguf({}, {}), "architecture null is not supported in GGUF"),
        (gguf(LLAMA, {"blk.0.a": ((4,), 99)}), "has tensors of type 99, which is not supported"),
        (gguf(LLAMA | {"llama.block_count": 0}, {}), "llama.block_count: is 0, must be a whole number from 1"),
        (
            gguf({key: value for key, value in LLAMA.items() if "block_count" not in key}, {}),
            "llama.block_count is missing",
        ),
        (
            gguf(LLAMA | {"llama.attention.head_count": [32] * 32}, {}),
            "llama.attention.head_count differ from layer to",
        ),
    ],
)
def test_what_is_no_head_is_one_error(tmp_path: Path, raw: bytes, said: str) -> None:
    with pytest.raises(DocumentError) as error:
        load(tmp_path, raw)
    assert said in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_missing_file_and_a_name_are_as_with_other_models(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match="no such file"):
        load_model(tmp_path / "none.gguf")
