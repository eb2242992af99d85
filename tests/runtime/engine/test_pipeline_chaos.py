"""Random pipelines under random events: heads move, by themselves as devices get slow, and from outside; devices are
lost and come back, requests are cancelled; every token that comes is the whole model's.
"""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from hetis.runtime.attention.local import LocalDevice
from hetis.runtime.engine.engine import Engine
from hetis.runtime.engine.request import FinishReason, SamplingParams
from hetis.runtime.moving.hauler import Hauler, WantedMove
from hetis.runtime.moving.redispatch import Redispatch
from tests.runtime.checkpoints import random_model, random_prompts
from tests.runtime.engine.pipelines import Part, assert_empty, pipeline_of

PROMPTS = random_prompts(17, 8)
TOKENS = 20


def random_parts(chooser: random.Random) -> list[Part]:
    """Any stages: the ranks of each have room for the longest request without the attention workers."""
    untils = [*sorted(chooser.sample([1, 2], chooser.randrange(3))), 3]
    return [
        Part(
            until=until,
            ranks=chooser.choice([1, 2, 4]),
            workers=chooser.randrange(3),
            copies=chooser.choice([1, 1, 2]),
            pages=chooser.randrange(24, 60),
        )
        for until in untils
    ]


def disturb(engine: Engine, hauler: Hauler, chooser: random.Random) -> None:
    """One event, now and then."""
    part = chooser.choice(engine.stages)
    first, num = part.stage.num_ranks, part.num_devices
    lost = [i for i, d in enumerate(part.placement.state.devices) if d.status.value == "lost"]
    here = [request for request in engine.running.values() if part.number in request.heads]
    match chooser.randrange(12):
        case 0 if num > first:
            engine.lose_device(chooser.randrange(first, num), stage=part.number)
        case 1 | 2 if lost:
            old = part.stage.devices[lost[0]]
            engine.restore_device(lost[0], LocalDevice(old.name, old.shape, old.num_pages), stage=part.number)
        case 3 if here:
            engine.preempt(chooser.choice(here).number)
        case 4:
            slow = np.array([10.0 ** chooser.randrange(4) for _ in range(num)])[:, None]
            costs = part.placement.costs
            part.placement.change_costs(replace(costs, head_s=1e-7 * slow, kv_byte_s=1e-10 * slow))
        case _ if here:
            request = chooser.choice(here)
            head, target = chooser.randrange(len(part.stage.homes)), chooser.randrange(num)
            if target != request.heads[part.number][head] and target not in lost:
                hauler.reserve([WantedMove(request.number, (head,), target, stage=part.number)], permitted_s=60)


def run_disturbed(engine: Engine, chooser: random.Random) -> tuple[dict[int, list[int]], dict[int, FinishReason]]:
    """Tokens and ends of requests, by the number of their prompt."""
    hauler = Hauler(engine=engine, bytes_per_step=2000)
    for part in engine.stages:
        if part.placement.group.num_places > 1:
            links = np.full(part.num_devices, 1e-13)
            Redispatch(hauler=hauler, link_byte_s=links, stage=part.number, every_steps=2)
    waiting, number_of = list(range(len(PROMPTS))), dict[int, int]()
    answers: dict[int, list[int]] = {}
    ends: dict[int, FinishReason] = {}
    while waiting or engine.has_work:
        if waiting and chooser.random() < 0.3:
            prompt = waiting.pop()
            number_of[engine.add(PROMPTS[prompt], SamplingParams(max_tokens=TOKENS))] = prompt
            answers[prompt] = []
        for news in engine.step():
            if news.token is not None:
                answers[number_of[news.request]].append(news.token)
            if news.finish_reason is not None:
                ends[number_of[news.request]] = news.finish_reason
        if chooser.random() < 0.5:
            disturb(engine, hauler, chooser)
        if number_of and chooser.random() < 0.01:
            engine.cancel(chooser.choice(list(number_of)))
    return answers, ends


@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(3, 60))])
def test_every_token_of_a_disturbed_pipeline_is_right(seed: int) -> None:
    chooser = random.Random(seed)
    model = random_model("qwen2", kv_heads=4, seed=4)
    engine = pipeline_of(
        model.folder,
        *random_parts(chooser),
        overlaps=chooser.random() < 0.6,
        in_flight=chooser.randrange(1, 4),
        chunk_tokens=chooser.randrange(7, 50),
        growth_tokens=chooser.choice([0, 16]),
    )
    answers, ends = run_disturbed(engine, chooser)
    engine.close()
    for prompt, tokens in answers.items():
        wanted = model.generate(PROMPTS[prompt], TOKENS)
        assert tokens == wanted[: len(tokens)], prompt
        assert ends[prompt] is (FinishReason.LENGTH if len(tokens) == TOKENS else FinishReason.CANCELLED), prompt
    assert_empty_but_lost(engine)


def assert_empty_but_lost(engine: Engine) -> None:
    """A device that was lost keeps what it held: it is not the engine's any more."""
    for part in engine.stages:
        for index, device in enumerate(part.placement.state.devices):
            if device.status.value == "lost":
                old = part.stage.devices[index]
                part.stage.replace_device(index, LocalDevice(old.name, old.shape, old.num_pages))
    assert_empty(engine)
