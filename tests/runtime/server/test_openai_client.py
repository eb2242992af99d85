"""The official client gets from the server, over HTTP, exactly what the engine says offline."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from hetis.runtime.engine.generate import Answer, generate
from hetis.runtime.engine.request import SamplingParams
from hetis.runtime.server.chat import ChatTemplate
from hetis.runtime.server.text import Tokens
from tests.runtime.server.live import MODEL, Live, engine_of

PROMPTS = ["A plan is", "Head groups of running requests", "déjà vu, 漢字 🎉", "0"]
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where do heads live?"}]


class Offline:
    """The same model in an engine of one device, without a server."""

    def __init__(self, folder: Path) -> None:
        self.engine = engine_of(folder, pages=(800,))
        self.tokens, self.chat = Tokens.from_folder(folder), ChatTemplate.from_folder(folder)

    def answer(self, prompt: str, *, special: bool = True, **params: object) -> Answer:
        ids = self.tokens.encode(prompt, special=special)
        (answer,) = generate(self.engine, [ids], SamplingParams(**params))  # type: ignore[arg-type]
        return answer

    def chat_answer(self, **params: object) -> Answer:
        assert self.chat is not None
        return self.answer(self.chat.render(CHAT), special=False, **params)


@pytest.fixture(scope="module")
def offline(folder: Path) -> Offline:
    return Offline(folder)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_completion_is_the_offline_text(live: Live, offline: Offline, prompt: str) -> None:
    wanted = offline.answer(prompt, max_tokens=40)
    with live.client() as client:
        got = client.completions.create(model=MODEL, prompt=prompt, max_tokens=40, temperature=0)
    assert got.choices[0].text == wanted.text
    assert got.choices[0].finish_reason == wanted.finish_reason
    assert got.usage is not None
    assert got.usage.completion_tokens == len(wanted.tokens)
    assert got.usage.prompt_tokens == len(offline.tokens.encode(prompt))
    assert got.usage.total_tokens == got.usage.prompt_tokens + got.usage.completion_tokens


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_streamed_completion_is_the_offline_text(live: Live, offline: Offline, prompt: str) -> None:
    wanted = offline.answer(prompt, max_tokens=40)
    with live.client() as client:
        chunks = list(
            client.completions.create(
                model=MODEL,
                prompt=prompt,
                max_tokens=40,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == wanted.text
    reasons = [chunk.choices[0].finish_reason for chunk in chunks[:-1]]
    assert reasons == [None] * (len(reasons) - 1) + [wanted.finish_reason]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(wanted.tokens)
    assert len(chunks) > 5  # it came while it was made


def test_a_chat_is_the_offline_text_of_its_template_whole_and_streamed(live: Live, offline: Offline) -> None:
    wanted = offline.chat_answer(max_tokens=30)
    with live.client() as client:
        got = client.chat.completions.create(
            model=MODEL,
            messages=CHAT,  # type: ignore[arg-type]
            max_completion_tokens=30,
            temperature=0,
        )
        chunks = list(
            client.chat.completions.create(
                model=MODEL,
                messages=CHAT,  # type: ignore[arg-type]
                max_tokens=30,
                temperature=0,
                stream=True,
            )
        )
    assert got.choices[0].message.content == wanted.text
    assert got.choices[0].message.role == "assistant"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == wanted.text
    assert chunks[-1].choices[0].finish_reason == wanted.finish_reason
    assert len({chunk.id for chunk in chunks}) == 1


def test_many_clients_at_once_each_get_their_own_text(live: Live, offline: Offline) -> None:
    prompts = [f"request {i} of many" for i in range(12)]
    wanted = [offline.answer(prompt, max_tokens=20).text for prompt in prompts]
    with live.client() as client, ThreadPoolExecutor(12) as pool:

        def ask(prompt: str) -> str:
            found = client.completions.create(model=MODEL, prompt=prompt, max_tokens=20, temperature=0)
            return found.choices[0].text

        assert list(pool.map(ask, prompts)) == wanted


def test_the_async_client_streams_several_at_once(live: Live, offline: Offline) -> None:
    prompts = [f"stream {i}" for i in range(4)]
    wanted = [offline.answer(prompt, max_tokens=20).text for prompt in prompts]

    async def ask(client: openai.AsyncOpenAI, prompt: str) -> str:
        stream = await client.completions.create(model=MODEL, prompt=prompt, max_tokens=20, temperature=0, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, prompt) for prompt in prompts))

    assert asyncio.run(all_of_them()) == wanted


def test_several_prompts_and_choices_come_in_order(live: Live, offline: Offline) -> None:
    with live.client() as client:
        got = client.completions.create(model=MODEL, prompt=PROMPTS[:2], n=2, max_tokens=10, temperature=0)
    assert [choice.index for choice in got.choices] == [0, 1, 2, 3]
    first, second = (offline.answer(prompt, max_tokens=10).text for prompt in PROMPTS[:2])
    assert [choice.text for choice in got.choices] == [first, first, second, second]
    assert got.usage is not None
    assert got.usage.prompt_tokens == sum(len(offline.tokens.encode(prompt)) for prompt in PROMPTS[:2])


def test_prompts_may_be_token_ids(live: Live, offline: Offline) -> None:
    ids = offline.tokens.encode(PROMPTS[0])
    wanted = offline.answer(PROMPTS[0], max_tokens=10).text
    with live.client() as client:
        one = client.completions.create(model=MODEL, prompt=ids, max_tokens=10, temperature=0)
        several = client.completions.create(model=MODEL, prompt=[ids, ids], max_tokens=10, temperature=0)
    assert one.choices[0].text == wanted
    assert [choice.text for choice in several.choices] == [wanted, wanted]


def test_a_seed_repeats_and_its_choices_differ(live: Live) -> None:
    with live.client() as client:

        def ask() -> list[str]:
            got = client.completions.create(
                model=MODEL, prompt="dice", n=3, max_tokens=20, temperature=1.5, seed=7, extra_body={"top_k": 50}
            )
            return [choice.text for choice in got.choices]

        first = ask()
        assert ask() == first
    assert len(set(first)) == 3


def test_a_stop_text_ends_the_answer_before_it(live: Live, offline: Offline) -> None:
    whole = offline.answer(PROMPTS[0], max_tokens=40)
    stop = whole.text[12:15]
    cut = whole.text[: whole.text.index(stop)]
    with live.client() as client:
        got = client.completions.create(model=MODEL, prompt=PROMPTS[0], max_tokens=40, temperature=0, stop=[stop, "✗"])
        streamed = client.completions.create(
            model=MODEL, prompt=PROMPTS[0], max_tokens=40, temperature=0, stop=stop, stream=True
        )
        assert "".join(chunk.choices[0].text for chunk in streamed) == cut
    assert got.choices[0].text == cut
    assert got.choices[0].finish_reason == "stop"
    assert got.usage is not None
    assert got.usage.completion_tokens < len(whole.tokens)


def test_log_probabilities_are_those_of_the_engine(live: Live, offline: Offline) -> None:
    wanted = offline.answer(PROMPTS[2], max_tokens=12, logprobs=3)
    chat = offline.chat_answer(max_tokens=8, logprobs=2)
    with live.client() as client:
        got = client.completions.create(model=MODEL, prompt=PROMPTS[2], max_tokens=12, temperature=0, logprobs=3)
        talk = client.chat.completions.create(
            model=MODEL,
            messages=CHAT,  # type: ignore[arg-type]
            max_tokens=8,
            temperature=0,
            logprobs=True,
            top_logprobs=2,
        )
    logs = got.choices[0].logprobs
    assert logs is not None
    assert logs.token_logprobs is not None
    assert logs.token_logprobs == pytest.approx([log.chosen for log in wanted.logprobs], rel=1e-5)
    assert logs.tokens == [offline.tokens.text_of(token) for token in wanted.tokens]
    content = talk.choices[0].logprobs
    assert content is not None
    assert content.content is not None
    for told, log, token in zip(content.content, chat.logprobs, chat.tokens, strict=True):
        assert told.logprob == pytest.approx(log.chosen, rel=1e-5)
        assert bytes(told.bytes or []) == offline.tokens.bytes_of(token)
        assert [top.logprob for top in told.top_logprobs] == pytest.approx([p for _, p in log.likeliest], rel=1e-5)


def test_the_model_is_listed(live: Live) -> None:
    with live.client() as client:
        assert [model.id for model in client.models.list()] == [MODEL]
        assert client.models.retrieve(MODEL).owned_by == "hetis"
        with pytest.raises(openai.NotFoundError, match="there is no model 'other', there is 'tiny'"):
            client.models.retrieve("other")
