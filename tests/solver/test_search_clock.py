"""Compiling does not count towards a search's time."""

from __future__ import annotations

import math
import threading
import time
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from hetis.solver.backends.compiled import kernel_of
from hetis.solver.backends.search_clock import SearchClock, compiling, reporting_compilations, search_seconds
from hetis.solver.budget import Budget


@given(st.lists(st.tuples(st.sampled_from(["search", "begin", "end"]), st.floats(0.0, 100.0))))
def test_it_runs_only_while_nothing_is_compiled(steps: list[tuple[str, float]]) -> None:
    now_s, told, depth, searched_s = 1000.0, list[bool](), 0, 0.0

    def machine() -> float:
        return now_s

    clock = SearchClock(clock=machine, on_change=told.append)
    budget = Budget(time_limit_s=50.0, clock=clock)
    for what, passes_s in steps:
        if what == "begin" or (what == "end" and depth):
            clock.note(what == "begin")
            depth += 1 if what == "begin" else -1
        now_s += passes_s
        searched_s += 0.0 if depth else passes_s
        assert math.isclose(budget.elapsed_s(), searched_s, abs_tol=1e-9)
    assert told == [n % 2 == 0 for n in range(len(told))]
    assert bool(told and told[-1]) == bool(depth)


def test_kernels_tell_when_they_are_compiled_and_only_then(tmp_path: Path) -> None:
    told = list[tuple[bool, str]]()

    @kernel_of(Path(__file__).parent)
    def twice(number: int) -> int:
        return 2 * number

    with reporting_compilations(lambda begins: told.append((begins, threading.current_thread().name))):
        assert twice(4) == 8
        assert twice(5) == 10
    assert twice(1.5) == 3.0
    name = threading.current_thread().name
    assert told == [(True, name), (False, name)]


def test_the_clock_of_commands_stops_while_a_kernel_is_compiled() -> None:
    """Otherwise the first plan on a machine would be what a search without the time for it has found."""
    budget = Budget(time_limit_s=1000.0, clock=search_seconds)
    with compiling():
        began_s = budget.elapsed_s()
        time.sleep(0.01)
        assert budget.elapsed_s() == began_s
    assert budget.elapsed_s() >= began_s
    time.sleep(0.01)
    assert budget.elapsed_s() > began_s
