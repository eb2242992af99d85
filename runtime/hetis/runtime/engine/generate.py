"""Answers to a batch of prompts, offline: a model folder becomes an engine in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hetis.runtime.attention.device import AttentionDevice
from hetis.runtime.attention.local import LocalDevice
from hetis.runtime.engine.engine import Engine, EngineOptions
from hetis.runtime.engine.request import FinishReason, Logprob, SamplingParams
from hetis.runtime.engine.stage import Stage, kv_shape
from hetis.runtime.engine.text import FileTokenizer
from hetis.runtime.kv.shape import KvShape
from hetis.runtime.model.decoder import Decoder
from hetis.solver.dispatch.problem import Stage as StageCosts

MakeDevices = Callable[[KvShape], Sequence[AttentionDevice]]


@dataclass(slots=True, kw_only=True)
class Answer:
    """What became of one prompt: token ids, text, log probabilities where they were asked for, and why it ended."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[Logprob] = field(default_factory=list)
    finish_reason: FinishReason = FinishReason.ERROR
    error: str = ""


def local_devices(num_pages: Sequence[int]) -> MakeDevices:
    """Devices in this process, each with so many KV pages."""

    def make(shape: KvShape) -> Sequence[AttentionDevice]:
        return [LocalDevice(f"local{i}", shape, pages) for i, pages in enumerate(num_pages)]

    return make


def local_devices_of_bytes(kv_bytes: Sequence[int]) -> MakeDevices:
    """Devices in this process, each with so many bytes of KV memory."""
    return lambda shape: local_devices([size // shape.page_bytes for size in kv_bytes])(shape)


def engine_from_folder(
    folder: Path,
    devices: MakeDevices,
    *,
    dtype: str | None = None,
    page_tokens: int = 16,
    costs: StageCosts | None = None,
    options: EngineOptions | None = None,
) -> Engine:
    """An engine for the model in ``folder``, all layers in this process, heads on the devices that ``devices`` makes.

    Where the folder has a tokenizer.json, answers have text.

    Raises:
        ModelError: the folder cannot be used.
    """
    decoder = Decoder.from_folder(folder, dtype=dtype)
    shape = kv_shape(decoder.config, decoder.layers, page_tokens=page_tokens, dtype=dtype or decoder.config.dtype)
    stage = Stage(decoder, devices(shape))
    path = folder / "tokenizer.json"
    tokenizer = FileTokenizer(path) if path.is_file() else None
    return Engine(decoder.config, stage, costs=costs, options=options, tokenizer=tokenizer)


def generate(
    engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
) -> list[Answer]:
    """Answers in the order of the prompts; ``params`` are of all of them, or of each one.

    Raises:
        RequestError: a prompt cannot be served; none was.
    """
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    numbers: list[int] = []
    try:
        for prompt, own in zip(prompts, each, strict=True):
            numbers.append(engine.add(prompt, own))
    except Exception:
        for number in numbers:
            engine.cancel(number)
        raise
    answers = {number: Answer() for number in numbers}
    while engine.has_work:
        for news in engine.step():
            answer = answers.get(news.request)
            if answer is None:
                continue
            if news.token is not None:
                answer.tokens.append(news.token)
            answer.text += news.text
            if news.logprob is not None:
                answer.logprobs.append(news.logprob)
            if news.finish_reason is not None:
                answer.finish_reason, answer.error = news.finish_reason, news.error
    return [answers[number] for number in numbers]
