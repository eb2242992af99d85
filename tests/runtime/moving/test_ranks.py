"""Stages with tensor parallelism: the solver moves heads between the ranks, as one device, and the others."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hetis.runtime.engine.engine import Engine
from hetis.runtime.engine.request import SamplingParams
from hetis.runtime.moving.hauler import Hauler
from hetis.runtime.moving.redispatch import Redispatch
from tests.runtime.checkpoints import Model, random_model, random_prompts
from tests.runtime.engine.pipelines import Part, assert_empty, pipeline_of

LAYERS = 3


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(kv_heads=4)


def redispatched(engine: Engine, *, every_steps: int) -> Redispatch:
    links = np.full(engine.stages[0].num_devices, 1e-13)
    return Redispatch(hauler=Hauler(engine=engine), link_byte_s=links, every_steps=every_steps)


def make_slow(engine: Engine, *devices: int) -> None:
    """A head there takes a thousand times as long as elsewhere."""
    placement = engine.placement
    factor = np.where(np.isin(np.arange(placement.costs.num_devices), devices), 1000.0, 1.0)[:, None]
    placement.change_costs(replace(placement.costs, head_s=1e-7 * factor, kv_byte_s=1e-10 * factor))


def heads_of(engine: Engine) -> set[tuple[int, ...]]:
    """Heads of the running requests on each device."""
    return {
        tuple(np.bincount(request.heads[0], minlength=engine.stages[0].num_devices).tolist())
        for request in engine.running.values()
    }


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_solver_moves_heads_off_slow_ranks_and_back_and_the_text_stays(model: Model, ranks: int) -> None:
    engine = pipeline_of(model.folder, Part(until=LAYERS, ranks=ranks, workers=2))
    redispatch, workers = redispatched(engine, every_steps=2), (ranks, ranks + 1)
    prompts = random_prompts(61, 2)
    numbers = [engine.add(prompt, SamplingParams(max_tokens=40)) for prompt in prompts]
    answers: dict[int, list[int]] = {number: [] for number in numbers}
    seen: set[tuple[int, ...]] = set()
    while engine.has_work:
        if engine.num_steps in (4, 16, 28):
            make_slow(engine, *(workers if engine.num_steps == 16 else range(ranks)))
        for news in engine.step():
            answers[news.request] += [] if news.token is None else [news.token]
        for request in engine.running.values():
            for head, device in enumerate(request.heads[0]):
                assert device in workers or device == engine.stage.homes[head], "a head that is on a rank is at home"
        seen |= heads_of(engine)
    assert list(answers.values()) == [model.generate(prompt, 40) for prompt in prompts]
    assert all(len(set(counts[:ranks])) == 1 for counts in seen), "every rank has as many heads of a request"
    assert {counts[0] for counts in seen} >= {0, 4 // ranks}
    assert redispatch.num_moves >= 6
    assert engine.num_preempted == 0
    assert_empty(engine)


@pytest.mark.parametrize("by_solver", [True, False])
def test_full_ranks_are_relieved_of_a_head_each_before_anyone_is_preempted(model: Model, by_solver: bool) -> None:
    engine = pipeline_of(model.folder, Part(until=LAYERS, ranks=2, workers=1, pages=16), growth_tokens=0)
    make_slow(engine, 2)  # so that all heads begin on the ranks: each has room for three of five pages, which they get
    redispatch = redispatched(engine, every_steps=10_000) if by_solver else None
    prompts = random_prompts(62, 2, shortest=40, longest=40)
    numbers = [engine.add(prompt, SamplingParams(max_tokens=40, ignore_eos=True)) for prompt in prompts]
    answers: dict[int, list[int]] = {number: [] for number in numbers}
    seen: set[tuple[int, ...]] = set()
    while engine.has_work:
        for news in engine.step():
            answers[news.request] += [] if news.token is None else [news.token]
        seen |= heads_of(engine)
    assert list(answers.values()) == [model.generate(prompt, 40) for prompt in prompts]
    assert seen == {(2, 2, 0), (1, 1, 2)}
    assert engine.num_preempted == 0
    if redispatch is not None:
        assert redispatch.num_relieved > 0
    assert_empty(engine)


def test_a_request_that_somebody_left_uneven_stays_where_it_is(model: Model) -> None:
    engine = pipeline_of(model.folder, Part(until=LAYERS, ranks=2, workers=1))
    redispatched(engine, every_steps=1)
    prompts = random_prompts(63, 2)
    uneven, other = (engine.add(prompt, SamplingParams(max_tokens=16)) for prompt in prompts)
    make_slow(engine, 2)
    tokens: dict[int, list[int]] = {uneven: [], other: []}
    while engine.has_work:
        for news in engine.step():
            tokens[news.request] += [] if news.token is None else [news.token]
        if engine.num_steps == 3:
            assert engine.move(uneven, [1], 2)
            make_slow(engine, 0, 1)
        if engine.num_steps == 8:
            assert engine.running[uneven].heads[0] == (0, 2, 1, 1)
            assert engine.running[other].heads[0] == (2, 2, 2, 2)
    assert list(tokens.values()) == [model.generate(prompt, 16) for prompt in prompts]
    assert_empty(engine)
