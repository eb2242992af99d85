"""What clients get: OpenAI's objects, from pieces of answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hetis.runtime.engine.request import FinishReason
from hetis.runtime.server.generation import ChosenToken, Generation, Piece
from hetis.runtime.server.text import Tokens

Json = dict[str, Any]
# A request that the server itself ended for its limit of time is told as an error; a client that left hears nothing.
_REASONS = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Heading:
    """What all objects of one call share."""

    id: str
    model: str
    created: int


def usage(prompt_tokens: int, output_tokens: int) -> Json:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": output_tokens,
        "total_tokens": prompt_tokens + output_tokens,
    }


class CompletionForm:
    """``text_completion``, whole or in chunks."""

    path = "/v1/completions"

    def __init__(self, heading: Heading, tokens: Tokens, *, logprobs: int | None) -> None:
        self._heading, self._tokens, self._logprobs = heading, tokens, logprobs
        self._offsets: dict[int, int] = {}

    def whole(self, answers: Sequence[Generation], use: Json) -> Json:
        choices = [
            self._choice(index, answer.text, answer.tokens, answer.finish_reason)
            for index, answer in enumerate(answers)
        ]
        return self._object(choices, use)

    def opening(self, index: int) -> Json | None:
        """What is sent before the first piece: nothing."""
        return None

    def chunk(self, index: int, piece: Piece) -> Json:
        return self._object([self._choice(index, piece.text, piece.tokens, piece.finish_reason)], None)

    def usage_chunk(self, use: Json) -> Json:
        return self._object([], use)

    def _object(self, choices: list[Json], use: Json | None) -> Json:
        head = self._heading
        made = {"id": head.id, "object": "text_completion", "created": head.created, "model": head.model}
        return {**made, "choices": choices, **({} if use is None else {"usage": use})}

    def _choice(self, index: int, text: str, tokens: Sequence[ChosenToken], reason: FinishReason | None) -> Json:
        return {
            "index": index,
            "text": text,
            "logprobs": None if self._logprobs is None else self._logs(index, tokens),
            "finish_reason": None if reason is None else _REASONS.get(reason),
        }

    def _logs(self, index: int, tokens: Sequence[ChosenToken]) -> Json:
        texts = [self._tokens.text_of(token.token) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(text)
        likeliest = [
            {self._tokens.text_of(other): log for other, log in token.logprob.likeliest}
            for token in tokens
            if token.logprob is not None
        ]
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob.chosen for token in tokens if token.logprob is not None],
            "top_logprobs": likeliest,
            "text_offset": offsets,
        }


class ChatForm:
    """``chat.completion``, whole or in chunks."""

    path = "/v1/chat/completions"

    def __init__(self, heading: Heading, tokens: Tokens, *, logprobs: int | None) -> None:
        self._heading, self._tokens, self._logprobs = heading, tokens, logprobs

    def whole(self, answers: Sequence[Generation], use: Json) -> Json:
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": self._logs(answer.tokens),
                "finish_reason": _REASONS.get(answer.finish_reason) if answer.finish_reason else None,
            }
            for index, answer in enumerate(answers)
        ]
        return self._object("chat.completion", choices, use)

    def opening(self, index: int) -> Json | None:
        """Whose answer it is."""
        return self._delta(index, {"role": "assistant", "content": ""}, None, None)

    def chunk(self, index: int, piece: Piece) -> Json:
        delta = {"content": piece.text} if piece.text or piece.finish_reason is None else {}
        return self._delta(index, delta, self._logs(piece.tokens), piece.finish_reason)

    def usage_chunk(self, use: Json) -> Json:
        return self._object("chat.completion.chunk", [], use)

    def _delta(self, index: int, delta: Json, logs: Json | None, reason: FinishReason | None) -> Json:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": logs,
            "finish_reason": None if reason is None else _REASONS.get(reason),
        }
        return self._object("chat.completion.chunk", [choice], None)

    def _object(self, kind: str, choices: list[Json], use: Json | None) -> Json:
        head = self._heading
        made = {"id": head.id, "object": kind, "created": head.created, "model": head.model}
        return {**made, "choices": choices, **({} if use is None else {"usage": use})}

    def _logs(self, tokens: Sequence[ChosenToken]) -> Json | None:
        if self._logprobs is None:
            return None
        content = [
            {
                **self._log(token.token, token.logprob.chosen),
                "top_logprobs": [self._log(other, log) for other, log in token.logprob.likeliest],
            }
            for token in tokens
            if token.logprob is not None
        ]
        return {"content": content, "refusal": None}

    def _log(self, token: int, log: float) -> Json:
        return {"token": self._tokens.text_of(token), "logprob": log, "bytes": list(self._tokens.bytes_of(token))}
