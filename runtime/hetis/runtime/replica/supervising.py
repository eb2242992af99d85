"""Keeps the processes of a replica running, as long as its engine is to run.

What is decided is in `Supervision`, which has no processes and no clock; `supervise` brings it to life with whatever
starts a command: this machine, or an actor of Ray.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from hetis.runtime.replica.commands import Command
from hetis.runtime.replica.processes import ProcessKind

FAILED, INVALID = 1, 2
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 30.0  # before a process is started again; doubled each time
SETTLED_S = 60.0  # a process that lived so long may fail anew as if for the first time
MOST_FAILURES = 5  # of the engine, one soon after the other: it will not come
GRACE_S = 10.0  # for workers to end
_FINAL = (0, INVALID, 3, 4)  # the engine ended as it should, or would end in the same way again
_log = logging.getLogger(__name__)


class Running(Protocol):
    """A process that was started; `subprocess.Popen` is one."""

    def poll(self) -> int | None:
        """Its exit code, below 0 for a signal; None while it runs."""

    def terminate(self) -> None: ...

    def kill(self) -> None: ...


@dataclass(slots=True)
class _Watch:
    """One process over its lives."""

    is_engine: bool
    due_s: float | None  # when it is to be started; None: it runs
    started_s: float = 0.0
    failures: int = 0


class Supervision:
    """Which process is started when.

    A worker that ends is started again, for as long as it takes: the engine serves without it. An engine that fails is
    started again a few times, and its workers go over to the new one. When the engine ends as it was told to, or cannot
    start at all, all is over.

    Attributes:
        outcome: the exit code, once all is over.
    """

    def __init__(self, kinds: dict[str, ProcessKind], *, now_s: float) -> None:
        """``kinds``: of every process by its name. All are to start now."""
        self._watched = {
            name: _Watch(is_engine=kind is ProcessKind.ENGINE, due_s=now_s) for name, kind in kinds.items()
        }
        self.outcome: int | None = None

    def due(self, now_s: float) -> list[str]:
        """What is to be started now."""
        return [name for name, one in self._watched.items() if one.due_s is not None and one.due_s <= now_s]

    def started(self, name: str, now_s: float) -> None:
        one = self._watched[name]
        one.due_s, one.started_s = None, now_s

    def ended(self, name: str, code: int, now_s: float) -> float | None:
        """A process is gone; returns how long it is left alone, None where it is not started again."""
        one = self._watched[name]
        one.failures = 1 if now_s - one.started_s >= SETTLED_S else one.failures + 1
        if one.is_engine and (code in _FINAL or one.failures > MOST_FAILURES):
            self.outcome = code if code in _FINAL else FAILED
            return None
        if code == INVALID:
            self.outcome = INVALID
            return None
        wait_s = min(FIRST_WAIT_S * 2.0 ** min(one.failures - 1, 10), LONGEST_WAIT_S)
        one.due_s = now_s + wait_s
        return wait_s


def supervise(
    commands: Sequence[Command],
    start: Callable[[Command], Running],
    *,
    told: Callable[[], int],
    clock: Callable[[], float],
    wait: Callable[[], None],
) -> int:
    """Runs the processes until the engine has ended, or until told; returns the exit code.

    Args:
        commands: of the processes that are to run here; the engine may be elsewhere.
        start: starts one. An OSError counts as a process that failed at once.
        told: how often we were told to end. Once: the engine drains, then the workers go. Twice: nothing is waited for.
        wait: a moment between two looks.
    """
    by_name = {command.process.name: command for command in commands}
    supervision = Supervision({name: command.process.kind for name, command in by_name.items()}, now_s=clock())
    running: dict[str, Running] = {}
    try:
        while supervision.outcome is None and not told():
            for name in supervision.due(clock()):
                supervision.started(name, clock())
                try:
                    running[name] = start(by_name[name])
                except OSError as error:
                    _again(supervision, name, f"did not start: {error}", FAILED, clock())
            for name, process in list(running.items()):
                if (code := process.poll()) is not None:
                    del running[name]
                    _again(supervision, name, _ending(code), code, clock())
            wait()
        engines = [name for name in running if by_name[name].process.kind is ProcessKind.ENGINE]
        codes = [_end(running.pop(name), told=told, wait=wait) for name in engines]
        return supervision.outcome if supervision.outcome is not None else max(codes, default=0)
    finally:
        _end_all(running, clock=clock, wait=wait)


def _again(supervision: Supervision, name: str, how: str, code: int, now_s: float) -> None:
    wait_s = supervision.ended(name, code, now_s)
    if wait_s is not None:
        _log.warning("%s %s; it is started again in %g s", name, how, wait_s)
    elif code:
        _log.error("%s %s; all ends", name, how)


def _end(engine: Running, *, told: Callable[[], int], wait: Callable[[], None]) -> int:
    """Lets the engine drain; it bounds that time itself. Told again, it is told again."""
    engine.terminate()
    has_hurried = False
    while (code := engine.poll()) is None:
        if told() > 1 and not has_hurried:
            has_hurried = True
            engine.terminate()
        wait()
    return FAILED if code < 0 else code


def _end_all(running: dict[str, Running], *, clock: Callable[[], float], wait: Callable[[], None]) -> None:
    for process in running.values():
        process.terminate()
    deadline_s = clock() + GRACE_S
    while any(process.poll() is None for process in running.values()):
        if clock() >= deadline_s:
            for process in running.values():
                process.kill()
            return
        wait()


def _ending(code: int) -> str:
    return f"was ended by signal {-code}" if code < 0 else f"ended with {code}"
