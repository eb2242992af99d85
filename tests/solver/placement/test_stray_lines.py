"""HiGHS writes nothing to stdout, and swallows nothing that others write."""

from __future__ import annotations

import ctypes
import os
import threading
import warnings
from collections.abc import Iterator

import highspy
import numpy as np
import pytest

from hetis.solver.backends.highs import linear_program, no_stray_lines, quiet_highs

LIBC = ctypes.CDLL(None)


@pytest.fixture(autouse=True)
def nothing_waits_in_the_buffer(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    LIBC.fflush(None)
    capfd.readouterr()
    yield
    LIBC.fflush(None)


def printed(capfd: pytest.CaptureFixture[str]) -> str:
    LIBC.fflush(None)
    return capfd.readouterr().out


def test_what_c_prints_while_highs_runs_is_dropped_and_what_python_prints_is_kept(
    capfd: pytest.CaptureFixture[str],
) -> None:
    calls = []

    def polled() -> bool:
        LIBC.puts(b"printed by C")
        os.write(1, b"written to the descriptor\n")
        calls.append(1)
        return False

    highs = quiet_highs(stop=polled)
    columns, sides = np.ones(30), (np.full(1, -np.inf), np.full(1, 7.5))
    cost = -np.arange(1.0, 31.0)
    highs.passModel(
        linear_program(cost, (0 * columns, columns), sides, [(0, np.arange(30), cost % 7 + 1)], whole=columns)
    )
    highs.run()
    assert highs.getModelStatus() == highspy.HighsModelStatus.kOptimal
    LIBC.puts(b"after")
    assert printed(capfd) == "written to the descriptor\n" * len(calls) + "after\n"
    assert calls


def test_stdout_is_as_before_after_a_failure(capfd: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        LIBC.puts(b"lost")
        raise RuntimeError("the search failed")

    with pytest.raises(RuntimeError), no_stray_lines():
        fail()
    LIBC.puts(b"kept")
    assert printed(capfd) == "kept\n"


def test_lines_are_dropped_until_the_last_thread_has_left(capfd: pytest.CaptureFixture[str]) -> None:
    is_inside, may_leave = threading.Event(), threading.Event()

    def stay() -> None:
        with no_stray_lines():
            is_inside.set()
            may_leave.wait()

    other = threading.Thread(target=stay)
    other.start()
    is_inside.wait()
    with no_stray_lines():
        LIBC.puts(b"lost")
    LIBC.puts(b"lost, too: the other thread is inside")
    may_leave.set()
    other.join()
    LIBC.puts(b"kept")
    assert printed(capfd) == "kept\n"


def test_a_process_forked_in_the_meantime_prints(capfd: pytest.CaptureFixture[str]) -> None:
    with no_stray_lines(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # about a fork beside threads, which is intended
        child = os.fork()
        if child == 0:
            LIBC.puts(b"from the child")
            LIBC.fflush(None)
            os._exit(0)
        os.waitpid(child, 0)
    assert printed(capfd) == "from the child\n"
