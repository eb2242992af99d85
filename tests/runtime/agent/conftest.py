"""Fixtures of agents."""

from __future__ import annotations

import pytest

from tests.runtime.agent.builders import LOADED, PLANNER, Bench


@pytest.fixture
def bench() -> Bench:
    """A connected agent with an assignment of generation 1 that the engine has taken."""
    bench = Bench()
    bench.connect()
    bench.hear(PLANNER.assign())
    bench.answer(LOADED)
    return bench
