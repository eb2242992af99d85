"""Ctrl-C during a solve, in separate processes."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest

from hetis.planner.cli.searching import run_interruptibly

# Works until it is cancelled, or for a minute at most; prints a line when it has begun.
PROGRAM = """
import sys, threading, time
from hetis.planner.cli.searching import run_interruptibly
cancelled = threading.Event()
def work():
    print("begun", flush=True)
    {wait}
    return "incumbent"
print(run_interruptibly(work, cancelled=cancelled, on_cancel=lambda: print("stopping", flush=True)), flush=True)
"""


def start(wait: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(wait=wait)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "begun\n"
    return process


def test_the_first_ctrl_c_asks_for_the_incumbent() -> None:
    process = start("cancelled.wait(60)")
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert out.splitlines() == ["stopping", "incumbent"]
    assert process.returncode == 0


def test_the_second_ctrl_c_leaves_at_once() -> None:
    process = start("time.sleep(60)")
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "stopping\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err == "aborted\n"


def test_an_error_of_the_solve_reaches_the_caller() -> None:
    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match=r"^no$"):
        run_interruptibly(fail, cancelled=threading.Event(), on_cancel=lambda: None)


def test_the_handler_of_ctrl_c_is_put_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    assert run_interruptibly(lambda: 7, cancelled=threading.Event(), on_cancel=lambda: None) == 7
    assert signal.getsignal(signal.SIGINT) is before
