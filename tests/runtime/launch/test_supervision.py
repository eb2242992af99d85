"""The supervisor's decisions on restarts and the final end, without processes or a clock."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from hetis.engines.commands import STOPS_S, Command
from hetis.engines.layout import Process, ProcessKind
from hetis.runtime.launch.processes import (
    FIRST_WAIT_S,
    LONGEST_WAIT_S,
    MOST_FAILURES,
    SETTLED_S,
    Supervision,
    supervise,
)

KINDS = {"vllm": ProcessKind.SERVER, "vllm-1": ProcessKind.SERVER_STAGE, "w": ProcessKind.ATTENTION_WORKER}


def supervision() -> Supervision:
    made = Supervision(KINDS, now_s=0.0)
    assert made.due(0.0) == ["vllm", "vllm-1", "w"]
    for name in KINDS:
        made.started(name, 0.0)
    assert made.due(100.0) == []
    return made


def test_a_worker_is_started_again_for_ever_and_waits_longer_each_time() -> None:
    made, now_s, waits = supervision(), 0.0, []
    for code in (1, -9, 0, 1, 1, 1, 1):
        now_s += 1.0
        wait_s = made.ended("w", code, now_s)
        assert wait_s is not None
        waits.append(wait_s)
        assert made.due(now_s + wait_s - 0.01) == []
        now_s += wait_s
        assert made.due(now_s) == ["w"]
        made.started("w", now_s)
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    assert max(waits) == LONGEST_WAIT_S
    assert made.ended("w", 1, now_s + SETTLED_S) == FIRST_WAIT_S  # the process had lived long enough
    assert made.outcome is None


def test_a_vllm_that_fails_again_and_again_is_given_up_whichever_process_of_it_fails() -> None:
    made, now_s = supervision(), 0.0
    for number in range(MOST_FAILURES):
        assert made.ended(("vllm", "vllm-1")[number % 2], -9, now_s) is not None
        for name in ("vllm", "vllm-1"):
            made.started(name, now_s)
    assert made.outcome is None
    assert made.ended("vllm", 1, now_s) is None
    assert made.outcome == 1


@pytest.mark.parametrize("code", [0, 2])
def test_a_vllm_that_ended_as_told_or_would_end_so_again_ends_all(code: int) -> None:
    made = supervision()
    assert made.ended("vllm", code, 1.0) is None
    assert made.outcome == code


def test_a_vllm_that_is_to_run_until_told_is_started_again_whatever_it_says() -> None:
    made = Supervision(KINDS, now_s=0.0, until_stopped=True)
    for name in KINDS:
        made.started(name, 0.0)
    assert made.ended("vllm", 0, 1.0) == FIRST_WAIT_S
    assert made.outcome is None
    assert made.ended("vllm", 2, 2.0) is None, "its options would be wrong again"
    assert made.outcome == 2


def test_a_worker_with_invalid_options_ends_all() -> None:
    made = supervision()
    made.ended("w", 2, 1.0)
    assert made.outcome == 2


def test_a_worker_that_could_start_once_is_waited_for() -> None:
    """A worker's exit code is also 2 if another process takes its memory, or its card is gone."""
    made = supervision()
    made.ended("w", -9, 100.0)
    made.started("w", 101.0)
    assert made.ended("w", 2, 102.0) is not None
    assert made.outcome is None
    assert made.due(200.0) == ["w"]


@dataclass
class Fake:
    """A process that ends with ``ends`` after ``looks`` polls, or ``stubborn`` polls after it is terminated."""

    name: str
    log: list[str]
    ends: int | None = None
    looks: int = 0
    stubborn: int = 0
    told: bool = False

    def poll(self) -> int | None:
        if self.ends is not None:
            if self.looks == 0:
                self.log.append(f"{self.name} ended")
                return self.ends
            self.looks -= 1
        return None

    def terminate(self) -> None:
        self.log.append(f"{self.name} told")
        if self.ends is None:
            self.ends, self.looks = 0, self.stubborn

    def kill(self) -> None:
        self.log.append(f"{self.name} killed")
        self.ends, self.looks = -9, 0


@dataclass
class World:
    """A clock that advances only by waiting, the successive processes of each name, and signals at given times."""

    lives: dict[str, list[Fake]]
    log: list[str]
    now_s: float = 0.0
    signals_s: list[float] = field(default_factory=list)

    def start(self, command: Command) -> Fake:
        name = command.process.name
        self.log.append(f"{name} started")
        if not self.lives[name]:
            raise OSError("no more lives")
        return self.lives[name].pop(0)

    def wait(self) -> None:
        self.now_s += 1.0
        assert self.now_s < 1000, self.log

    def num_stops(self) -> int:
        return sum(when_s <= self.now_s for when_s in self.signals_s)

    def run(self, *names: str) -> int:
        commands = [
            Command(
                process=Process(name=name, kind=KINDS[name], stage=0, node="n", gpus=(), kv_bytes=1),
                shown=(),
                stops_s=30.0,
            )
            for name in names
        ]
        return supervise(commands, self.start, num_stops=self.num_stops, clock=lambda: self.now_s, wait=self.wait)


