"""The shape of a model from the header of a GGUF file: its metadata and the list of its tensors, never the weights.

The format is that of ``docs/gguf.md`` in ggml-org/ggml, versions 2 and 3. Every number in the header is bounded before
anything is read or skipped for it, so a file of any size and content costs at most the reading of `MAX_HEAD`.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from hetis.formats.errors import DocumentError, Problem, shown, single_problem
from hetis.formats.files import unreadable
from hetis.formats.models.config_json import Config
from hetis.formats.models.families import FAMILIES
from hetis.formats.positions import Text
from hetis.solver.model import ModelSpec

MAX_HEAD = 256 * 2**20  # bytes; the header with a vocabulary of 250,000 words has 10 MB
MAX_ENTRIES = 100_000
MAX_TENSORS = 100_000
MAX_ELEMENTS = 4_000_000  # limit per array; vocabularies have up to 300,000
MAX_KEY = 65_535
MAX_TEXT = 2**24

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

# Elements and bytes per block by the number of a tensor's type (GGML_QUANT_SIZES of gguf-py).
_BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 36),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292),
    16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82),
    23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2),
    34: (256, 54), 35: (256, 66), 39: (32, 17),
}  # fmt: skip
# Our family for each architecture whose metadata contain everything that a shape needs.
_FAMILIES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_FAMILIES["qwen3moe"] = "Qwen3MoeForCausalLM"
_FIELDS = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "vocab_size": "vocab_size",
    "moe_intermediate_size": "expert_feed_forward_length",
    "num_experts": "expert_count",
    "num_local_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
}


@dataclass(frozen=True, slots=True)
class _Length:
    """An array that was skipped."""

    count: int


def load_gguf(path: str | os.PathLike[str]) -> ModelSpec:
    """Return the model of a GGUF file, or of the first part of a split one. Raises DocumentError if it is not GGUF, its
    architecture is not supported, or fields are missing or impossible.
    """
    label = os.fspath(path)
    try:
        with open(path, "rb") as file:
            metadata, tensors = _Head(label, file).read()
    except OSError as error:
        raise unreadable(label, error) from None
    return _model(label, metadata, tensors)


class _Head:
    """Reads the header of a file, and stops with a message if it is invalid."""

    def __init__(self, label: str, file: IO[bytes]) -> None:
        self._label, self._file, self._num_read = label, file, 0

    def read(self) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
        """Return the metadata, and the elements and type of every tensor."""
        if self._bytes(4) != _MAGIC:
            raise self._refuse("is not a GGUF file: it does not begin with GGUF")
        version = self._number("I")
        if version not in _VERSIONS:
            raise self._refuse(f"is GGUF of version {version}, expected 2 or 3 with little-endian numbers")
        num_tensors = self._bounded("tensors", MAX_TENSORS)
        num_entries = self._bounded("entries of metadata", MAX_ENTRIES)
        metadata = dict[str, Any]()
        for _ in range(num_entries):
            key = self._text(MAX_KEY)
            metadata[key] = self._value(self._number("I"), key)
        return metadata, dict(self._tensor() for _ in range(num_tensors))

    def _tensor(self) -> tuple[str, tuple[int, int]]:
        name = self._text(MAX_KEY)
        num_dimensions = self._number("I")
        if num_dimensions > 8:
            raise self._refuse(f"tensor {shown(name)} has {num_dimensions} dimensions, at most 8")
        elements = math.prod(self._number("Q") for _ in range(num_dimensions))
        kind = self._number("I")
        self._number("Q")  # offset of its data
        return name, (elements, kind)

    def _value(self, kind: int, key: str) -> Any:
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind == _STRING:
            return self._text(MAX_TEXT)
        if kind != _ARRAY:
            raise self._refuse(f"{shown(key)} has a value of type {kind}, which is not a GGUF type")
        inner, count = self._number("I"), self._bounded(f"elements of {shown(key)}", MAX_ELEMENTS)
        if inner in _NUMBERS:
            self._skip(count * struct.calcsize(f"<{_NUMBERS[inner]}"))
        elif inner == _STRING:
            for _ in range(count):
                self._skip(self._bounded(f"bytes of a text of {shown(key)}", MAX_TEXT))
        else:
            raise self._refuse(f"{shown(key)} is an array of type {inner}, expected numbers or texts")
        return _Length(count)

    def _text(self, most: int) -> str:
        return self._bytes(self._bounded("bytes of a text", most)).decode("utf-8", errors="replace")

    def _bounded(self, what: str, most: int) -> int:
        number: int = self._number("Q")
        if number > most:
            raise self._refuse(f"has {number} {what}, at most {most} are read")
        return number

    def _number(self, form: str) -> Any:
        (number,) = struct.unpack(f"<{form}", self._bytes(struct.calcsize(f"<{form}")))
        return number

    def _skip(self, size: int) -> None:
        self._count(size)
        self._file.seek(size, os.SEEK_CUR)

    def _bytes(self, size: int) -> bytes:
        self._count(size)
        raw = self._file.read(size)
        if len(raw) < size:
            raise self._refuse(f"ends within its header, at byte {self._num_read - size + len(raw)}")
        return raw

    def _count(self, size: int) -> None:
        self._num_read += size
        if self._num_read > MAX_HEAD:
            raise self._refuse(f"has a header of more than {MAX_HEAD // 2**20} MiB")

    def _refuse(self, message: str) -> DocumentError:
        return single_problem(self._label, message)


def _model(label: str, metadata: Mapping[str, Any], tensors: Mapping[str, tuple[int, int]]) -> ModelSpec:
    architecture = metadata.get("general.architecture")
    family = _FAMILIES.get(architecture) if isinstance(architecture, str) else None
    if family is None:
        known = ", ".join(_FAMILIES)
        raise single_problem(label, f"architecture {shown(architecture)} is not supported in GGUF; supported: {known}")
    found = {field: metadata.get(f"{architecture}.{name}") for field, name in _FIELDS.items()}
    data = {field: value for field, value in found.items() if value is not None}
    per_layer = [f"{architecture}.{_FIELDS[field]}" for field, value in data.items() if isinstance(value, _Length)]
    if names := ", ".join(dict.fromkeys(per_layer)):
        raise single_problem(label, f"{names} differ from layer to layer, which plans do not support")
    if data.get("num_local_experts") and architecture == "llama":
        family = "MixtralForCausalLM"
    tokens = metadata.get("tokenizer.ggml.tokens")
    if "vocab_size" not in data and isinstance(tokens, _Length):
        data["vocab_size"] = tokens.count
    # A model without its own head uses its embeddings; a part of a split file need not have all tensors.
    is_part = isinstance(count := metadata.get("split.count"), int) and count > 1
    data["tie_word_embeddings"] = bool(tensors) and "output.weight" not in tensors and not is_part
    config = Config(data, Text(file=label, text=None))
    named = metadata.get("general.name")
    name = named if isinstance(named, str) and named.strip() and named.isprintable() else Path(label).stem
    model = FAMILIES[family](config, name[:200])
    if model is None or config.problems:
        raise DocumentError(_in_words_of_gguf(problem, str(architecture)) for problem in config.problems)
    blocks = [tensor for tensor_name, tensor in tensors.items() if tensor_name.startswith("blk.")]
    layers = _bytes_per_parameter(label, blocks)
    embeddings = _bytes_per_parameter(label, [t for n, t in tensors.items() if n == "token_embd.weight"])
    weight, embedding = layers or model.weight_bytes, embeddings or model.embedding_bytes
    return replace(model, weight_bytes=weight, embedding_bytes=embedding)


def _in_words_of_gguf(problem: Problem, architecture: str) -> Problem:
    """Return a problem with a config field under that field's name in GGUF."""
    field, space, rest = problem.message.partition(" ")
    if field in _FIELDS and not problem.path:
        return replace(problem, message=f"{architecture}.{_FIELDS[field]}{space}{rest}")
    return replace(problem, path=f"{architecture}.{_FIELDS[problem.path]}") if problem.path in _FIELDS else problem


def _bytes_per_parameter(label: str, tensors: list[tuple[int, int]]) -> float | None:
    """Return the mean bytes per parameter of tensors, or None if there are none."""
    num_bytes, num_elements = 0.0, 0
    for elements, kind in tensors:
        if kind not in _BLOCKS:
            raise single_problem(label, f"has tensors of type {kind}, which is not supported")
        per_block, block_bytes = _BLOCKS[kind]
        num_elements += elements
        num_bytes += elements / per_block * block_bytes
    return num_bytes / num_elements if num_elements else None
