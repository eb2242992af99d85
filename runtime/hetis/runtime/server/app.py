"""The routes: OpenAI's, health and metrics, and what this engine alone has (which heads live where)."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from hetis.runtime.server.access import KeyNeeded
from hetis.runtime.server.answering import Answer, error_response
from hetis.runtime.server.answers import ChatForm, CompletionForm, Heading
from hetis.runtime.server.bodies import ChatBody, CommonBody, CompletionBody, parse_body
from hetis.runtime.server.call import Call, Wish
from hetis.runtime.server.chat import ChatError, ChatTemplate
from hetis.runtime.server.desk import Desk
from hetis.runtime.server.errors import ApiError
from hetis.runtime.server.metrics import CONTENT_TYPE
from hetis.runtime.server.text import Tokens

_LONG_TEXT = 16_384  # characters; longer ones are made tokens in another thread


@dataclass(frozen=True, slots=True, kw_only=True)
class AppOptions:
    """What bounds a call: bytes of its body, and seconds to receive it, to answer it, and to write one chunk."""

    body_bytes: int = 4 * 2**20
    body_s: float = 30.0
    answer_s: float = 600.0
    write_s: float = 30.0


class MoveBody(BaseModel):
    """``heads`` of a running request, by the id of its answer or its number, go to the device of this name."""

    model_config = ConfigDict(strict=True, extra="forbid")

    request: str | int
    heads: list[int]
    to: str


class Front:
    """Answers calls about one model."""

    def __init__(
        self, desk: Desk, tokens: Tokens, chat: ChatTemplate | None, *, model: str, options: AppOptions | None = None
    ) -> None:
        self._desk, self._tokens, self._chat = desk, tokens, chat
        self._model = model
        self._options = options or AppOptions()
        self._created = int(time.time())

    def app(self, *, api_key: str | None = None) -> ASGIApp:
        """The routes; with a key, OpenAI's and ours need it, and health and metrics do not."""
        made = Starlette(
            routes=[
                Route("/v1/completions", self._complete, methods=["POST"]),
                Route("/v1/chat/completions", self._chat_complete, methods=["POST"]),
                Route("/v1/models", self._models, methods=["GET"]),
                Route("/v1/models/{name:path}", self._one_model, methods=["GET"]),
                Route("/health", self._health, methods=["GET"]),
                Route("/metrics", self._metrics, methods=["GET"]),
                Route("/hetis/heads", self._heads, methods=["GET"]),
                Route("/hetis/moves", self._move, methods=["POST"]),
            ],
            exception_handlers={
                ApiError: self._answer_error,
                HTTPException: self._answer_http_error,
                ClientDisconnect: _answer_nobody,
                Exception: self._answer_bug,
            },
        )
        return made if api_key is None else KeyNeeded(made, api_key)

    # --- OpenAI's

    async def _complete(self, request: Request) -> Response:
        body = parse_body(CompletionBody, await self._raw(request))
        self._check_model(body)
        prompts = [await self._ids(prompt) for prompt in body.prompts]
        name = f"cmpl-{secrets.token_hex(12)}"
        form = CompletionForm(self._heading(name), self._tokens, logprobs=body.logprobs)
        wanted = body.max_tokens
        return self._answer(request, body, form, name, prompts, wanted=wanted, default=16, logprobs=body.logprobs)

    async def _chat_complete(self, request: Request) -> Response:
        body = parse_body(ChatBody, await self._raw(request))
        self._check_model(body)
        logprobs = body.wanted_logprobs
        prompt = await self._ids(self._render(body), special=False)
        name = f"chatcmpl-{secrets.token_hex(12)}"
        form = ChatForm(self._heading(name), self._tokens, logprobs=logprobs)
        wanted = body.most_tokens
        return self._answer(request, body, form, name, [prompt], wanted=wanted, default=None, logprobs=logprobs)

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model_card()]})

    async def _one_model(self, request: Request) -> Response:
        self._check_name(request.path_params["name"])
        return JSONResponse(self._model_card())

    # --- operators'

    async def _health(self, request: Request) -> Response:
        if self._desk.is_ready:
            return JSONResponse({"status": "ok"})
        status = "failed" if self._desk.failed.is_set() else "stopping" if self._desk.is_stopping else "closed"
        return JSONResponse({"status": status, "reason": self._desk.why_not_ready}, status_code=503)

    async def _metrics(self, request: Request) -> Response:
        return Response(self._desk.metrics.text(), media_type=CONTENT_TYPE)

    async def _heads(self, request: Request) -> Response:
        view, names = self._desk.view, self._desk.names()
        devices = [
            {
                "name": device.name,
                "stage": device.stage,
                "up": device.is_up,
                "kv_pages": device.pages,
                "kv_pages_used": device.used_pages,
                "heads": device.heads,
            }
            for device in view.devices
        ]
        requests = [
            {
                "request": names.get(running.number, ""),
                "number": running.number,
                "heads": [view.devices[owner].name for owner in running.heads],
                "context_tokens": running.computed,
                "output_tokens": running.output,
            }
            for running in view.running
        ]
        return JSONResponse({"devices": devices, "requests": requests, "moved_heads": view.moved_heads})

    async def _move(self, request: Request) -> Response:
        body = parse_body(MoveBody, await self._raw(request))
        devices = self._desk.view.devices
        names = [device.name for device in devices]
        if body.to not in names:
            raise ApiError(f"to is {body.to!r}, must be one of {', '.join(names)}", param="to")
        number = body.request
        if isinstance(number, str):
            found = [own for own, name in self._desk.names().items() if name == number]
            if len(found) != 1:
                message = f"{number} has {len(found)} running requests, must have one; say its number"
                raise ApiError(message, status=404, param="request", code="not_running")
            number = found[0]
        stage = devices[names.index(body.to)].stage
        target = [device.name for device in devices if device.stage == stage].index(body.to)
        if not await self._desk.move(number, body.heads, target, stage=stage):
            raise ApiError(f"{body.to} has too few free KV pages", status=409, code="no_room")
        return JSONResponse({"moved": True})

    # --- what calls have in common

    def _answer(
        self,
        request: Request,
        body: CommonBody,
        form: CompletionForm | ChatForm,
        name: str,
        prompts: Sequence[Sequence[int]],
        *,
        wanted: int | None,
        default: int | None,
        logprobs: int | None,
    ) -> Response:
        if body.stream_options is not None and not body.stream:
            raise ApiError("stream_options needs stream to be true", param="stream_options")
        wishes = []
        for prompt in prompts:
            most = self._most_tokens(len(prompt), wanted, default)
            for choice in range(body.choices_per_prompt):
                params = body.params(choice=choice, max_tokens=most, logprobs=logprobs)
                wishes.append(Wish(prompt=prompt, params=params))
        call = Call(self._desk, form, wishes, name=name, prompts=len(prompts), answer_s=self._options.answer_s)
        return Answer(
            self._desk.metrics,
            call,
            streams=bool(body.stream),
            with_usage=body.wants_usage,
            write_s=self._options.write_s,
        )

    def _most_tokens(self, prompt: int, wanted: int | None, default: int | None) -> int:
        """Output tokens: as many as wanted; by default ``default``, or where that is None as many as fit."""
        context = self._desk.max_tokens
        room = context - prompt
        if room < 1 or (wanted is not None and wanted > room):
            asked = "at least 1" if wanted is None else str(wanted)
            raise ApiError(
                f"the context holds {context} tokens; the prompt has {prompt}, and {asked} of output were asked for",
                code="context_length_exceeded",
                param="prompt" if room < 1 else "max_tokens",
            )
        if wanted is not None:
            return wanted
        # A prompt that fills the KV by itself is left to the engine, which refuses it with its reason.
        return min(room, max(1, self._desk.longest - prompt)) if default is None else min(default, room)

    async def _raw(self, request: Request) -> bytes:
        limit = self._options.body_bytes
        too_large = ApiError(f"the body is larger than {limit} bytes", status=413, code="body_too_large")
        said = request.headers.get("content-length", "")
        if said.isdigit() and int(said) > limit:
            raise too_large
        raw = bytearray()
        try:
            async with asyncio.timeout(self._options.body_s):
                async for part in request.stream():
                    raw += part
                    if len(raw) > limit:
                        raise too_large
        except TimeoutError:
            message = f"the body did not arrive within {self._options.body_s:g} s"
            raise ApiError(message, status=408, code="body_timeout") from None
        return bytes(raw)

    async def _ids(self, prompt: str | Sequence[int], *, special: bool = True) -> Sequence[int]:
        if not isinstance(prompt, str):
            return prompt
        if len(prompt) < _LONG_TEXT:
            return self._tokens.encode(prompt, special=special)
        return await asyncio.to_thread(self._tokens.encode, prompt, special=special)

    def _render(self, body: ChatBody) -> str:
        if self._chat is None:
            raise ApiError("this model has no chat template; use /v1/completions", code="no_chat_template")
        messages = [message.for_template() for message in body.messages]
        more = dict(body.chat_template_kwargs or {})
        taken = sorted(set(more) & {"self", "messages", "prompt", "add_generation_prompt"})
        if taken:
            raise ApiError(f"chat_template_kwargs must not have {', '.join(taken)}", param="chat_template_kwargs")
        try:
            return self._chat.render(messages, prompt=body.add_generation_prompt, **more)
        except ChatError as error:
            raise ApiError(str(error), param="messages") from None

    def _check_model(self, body: CommonBody) -> None:
        self._check_name(body.model)

    def _check_name(self, name: str) -> None:
        if name != self._model:
            raise ApiError(
                f"there is no model {name!r}, there is {self._model!r}",
                status=404,
                kind="not_found_error",
                param="model",
                code="model_not_found",
            )

    def _model_card(self) -> Mapping[str, Any]:
        return {
            "id": self._model,
            "object": "model",
            "created": self._created,
            "owned_by": "hetis",
            "max_model_len": self._desk.max_tokens,
        }

    def _heading(self, name: str) -> Heading:
        return Heading(id=name, model=self._model, created=int(time.time()))

    # --- errors

    async def _answer_error(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error_response(self._desk.metrics, error)

    async def _answer_http_error(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        what = {404: "there is no such path", 405: f"this path does not take {request.method}"}
        message = f"{request.url.path}: {what.get(error.status_code, error.detail)}"
        return error_response(self._desk.metrics, ApiError(message, status=error.status_code, kind="not_found_error"))

    async def _answer_bug(self, request: Request, error: Exception) -> Response:
        return error_response(self._desk.metrics, ApiError("internal error", status=500, kind="server_error"))


async def _answer_nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=499)
