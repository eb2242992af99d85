"""How requests begin, end and share devices."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from hetis.runtime.attention.local import LocalDevice
from hetis.runtime.engine.absences import Absences
from hetis.runtime.engine.engine import Engine, EngineOptions
from hetis.runtime.engine.generate import engine_from_folder, generate, local_devices, local_devices_of_bytes
from hetis.runtime.engine.prompts import PromptBook
from hetis.runtime.engine.request import DevicesAwayError, FinishReason, RequestError, SamplingParams
from hetis.runtime.kv.errors import DeviceLostError
from tests.runtime.checkpoints import random_model, random_prompts, rewrite_config

PROMPTS = random_prompts(21, 4, longest=30)


def engine_of(*pages: int, **options: int) -> Engine:
    return engine_from_folder(random_model().folder, local_devices(pages), options=EngineOptions(**options))


def write_tokenizer(folder: Path) -> None:
    """A word per token: w0, w1, ..."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = {f"w{i}": i for i in range(97)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


def test_an_end_token_ends_a_request(tmp_path: Path) -> None:
    model = random_model()
    wanted = model.generate(PROMPTS[0], 20)
    end = wanted[7]
    folder = rewrite_config(model.folder, tmp_path / "model", eos_token_id=[end])
    (folder / "generation_config.json").unlink(missing_ok=True)
    engine = engine_from_folder(folder, local_devices([100]))
    [answer] = generate(engine, PROMPTS[:1], SamplingParams(max_tokens=20))
    assert answer.tokens == wanted[: wanted.index(end) + 1]
    assert answer.finish_reason is FinishReason.STOP
    [answer] = generate(engine, PROMPTS[:1], SamplingParams(max_tokens=20, ignore_eos=True))
    assert answer.tokens == wanted
    assert answer.finish_reason is FinishReason.LENGTH
    [answer] = generate(
        engine, PROMPTS[:1], SamplingParams(max_tokens=20, ignore_eos=True, stop_token_ids=(wanted[2],))
    )
    assert answer.tokens == wanted[: wanted.index(wanted[2]) + 1]


def test_a_stop_text_ends_a_request_and_its_text(tmp_path: Path) -> None:
    model = random_model()
    wanted = model.generate(PROMPTS[0], 20)
    folder = rewrite_config(model.folder, tmp_path / "model")
    write_tokenizer(folder)
    engine = engine_from_folder(folder, local_devices([100]))
    plain, stopped = generate(
        engine,
        [PROMPTS[0]] * 2,
        [SamplingParams(max_tokens=20), SamplingParams(max_tokens=20, stop=(f"w{wanted[5]} w{wanted[6]}",))],
    )
    assert plain.text == "".join(f" w{token}" for token in wanted)  # it goes on from the prompt
    assert stopped.text.split() == [f"w{token}" for token in wanted[:5]]
    assert stopped.finish_reason is FinishReason.STOP
    assert stopped.tokens == wanted[:7]


def test_stop_texts_need_a_tokenizer() -> None:
    with pytest.raises(RequestError, match="stop texts need a tokenizer"):
        engine_of(50).add([1], SamplingParams(stop=("x",)))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty"),
        ([1, 97], "the prompt has token 97, must be >= 0 and < 97"),
        ([-1], "the prompt has token -1, must be"),
        ([1] * 512, "the prompt has 512 tokens, the context 512 with the output"),
        ([1] * 100, "100 prompt and 16 output tokens need more KV pages than there are"),
    ],
)
def test_what_cannot_be_served_is_refused_when_it_is_added(prompt: list[int], message: str) -> None:
    engine = engine_of(16, 11)
    with pytest.raises(RequestError, match=message):
        engine.add(prompt)
    assert not engine.has_work


def test_answers_end_with_the_context() -> None:
    engine = engine_from_folder(
        random_model().folder, local_devices([100]), options=EngineOptions(max_tokens=len(PROMPTS[0]) + 5)
    )
    [answer] = generate(engine, PROMPTS[:1], SamplingParams(max_tokens=50))
    assert answer.tokens == random_model().generate(PROMPTS[0], 50)[:5]


