"""Stages in a row, ranks within a stage, copies of one: the text is that of the whole model on one device."""

from __future__ import annotations

from threading import Barrier
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis.runtime.attention.local import LocalDevice
from hetis.runtime.engine.engine import Engine
from hetis.runtime.engine.generate import generate
from hetis.runtime.engine.pipeline import PipelineError
from hetis.runtime.engine.placement import at_home_first
from hetis.runtime.engine.request import FinishReason, RequestError, SamplingParams
from hetis.runtime.engine.step import Step
from hetis.runtime.kv.errors import DeviceLostError
from hetis.runtime.model.config import read_config
from tests.runtime.checkpoints import random_model, random_prompts
from tests.runtime.engine.pipelines import Part, assert_empty, pipeline_of, run_moving, stages_of

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"vocab_size": 100},  # 97 is nobody's multiple: the vocabulary of the others is the first rank's alone
    "llama_tied": {"family": "llama", "tie_word_embeddings": True, "vocab_size": 100},
    "llama_bias": {"family": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral_window": {"family": "mistral", "sliding_window": 21},
    "qwen2": {"kv_heads": 2, "vocab_size": 100},
    "qwen3": {"dtype": "float64"},
    "opt": {"kv_heads": 8, "vocab_size": 100},
    "opt64": {"family": "opt", "kv_heads": 8, "dtype": "float64"},
}
PIPELINES = {
    "two stages": (Part(until=1), Part(until=3, workers=1)),
    "three stages": (Part(until=1, workers=2), Part(until=2), Part(until=3, workers=1)),
    "two ranks": (Part(until=3, ranks=2),),
    "four ranks and workers": (Part(until=3, ranks=4, workers=2),),
    "uneven ranks": (Part(until=2, ranks=2, workers=1), Part(until=3, ranks=4)),
    "copies": (Part(until=1, copies=2, workers=1), Part(until=3, ranks=2)),
}


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("name", ["llama", "qwen2", "opt"])
def test_every_pipeline_is_token_identical(name: str, pipeline: str) -> None:
    model = random_model(**({"family": name} | MODELS[name]))
    prompts = random_prompts(1, 4)
    engine = pipeline_of(model.folder, *PIPELINES[pipeline])
    assert run_moving(engine, prompts, 12, seed=1) == [model.generate(prompt, 12) for prompt in prompts]
    assert_empty(engine)


@pytest.mark.parametrize("name", ["llama_tied", "llama_bias", "mistral_window", "qwen3", "opt64"])
def test_every_family_is_token_identical_on_uneven_ranks(name: str) -> None:
    model = random_model(**({"family": name} | MODELS[name]))
    prompts = random_prompts(2, 4)
    engine = pipeline_of(model.folder, *PIPELINES["uneven ranks"], chunk_tokens=17)
    assert run_moving(engine, prompts, 12, seed=2) == [model.generate(prompt, 12) for prompt in prompts]
    assert_empty(engine)


def test_requests_that_make_room_on_a_later_stage_end_the_same() -> None:
    model = random_model()
    prompts = random_prompts(7, 6, shortest=20, longest=40)
    engine = pipeline_of(model.folder, Part(until=1), Part(until=3, ranks=2, pages=22, workers=1), growth_tokens=0)
    assert run_moving(engine, prompts, 30, seed=8) == [model.generate(prompt, 30) for prompt in prompts]
    assert engine.num_preempted > 0
    assert_empty(engine)


def test_ranks_keep_their_own_heads_where_nobody_moves_them() -> None:
    engine = pipeline_of(random_model().folder, Part(until=3, ranks=2))
    number = engine.add([1, 2, 3])
    engine.step()
    assert engine.running[number].heads == {0: (0, 0, 1, 1)}


def test_more_ranks_than_kv_heads_hold_the_same_kv_for_queries_of_their_own() -> None:
    model = random_model("qwen2", kv_heads=2)
    engine = pipeline_of(model.folder, Part(until=3, ranks=4))
    prompt = random_prompts(3, 1)[0]
    number = engine.add(prompt, SamplingParams(max_tokens=2))
    engine.step()
    assert engine.running[number].heads == {0: (0, 1, 2, 3)}
    first, second, third, _ = (device.digest(number, 0, [i], len(prompt)) for i, device in _devices(engine))
    assert (first == second).all()
    assert (first != third).any()


