"""A call in a process of its own: results and errors come back, and nothing else does."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import pytest

from hetis.planner.jobs.apart import call_apart
from hetis.solver.errors import InfeasibleError, NoPlanFoundError


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    number: int


def noisy(value: Value) -> tuple[Value, int]:
    print("a library that prints")
    return Value(number=value.number + 1), os.getpid()


def infeasible(reason: str) -> None:
    raise InfeasibleError([reason, "and more"])


def dies() -> None:
    os._exit(3)


def is_verbose_and_fails() -> None:
    print("x" * 2**21)
    raise MemoryError("too large")


def test_a_result_comes_back_from_another_process() -> None:
    found, pid = call_apart(noisy, Value(number=1), limit_s=60)
    assert found == Value(number=2)
    assert pid != os.getpid()


def test_an_error_of_a_search_is_raised_as_it_was() -> None:
    with pytest.raises(InfeasibleError) as caught:
        call_apart(infeasible, "too small", limit_s=60)
    assert tuple(caught.value.reasons) == ("too small", "and more")


def test_a_process_that_dies_or_hangs_found_no_plan() -> None:
    with pytest.raises(NoPlanFoundError, match=r"^the solver process ended with exit code 3$"):
        call_apart(dies, limit_s=60)
    with pytest.raises(NoPlanFoundError, match=r"within 0\.2 s"):
        call_apart(time.sleep, 60, limit_s=0.2)


def test_the_last_line_of_a_process_is_in_the_error_and_those_before_in_the_log_however_much_it_wrote(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(NoPlanFoundError, match=r"ended with exit code 1: MemoryError: too large$"):
        call_apart(is_verbose_and_fails, limit_s=60)
    (line,) = caplog.messages
    assert "in is_verbose_and_fails" in line
    assert len(line) < 10_000
