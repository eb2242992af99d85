"""What clients send: OpenAI's bodies, and vLLM's additions that this engine has (``top_k``, ``ignore_eos``, ...).

A field that would change the answer and is not supported is refused unless it has its neutral value. Fields that only
book-keep (``user``, ``metadata``) are taken and not used. Anything else is an error: nothing is ignored silently.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hetis.runtime.engine.request import RequestError, SamplingParams
from hetis.runtime.server.errors import ApiError

MOST_CHOICES = 128  # n, and prompts times n
MOST_STOPS = 16
Tokens = list[int]


class StreamOptions(BaseModel):
    """``include_usage``: a last chunk without choices tells the tokens."""

    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool = False


class CommonBody(BaseModel):
    """What both calls have."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    model: str
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | Annotated[list[str], Field(max_length=MOST_STOPS)] | None = None
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    # Of vLLM.
    top_k: int | None = None
    ignore_eos: bool = False
    stop_token_ids: Annotated[list[int], Field(max_length=MOST_STOPS)] | None = None
    # Only their neutral values.
    presence_penalty: Literal[0] | Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Literal[0] | Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    # Book-keeping.
    user: str | None = None
    metadata: dict[str, Any] | None = None

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def choices_per_prompt(self) -> int:
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def params(self, *, choice: int, max_tokens: int, logprobs: int | None) -> SamplingParams:
        """How the tokens of one choice are chosen; with a seed each choice has its own random numbers.

        Raises:
            ApiError: a value is out of range.
        """
        try:
            return SamplingParams(
                max_tokens=max_tokens,
                temperature=1.0 if self.temperature is None else self.temperature,
                top_k=0 if self.top_k in (None, -1) else self.top_k,  # -1: all, as vLLM has it
                top_p=1.0 if self.top_p is None else self.top_p,
                seed=None if self.seed is None else self.seed + choice,
                stop=self.stops,
                stop_token_ids=tuple(self.stop_token_ids or ()),
                ignore_eos=self.ignore_eos,
                logprobs=logprobs,
            )
        except RequestError as error:
            raise ApiError(str(error)) from None


class CompletionBody(CommonBody):
    """``/v1/completions``; ``logprobs`` is how many of the likeliest tokens are told."""

    prompt: str | Tokens | list[str] | list[Tokens]
    max_tokens: int | None = None
    logprobs: int | None = None
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None
    best_of: int | None = None

    @property
    def prompts(self) -> list[str] | list[Tokens]:
        """One or several, each as text or as token ids.

        Raises:
            ApiError: there are none, or too many choices of all together.
        """
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if not prompt:
            raise ApiError("prompt is empty", param="prompt")
        if isinstance(prompt[0], int):
            return [prompt]
        if len(prompt) * self.choices_per_prompt > MOST_CHOICES:
            raise ApiError(f"{len(prompt)} prompts times n {self.choices_per_prompt}, must be <= {MOST_CHOICES}")
        return prompt


class TextPart(BaseModel):
    """The only kind of content that this engine reads."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a chat. Other fields than these go to the model's template as they are."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: str
    content: str | list[TextPart] | None = None

    def for_template(self) -> dict[str, Any]:
        content = self.content
        text = "".join(part.text for part in content) if isinstance(content, list) else content
        return {**self.model_dump(exclude={"content"}), "content": text or ""}


class PlainFormat(BaseModel):
    """No JSON mode here."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["text"]


class ChatBody(CommonBody):
    """``/v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    response_format: PlainFormat | None = None
    modalities: list[Literal["text"]] | None = None
    store: Literal[False] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def most_tokens(self) -> int | None:
        """As the newer name says, else the older; None: as many as fit."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """How many of the likeliest tokens are told; None: no log probabilities at all.

        Raises:
            ApiError: ``top_logprobs`` without ``logprobs``.
        """
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError("top_logprobs needs logprobs to be true", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


Body = TypeVar("Body", bound=BaseModel)
_FORMS = ("str", "int", "float", "bool")


def parse_body(kind: type[Body], raw: bytes) -> Body:
    """The body of a call.

    Raises:
        ApiError: it is no JSON, or has wrong fields; all of them are named.
    """
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        problems: dict[str, str] = {}
        for detail in error.errors(include_url=False, include_context=False, include_input=False):
            if detail["type"] == "json_invalid":
                raise ApiError(f"the body is no JSON: {detail['msg']}") from None
            # Of a field that may have several forms pydantic tells one problem for each: one is enough.
            name = _named(detail["loc"])
            message = "is not supported" if detail["type"] == "extra_forbidden" else _lower(detail["msg"])
            problems.setdefault(name, message)
        text = "; ".join(f"{name or 'the body'} {message}" for name, message in problems.items())
        raise ApiError(text, param=next(iter(problems)) or None) from None


def _named(place: tuple[int | str, ...]) -> str:
    """``messages[0].content`` of a place; forms of a union (``str``, ``list[int]``) are no part of the name."""
    name = ""
    for part in place:
        if isinstance(part, int):
            name += f"[{part}]"
        elif "[" not in part and part not in _FORMS:
            name += f".{part}" if name else part
    return name


def _lower(message: str) -> str:
    """``must be ...`` rather than ``Input should be ...``."""
    if message == "Field required":
        return "is missing"
    return message.replace("Input should be", "must be").replace("should", "must")
