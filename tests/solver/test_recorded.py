"""Dispatch and re-dispatch answer as they did when their answers were recorded, see `tests.solver.recorded`."""

from __future__ import annotations

from collections.abc import Set

import pytest

from tests.solver.numbers import differing
from tests.solver.recorded import KINDS, SLOW, STEPS, is_same, recorded, recorded_step


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_that_were_recorded(kind: str) -> None:
    _answer_again(kind, set(range(KINDS[kind][0])) - SLOW.get(kind, set()))


@pytest.mark.soak
@pytest.mark.parametrize("kind", SLOW)
def test_answers_that_take_seconds_are_those_that_were_recorded(kind: str) -> None:
    _answer_again(kind, SLOW[kind])


def _answer_again(kind: str, seeds: Set[int]) -> None:
    number, answer = KINDS[kind]
    kept = recorded(kind)
    assert len(kept) == number
    differing = {}
    for seed in seeds:
        before, now = kept[seed], answer(seed)
        if now.keys() != before.keys() or not all(is_same(name, before[name], value) for name, value in now.items()):
            differing[seed] = (before, now)
    assert not differing, f"{len(differing)} of {number}; if it is meant, run python -m tests.solver.recorded"


@pytest.mark.parametrize("step", STEPS["dispatch"])
def test_every_step_of_dispatch_does_what_was_recorded(step: str) -> None:
    _compare("dispatch", step)


@pytest.mark.parametrize("step", STEPS["redispatch"])
def test_every_step_of_redispatch_does_what_was_recorded(step: str) -> None:
    _compare("redispatch", step)


def _compare(kind: str, step: str) -> None:
    number, answer = STEPS[kind][step]
    kept = recorded_step(kind, step)
    assert len(kept) == number
    seeds = differing(kept, [answer(seed) for seed in range(number)])
    assert not seeds, f"seeds {seeds} of {number}; if it is meant, run python -m tests.solver.recorded"
