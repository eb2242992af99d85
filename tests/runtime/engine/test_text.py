"""Text is told as soon as it is certain, and never beyond a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis.runtime.engine.text import FileTokenizer, TextStream
from hetis.runtime.model.errors import ModelError


class ByteTokenizer:
    """A token per byte: characters come in pieces."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode(errors="replace")


@given(st.text(alphabet="abé漢🙂", max_size=20))
def test_all_text_comes_out(text: str) -> None:
    stream = TextStream(ByteTokenizer())
    told = "".join(stream.push(token) for token in text.encode()) + stream.end()
    assert told == stream.text == text


@given(st.text(alphabet="abé", max_size=20), st.lists(st.text(alphabet="abé", min_size=1, max_size=3), max_size=3))
def test_text_ends_before_the_first_stop_text_that_is_complete(text: str, stop: list[str]) -> None:
    stream = TextStream(ByteTokenizer(), stop)
    told = ""
    for token in text.encode():
        told += stream.push(token)
        if stream.is_stopped:
            break
    told += stream.end()
    wanted, is_stopped = text, False
    for end in range(len(text) + 1):
        found = [text[:end].find(one) for one in stop if one in text[:end]]
        if found:
            wanted, is_stopped = text[: min(found)], True
            break
    assert (told, stream.is_stopped) == (wanted, is_stopped)


def test_nothing_that_may_begin_a_stop_text_is_told() -> None:
    stream = TextStream(ByteTokenizer(), ["stop"])
    assert [stream.push(token) for token in b"no sto"] == ["n", "o", " ", "", "", ""]
    assert stream.push(ord("n")) == "ston"
    assert [stream.push(token) for token in b"stop"] == ["", "", "", ""]
    assert stream.is_stopped


def test_half_a_character_is_told_at_the_end_only() -> None:
    stream = TextStream(ByteTokenizer())
    assert stream.push("é".encode()[0]) == ""
    assert stream.end() == "�"


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json: "):
        FileTokenizer(tmp_path / "tokenizer.json")