def test_what_dies_is_started_again_and_vllm_ends_before_its_workers_go() -> None:
    log: list[str] = []
    lives = {
        "vllm": [Fake("vllm", log, ends=-9, looks=2), Fake("vllm", log, stubborn=3)],
        "w": [Fake("w", log, ends=1, looks=5), Fake("w", log)],
    }
    assert World(lives, log, signals_s=[20.0]).run("vllm", "w") == 0
    assert log == [
        *("vllm started", "w started", "vllm ended", "vllm started", "w ended", "w started"),
        *("vllm told", "vllm ended", "w told", "w ended"),
    ]


def test_told_twice_vllm_is_killed_and_so_are_its_workers() -> None:
    log: list[str] = []
    lives = {"vllm": [Fake("vllm", log, stubborn=500)], "w": [Fake("w", log, stubborn=1000)]}
    world = World(lives, log, signals_s=[2.0, 4.0])
    assert world.run("vllm", "w") == 1
    assert log == ["vllm started", "w started", "vllm told", "vllm killed", "w told", "w killed"]
    assert world.now_s <= 5.0


def test_told_twice_workers_alone_are_killed_and_told_once_when_their_time_is_over() -> None:
    for signals_s, ends_s in (([2.0, 4.0], 4.0), ([2.0], 2.0 + STOPS_S)):
        log: list[str] = []
        world = World({"w": [Fake("w", log, stubborn=1000)]}, log, signals_s=signals_s)
        assert world.run("w") == 0
        assert log == ["w started", "w told", "w killed"]
        assert ends_s <= world.now_s <= ends_s + 1


def test_a_vllm_that_does_not_end_in_its_time_is_killed() -> None:
    log: list[str] = []
    world = World({"vllm": [Fake("vllm", log, stubborn=500)]}, log, signals_s=[2.0])
    assert world.run("vllm") == 1
    assert log == ["vllm started", "vllm told", "vllm killed"]
    assert 32.0 <= world.now_s <= 34.0


@pytest.mark.parametrize(("fails", "other"), [("vllm", "vllm-1"), ("vllm-1", "vllm")])
@pytest.mark.parametrize("code", [-9, 1])
def test_processes_of_vllm_end_and_start_together_and_the_workers_stay(fails: str, other: str, code: int) -> None:
    log: list[str] = []
    lives = {
        fails: [Fake(fails, log, ends=code, looks=2), Fake(fails, log)],
        other: [Fake(other, log), Fake(other, log)],
        "w": [Fake("w", log)],
    }
    assert World(lives, log, signals_s=[20.0]).run("vllm", "vllm-1", "w") == 0
    assert log[:3] == ["vllm started", "vllm-1 started", "w started"]
    assert log[3:8] == [f"{fails} ended", f"{other} told", f"{other} ended", "vllm started", "vllm-1 started"]
    assert "w started" not in log[3:]


def test_a_stage_that_ends_with_0_has_lost_the_front_and_is_started_again() -> None:
    made = supervision()
    assert made.ended("vllm-1", 0, 1.0) is not None
    assert made.due(100.0) == ["vllm", "vllm-1"]


def test_the_exit_code_is_vllms() -> None:
    log: list[str] = []
    assert World({"vllm": [Fake("vllm", log, ends=2, looks=1)], "w": [Fake("w", log)]}, log).run("vllm", "w") == 2
    assert log[-2:] == ["w told", "w ended"]


def test_workers_alone_run_until_they_are_told() -> None:
    log: list[str] = []
    assert World({"w": [Fake("w", log)]}, log, signals_s=[3.0]).run("w") == 0
    assert log == ["w started", "w told", "w ended"]


def test_what_cannot_be_started_has_failed() -> None:
    log: list[str] = []
    assert World({"vllm": []}, log).run("vllm") == 1
    assert log == ["vllm started"] * (MOST_FAILURES + 1)


def test_a_stage_that_cannot_be_started_takes_the_front_with_it() -> None:
    log: list[str] = []
    lives = {"vllm": [Fake("vllm", log) for _ in range(10)], "vllm-1": list[Fake]()}
    assert World(lives, log).run("vllm", "vllm-1") == 1
    assert log == ["vllm started", "vllm-1 started", "vllm told", "vllm ended"] * (MOST_FAILURES + 1)


def test_what_was_started_ends_when_the_loop_breaks() -> None:
    log: list[str] = []
    world = World({"w": [Fake("w", log)]}, log)

    def broken() -> int:
        if world.now_s > 2:
            raise RuntimeError("broken")
        return 0

    world.num_stops = broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="broken"):
        world.run("w")
    assert log == ["w started", "w told", "w ended"]