def test_the_devices_together_hold_what_they_hold_one_by_one() -> None:
    """65 positions take five pages per head: 12 and 8 pages hold two heads and one; 10, 5 and 5 hold all four."""
    prompt = random_prompts(5, 1, shortest=64, longest=64)[0]
    engine = engine_of(12, 8)
    with pytest.raises(RequestError):
        engine.add(prompt, SamplingParams(max_tokens=2))
    engine = engine_of(10, 5, 5)
    [answer] = generate(engine, [prompt], SamplingParams(max_tokens=2))
    assert answer.tokens == random_model().generate(prompt, 2)


def test_many_requests_fill_every_page_of_every_device() -> None:
    """16-token prompts without growth take a page per head: 5 + 9 + 6 pages are five requests of four heads."""
    engine = engine_of(5, 9, 6, growth_tokens=0)
    for _ in range(8):
        engine.add([1] * 16, SamplingParams(max_tokens=2))
    engine.step()
    assert len(engine.running) == 5
    assert engine.placement.state.free_blocks().tolist() == [0, 0, 0]


def test_memory_is_given_in_bytes_too() -> None:
    engine = engine_from_folder(random_model().folder, local_devices_of_bytes([100_000, 50_000]))
    page = engine.stage.shape.page_bytes
    assert page == 2 * 3 * 16 * 8 * 4
    assert [device.num_pages for device in engine.stage.devices] == [100_000 // page, 50_000 // page]


def test_a_cancelled_request_is_told_and_leaves_nothing() -> None:
    engine = engine_of(100, most_running=1)
    first, second = (engine.add(prompt) for prompt in PROMPTS[:2])
    engine.step()
    for number in (first, second, second, 99):
        engine.cancel(number)
    news = engine.step()
    assert [(item.request, item.finish_reason) for item in news] == [
        (first, FinishReason.CANCELLED),
        (second, FinishReason.CANCELLED),
    ]
    assert not engine.has_work
    assert engine.placement.state.free_blocks().tolist() == [100]


def test_a_batch_with_a_bad_prompt_runs_nothing() -> None:
    engine = engine_of(100)
    with pytest.raises(RequestError):
        generate(engine, [PROMPTS[0], []], SamplingParams())
    assert not engine.running
    assert not engine.waiting


def test_the_primary_cannot_be_lost() -> None:
    engine = engine_of(100, 100)
    with pytest.raises(DeviceLostError, match="the primary is lost"):
        engine.lose_device(0)


LARGE = [1] * 100  # with five tokens more it takes seven pages for each of four heads
AWAY = "local1 is away: the devices that are left have too few KV pages"


def test_a_request_that_no_longer_fits_ends_where_nobody_expects_the_device_back() -> None:
    engine = engine_of(16, 16)
    number = engine.add(LARGE, SamplingParams(max_tokens=5))
    engine.step()
    engine.lose_device(1)
    news = engine.step()
    assert [(item.request, item.finish_reason) for item in news] == [(number, FinishReason.UNAVAILABLE)]
    assert news[0].error == AWAY
    assert not engine.has_work


def waiting_engine(clock: list[float]) -> Engine:
    """Waits for lost devices for 60 s by a clock that the test sets."""
    engine = engine_of(16, 16, patience_s=60)
    engine.absences = Absences(engine.stages, patience_s=60, clock=lambda: clock[0])
    return engine


def answers_of(engine: Engine) -> dict[int, list[int]]:
    """Tokens until there is nothing to do but wait."""
    answers: dict[int, list[int]] = {}
    while engine.has_work and not engine.only_waits:
        for news in engine.step():
            assert news.finish_reason in {None, FinishReason.LENGTH}, news
            if news.token is not None:
                answers.setdefault(news.request, []).append(news.token)
    return answers


def test_a_request_that_needs_a_lost_device_waits_for_it_and_others_pass() -> None:
    clock = [0.0]
    engine = waiting_engine(clock)
    running = engine.add(LARGE, SamplingParams(max_tokens=5))
    first = [news.token for news in engine.step() if news.token is not None]
    engine.lose_device(1)
    clock[0] = 59.0
    added = engine.add(LARGE, SamplingParams(max_tokens=5))  # as large as all devices can hold, so it is not refused
    small = engine.add(PROMPTS[0], SamplingParams(max_tokens=5))
    wanted = random_model().generate(LARGE, 5)
    assert answers_of(engine) == {small: random_model().generate(PROMPTS[0], 5)}
    assert engine.only_waits
    assert [request.number for request in engine.waiting] == [running, added]
    lost = engine.stage.devices[1]
    engine.restore_device(1, LocalDevice(lost.name, lost.shape, lost.num_pages))
    assert answers_of(engine) == {running: wanted[len(first) :], added: wanted}
    assert not engine.has_work


def test_a_device_that_stays_away_is_waited_for_in_vain_but_not_for_ever() -> None:
    clock = [0.0]
    engine = waiting_engine(clock)
    engine.lose_device(1)
    number = engine.add(LARGE, SamplingParams(max_tokens=5))
    assert engine.step() == []
    clock[0] = 59.9
    assert engine.step() == []
    clock[0] = 60.0
    [news] = engine.step()
    assert (news.request, news.finish_reason, news.error) == (number, FinishReason.UNAVAILABLE, AWAY)
    assert not engine.has_work
    with pytest.raises(DevicesAwayError, match=AWAY):
        engine.add(LARGE, SamplingParams(max_tokens=5))
    with pytest.raises(RequestError, match="200 prompt and 5 output tokens need more KV pages than there are"):
        engine.add([1] * 200, SamplingParams(max_tokens=5))  # which no device that comes back would change
    small = engine.add(PROMPTS[0], SamplingParams(max_tokens=5))
    assert answers_of(engine) == {small: random_model().generate(PROMPTS[0], 5)}


def test_a_request_that_outgrows_the_devices_that_are_left_waits_too() -> None:
    engine = waiting_engine([0.0])
    engine.lose_device(1)
    prompt = PROMPTS[0]
    number = engine.add(prompt, SamplingParams(max_tokens=100 - len(prompt)))  # 16 pages hold 64 tokens of all heads
    begun = answers_of(engine)[number]
    assert len(prompt) + len(begun) == 65  # the last token's KV is not held
    assert engine.only_waits
    lost = engine.stage.devices[1]
    engine.restore_device(1, LocalDevice(lost.name, lost.shape, lost.num_pages))
    rest = answers_of(engine)[number]
    assert begun + rest == random_model().generate(prompt, 100 - len(prompt))


def test_prompts_under_way_take_no_more_than_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice 60 tokens are more than a context of 66 and a chunk of 24: the second begins when the first is through."""
    engine = engine_of(100, max_tokens=66, chunk_tokens=24)
    book, kept = engine.stages[0].prompts, list[int]()
    forget = engine.stage.forget_prompt

    def peak(request: int, incarnation: int) -> None:
        """Memory is looked at before any of it is given back."""
        kept.append(sum(prompt.k.shape[2] for each in engine.stage._prompts.values() for prompt in each))
        forget(request, incarnation)

    monkeypatch.setattr(engine.stage, "forget_prompt", peak)
    prompts = [random_prompts(7, 1, shortest=60, longest=60)[0], random_prompts(8, 1, shortest=60, longest=60)[0]]
    short = PROMPTS[0][:5]
    answers = generate(engine, [*prompts, short], SamplingParams(max_tokens=3))
    assert [answer.tokens for answer in answers] == [random_model().generate(each, 3) for each in [*prompts, short]]
    assert max(kept) <= book.most_tokens == 66 + 24
    assert book.tokens == 0


def test_a_prompt_that_has_to_wait_is_not_passed_by_later_ones_and_holds_up_nobody_when_it_leaves() -> None:
    book = PromptBook()
    book.most_tokens = 10
    assert book.begin(1, 6)
    assert not book.begin(2, 5)
    assert not book.begin(3, 4)  # it would fit, but 2 is next
    book.end(1)
    assert not book.begin(3, 4)
    assert book.begin(2, 5)
    assert book.begin(3, 4)
    assert not book.begin(4, 2)
    book.end(4)
    assert book.begin(5, 1)
    assert book.tokens == 10


def test_random_draws_survive_preemption_and_other_requests() -> None:
    params = SamplingParams(max_tokens=30, temperature=1.5, seed=4)
    [alone] = generate(engine_of(200), PROMPTS[:1], params)
    others = [dataclasses.replace(params, seed=i) for i in range(5, 8)]
    crowded_engine = engine_of(21, growth_tokens=0)
    crowded = generate(crowded_engine, PROMPTS, [params, *others])
    assert crowded_engine.num_preempted > 0
    assert crowded[0].tokens == alone.tokens
