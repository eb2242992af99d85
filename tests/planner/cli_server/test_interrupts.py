"""Ctrl-C during a call ends the command once, and says what goes on without it."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import cast

import pytest

from hetis.commands.terminal import Terminal
from hetis.planner.cli.server import planner_verbs
from hetis.planner.cli.server.planner_verbs import interrupts_that_arrive
from hetis.planner.cli.server.waiting import wait_for_plan
from hetis.planner.client import Client
from hetis.v1 import plan_pb2


def test_an_interrupt_that_python_drops_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dropping:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    dropped = list[object]()
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: dropped.append(unraisable.exc_type))
    before = signal.getsignal(signal.SIGINT)

    def watching() -> None:
        with interrupts_that_arrive():
            Dropping()
            time.sleep(60)

    with pytest.raises(KeyboardInterrupt):
        watching()
    assert dropped == [KeyboardInterrupt]
    assert signal.getsignal(signal.SIGINT) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_an_interrupt_on_its_way_out_is_not_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner_verbs, "AGAIN_S", 0.01)
    steps = list[int]()

    def watching() -> None:
        with interrupts_that_arrive():
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(60)
            finally:
                for step in range(10):
                    time.sleep(0.02)
                    steps.append(step)

    with pytest.raises(KeyboardInterrupt):
        watching()
    assert steps == list(range(10))
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)

    def hanging() -> None:
        with interrupts_that_arrive():
            try:
                raise KeyboardInterrupt
            finally:
                os.kill(os.getpid(), signal.SIGINT)  # a second Ctrl-C is meant
                steps.append(10)

    with pytest.raises(KeyboardInterrupt):
        hanging()
    assert steps == list(range(10))


@pytest.mark.parametrize("tells", [True, False])
def test_only_a_plan_of_which_a_planner_has_told_is_said_to_go_on(
    capsys: pytest.CaptureFixture[str], tells: bool
) -> None:
    class Interrupted:
        def wait(self, name: str, *, on_change: Callable[[plan_pb2.Plan], None]) -> plan_pb2.Plan:
            if tells:
                on_change(plan_pb2.Plan(name=name))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        wait_for_plan(Terminal(), cast(Client, Interrupted()), "plans/x", exists=False)
    assert ("plans/x continues on the planner" in capsys.readouterr().err) is tells
