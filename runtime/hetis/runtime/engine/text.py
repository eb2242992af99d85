"""Text from tokens, as they come: what is certain is told, what may still change or be cut off is held back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from hetis.runtime.model.errors import ModelError

_BROKEN = "�"  # bytes of a character of which others are still to come
_MOST_UNCERTAIN = 64  # tokens without text of their own, one after the other: all are decoded again for the next
_CONTEXT = 6  # tokens of the prompt


class Tokenizer(Protocol):
    """Between text and token ids."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with what the model wants in front of one."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids; special tokens give none."""


class FileTokenizer:
    """The tokenizer of a ``tokenizer.json``."""

    def __init__(self, path: Path) -> None:
        """Raises ModelError: the file is missing or no tokenizer."""
        from tokenizers import Tokenizer as Fast

        try:
            self._fast: Any = Fast.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ModelError(f"{path}: {error}") from None

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._fast.encode(text).ids
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        text: str = self._fast.decode(list(tokens), skip_special_tokens=True)
        return text


class TextStream:
    """The text of one request, token by token.

    Attributes:
        text: told so far.
        is_stopped: a stop text has come; it and what follows is no part of the text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, prompt: Sequence[int] = ()) -> None:
        """``prompt``: what the text goes on from; whether it begins with a space may depend on that."""
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._tokens = list(prompt[-_CONTEXT:])
        self._begin = 0  # of the tokens that are decoded again each time: a token's text depends on those before it
        self._read = len(self._tokens)  # those whose text is in `_held` or told, or of the prompt
        self._held = ""
        self.text = ""
        self.is_stopped = False

    def push(self, token: int) -> str:
        """What is certain now that this token came."""
        self._tokens.append(token)
        known = self._tokenizer.decode(self._tokens[self._begin : self._read])
        longer = self._tokenizer.decode(self._tokens[self._begin :])
        is_uncertain = len(longer) <= len(known) or longer.endswith(_BROKEN)
        # A long run of tokens that end within a character is no text any more: it is told as it is.
        if is_uncertain and len(self._tokens) - self._read < _MOST_UNCERTAIN:
            return ""
        self._begin, self._read = self._read, len(self._tokens)
        return self._tell(longer[len(known) :], is_end=False)

    def end(self) -> str:
        """What was held back, now that no token will come."""
        if self.is_stopped:
            return ""
        known = self._tokenizer.decode(self._tokens[self._begin : self._read])
        rest = self._tokenizer.decode(self._tokens[self._begin :])[len(known) :]
        self._read = len(self._tokens)
        return self._tell(rest, is_end=True)

    def _tell(self, more: str, *, is_end: bool) -> str:
        self._held += more
        found = min((at for at in map(self._held.find, self._stop) if at >= 0), default=None)
        if found is not None:
            self.is_stopped = True
            told, self._held = self._held[:found], ""
        else:
            kept = 0 if is_end else self._possible_stop()
            told, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        self.text += told
        return told

    def _possible_stop(self) -> int:
        """Characters at the end that a stop text may begin with."""
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:length]):
                    longest = length
                    break
        return longest