def _devices(engine: Any) -> list[tuple[int, LocalDevice]]:
    return list(enumerate(engine.stage.devices))


def test_cohorts_share_copies_evenly_and_stay_on_theirs() -> None:
    engine = pipeline_of(random_model().folder, Part(until=1, copies=3), Part(until=3, copies=2), most_running=6)
    for prompt in random_prompts(4, 8, longest=10):
        engine.add(prompt, SamplingParams(max_tokens=8))
    engine.step()
    stages = [tuple(request.heads) for request in engine.running.values()]
    assert sorted(stages) == [(0, 3), (0, 3), (1, 4), (1, 4), (2, 3), (2, 3)]
    before = {number: tuple(request.heads) for number, request in engine.running.items()}
    engine.step()
    assert {number: tuple(request.heads) for number, request in engine.running.items()} == before


def test_a_lost_device_of_a_later_stage_costs_no_token() -> None:
    model = random_model()
    prompts = random_prompts(9, 4)
    engine = pipeline_of(model.folder, Part(until=1, workers=1), Part(until=3, ranks=2, workers=2))
    numbers = [engine.add(prompt, SamplingParams(max_tokens=12)) for prompt in prompts]
    answers: dict[int, list[int]] = {number: [] for number in numbers}
    steps = 0
    while engine.has_work:
        for news in engine.step():
            assert news.token is not None
            answers[news.request].append(news.token)
        steps += 1
        if steps == 5:
            for number in engine.running:
                assert engine.move(number, [0], 3, stage=1)
        if steps == 7:
            engine.lose_device(3, stage=1)
            assert not engine.running
    assert list(answers.values()) == [model.generate(prompt, 12) for prompt in prompts]
    assert [device.status.value for device in engine.stages[1].placement.state.devices] == ["ok", "ok", "ok", "lost"]


@pytest.mark.parametrize("pages", [400, 14])
def test_cohorts_on_their_way_at_the_same_time_are_token_identical(pages: int) -> None:
    model = random_model("qwen2", kv_heads=2, vocab_size=100)
    prompts = random_prompts(12, 8, shortest=10, longest=40)
    parts = Part(until=1, copies=2), Part(until=2), Part(until=3, ranks=2, workers=1, pages=pages)
    engine = pipeline_of(model.folder, *parts, overlaps=True, in_flight=4, growth_tokens=0)
    assert run_moving(engine, prompts, 30, seed=6, often=0.1) == [model.generate(prompt, 30) for prompt in prompts]
    assert (engine.num_preempted > 0) == (pages < 400)
    engine.close()  # what devices were told to free they have freed then
    assert_empty(engine)


def test_a_device_lost_and_a_request_cancelled_while_steps_are_on_their_way() -> None:
    model = random_model()
    prompts = random_prompts(13, 6)
    parts = Part(until=1), Part(until=3, ranks=2, workers=1)
    engine = pipeline_of(model.folder, *parts, overlaps=True, in_flight=3, chunk_tokens=20)
    numbers = [engine.add(prompt, SamplingParams(max_tokens=16)) for prompt in prompts]
    answers: dict[int, list[int]] = {number: [] for number in numbers}
    ends: dict[int, FinishReason] = {}
    steps = 0
    while engine.has_work:
        for news in engine.step():
            if news.token is not None:
                answers[news.request].append(news.token)
            if news.finish_reason is not None:
                ends[news.request] = news.finish_reason
        steps += 1
        if steps == 12:
            engine.cancel(numbers[1])
        if steps == 14:
            engine.lose_device(2, stage=1)
    wanted = [model.generate(prompt, 16) for prompt in prompts]
    assert ends.pop(numbers[1]) is FinishReason.CANCELLED
    assert set(ends.values()) == {FinishReason.LENGTH}
    cancelled = answers.pop(numbers[1])
    assert len(cancelled) < 16
    assert cancelled == wanted[1][: len(cancelled)]
    assert list(answers.values()) == [wanted[0], *wanted[2:]]
    for part in engine.stages:
        part.placement.check_invariants()
        assert len(part.placement) == 0
    engine.close()


