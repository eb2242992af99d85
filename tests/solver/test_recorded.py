"""Dispatch and re-dispatch answer as they did when their answers were recorded, see `tests.solver.recorded`."""

from __future__ import annotations

import pytest

from tests.solver.recorded import KINDS, is_same, recorded


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_that_were_recorded(kind: str) -> None:
    number, answer = KINDS[kind]
    kept = recorded(kind)
    assert len(kept) == number
    differing = {}
    for seed, before in enumerate(kept):
        now = answer(seed)
        if now.keys() != before.keys() or not all(is_same(name, before[name], value) for name, value in now.items()):
            differing[seed] = (before, now)
    assert not differing, f"{len(differing)} of {number}; if it is meant, run python -m tests.solver.recorded"
