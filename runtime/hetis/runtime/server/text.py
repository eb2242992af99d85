"""The tokenizer of a model folder: text to tokens, tokens to text, and what single tokens stand for."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from hetis.runtime.model.errors import ModelError


class Tokens:
    """The tokenizer of a model folder, as the engine's `Tokenizer`."""

    def __init__(self, tokenizer: Any) -> None:
        """``tokenizer``: of the library ``tokenizers``."""
        self._tokenizer = tokenizer
        self._is_byte_level = "ByteLevel" in repr(tokenizer.decoder)
        self.bytes_of = lru_cache(maxsize=8192)(self._bytes_of)

    @classmethod
    def from_folder(cls, folder: Path) -> Tokens:
        """Reads ``tokenizer.json``; other forms (vocab.json and merges.txt of OPT) through transformers.

        Raises:
            ModelError: there is none, or it cannot be read.
        """
        path = folder / "tokenizer.json"
        if path.is_file():
            from tokenizers import Tokenizer

            try:
                return cls(Tokenizer.from_file(str(path)))
            except Exception as error:  # the library raises nothing narrower
                raise ModelError(f"{path}: no tokenizer: {error}") from None
        return cls(_through_transformers(folder))

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids; ``special``: with those that the model puts around a text. Any thread may call this."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text without special tokens; bytes that are no character become U+FFFD."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def text_of(self, token: int) -> str:
        """One token by itself, special ones by their names; as OpenAI writes it where it is no whole character."""
        raw: bytes = self.bytes_of(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _bytes_of(self, token: int) -> bytes:
        """What a token stands for. A decoder would make U+FFFD of bytes that are no character by themselves."""
        piece = self._tokenizer.id_to_token(token) or ""
        if found := _FALLBACK.fullmatch(piece):
            return bytes([int(found[1], 16)])
        if self._is_byte_level and all(character in _BYTES for character in piece):
            return bytes(_BYTES[character] for character in piece)
        text: str = self._tokenizer.decode([token], skip_special_tokens=False)
        return text.encode()


def _byte_alphabet() -> dict[str, int]:
    """Of byte-level BPE (GPT-2): printable characters stand for themselves, the others for the bytes that are left."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_alphabet()
_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # of sentencepiece's


def _through_transformers(folder: Path) -> Any:
    if not any((folder / name).is_file() for name in ("vocab.json", "tokenizer.model", "tokenizer_config.json")):
        raise ModelError(f"{folder}: no tokenizer: there is neither tokenizer.json nor vocab.json nor tokenizer.model")
    try:
        import transformers
    except ImportError:
        raise ModelError(f"{folder}: no tokenizer.json, and transformers, which reads others, is missing") from None
    try:
        found = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return found.backend_tokenizer
    except Exception as error:  # of any kind, by what lies in the folder
        raise ModelError(f"{folder}: no tokenizer: {str(error).strip().splitlines()[0]}") from None


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """The fields of ``tokenizer_config.json``; none where there is no such file.

    Raises:
        ModelError: it is no JSON object.
    """
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return {}
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from None
    if not isinstance(fields, dict):
        raise ModelError(f"{path}: must be an object")
    return fields