def test_stages_that_overlap_work_on_two_cohorts_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step is on the second stage while the second step is on the first, or the barrier breaks."""
    engine = pipeline_of(random_model().folder, Part(until=1), Part(until=3), overlaps=True, in_flight=2)
    meeting = Barrier(2, timeout=60)
    for number, part in enumerate(engine.stages):
        run = part.stage.run

        def meet(step: Step, hidden: Any = None, *, own: Any = run, meets_at: int = 1 - number) -> Any:
            if step.number == meets_at:
                meeting.wait()
            return own(step, hidden)

        monkeypatch.setattr(part.stage, "run", meet)
    for prompt in random_prompts(14, 2):
        engine.add(prompt, SamplingParams(max_tokens=3))
    while engine.has_work:
        engine.step()
    assert not meeting.broken
    engine.close()


def test_sampled_requests_draw_the_same_on_a_pipeline_as_alone() -> None:
    prompts = random_prompts(15, 3)
    params = [SamplingParams(max_tokens=12, temperature=1.2, seed=seed, logprobs=2) for seed in range(3)]
    whole = generate(pipeline_of(random_model().folder, Part(until=3)), prompts, params)
    split = generate(pipeline_of(random_model().folder, *PIPELINES["uneven ranks"]), prompts, params)
    assert [answer.tokens for answer in split] == [answer.tokens for answer in whole]


def test_what_a_stage_raises_is_raised_by_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = pipeline_of(random_model().folder, Part(until=1), Part(until=3), overlaps=True)

    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(engine.stages[1].stage, "run", fail)
    engine.add([1, 2])
    with pytest.raises(RuntimeError, match="a bug"):
        engine.step()
    engine.close()


def test_a_rank_cannot_be_lost() -> None:
    engine = pipeline_of(random_model().folder, Part(until=1), Part(until=3, ranks=2, workers=1))
    with pytest.raises(DeviceLostError, match="s1c0d1: the primary is lost"):
        engine.lose_device(1, stage=1)


def test_a_request_has_to_fit_on_every_stage() -> None:
    engine = pipeline_of(random_model().folder, Part(until=1), Part(until=3, pages=7))
    with pytest.raises(RequestError, match="20 prompt and 16 output tokens need more KV pages than there are"):
        engine.add([1] * 20)
    number = engine.add([1] * 10, SamplingParams(max_tokens=4))
    assert engine.add([1] * 10, SamplingParams(max_tokens=4)) == number + 1
    engine.step()
    assert list(engine.running) == [number]  # the second waits: its heads would fit on the first stage alone
    assert len(engine.stages[0].placement) == 1
    ends = [news.finish_reason for _ in range(12) for news in engine.step() if news.finish_reason]
    assert ends == [FinishReason.LENGTH] * 2
    assert_empty(engine)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((Part(until=2),), "the stages have layers 0 to 1, the model 0 to 2"),
        ((Part(until=1), Part(until=3)), "layers 0 to 0 are in no stage"),
    ],
)
def test_stages_have_to_have_every_layer_once(parts: tuple[Part, ...], message: str) -> None:
    folder = random_model().folder
    stages = stages_of(folder, parts)
    with pytest.raises(PipelineError, match=message):
        Engine(read_config(folder), stages[-1:] if len(stages) > 1 else stages)


@given(st.data())
def test_as_many_heads_as_possible_stay_at_home(data: st.DataObject) -> None:
    ranks, each = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    homes = tuple(rank for rank in range(ranks) for _ in range(each))
    owners = data.draw(st.lists(st.integers(0, ranks + 1), min_size=len(homes), max_size=len(homes)))
    counts = np.bincount(owners, minlength=ranks + 2).tolist()
    heads = at_home_first(counts, homes)
    assert np.bincount(heads, minlength=ranks + 2).tolist() == counts
    at_home = sum(head == home for head, home in zip(heads, homes, strict=True))
    assert at_home == sum(min(counts[rank], each) for rank in range(ranks))
