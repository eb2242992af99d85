"""Keeps the processes of a replica running as long as vLLM is to run.

All decisions are in `Supervision`, which has no processes and no clock. `supervise` applies them with any function
that starts a command, on this machine or in an actor of Ray.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from hetis.engines.commands import STOPS_S, Command
from hetis.engines.layout import ProcessKind

FAILED, INVALID = 1, 2
VLLM = (ProcessKind.SERVER, ProcessKind.SERVER_STAGE)
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 30.0  # before a process is restarted; doubled each time
SETTLED_S = 60.0  # after running this long, a process may fail as if for the first time
MOST_FAILURES = 5  # of vLLM, in quick succession: it will not come up
_FINAL = (0, INVALID)  # vLLM ended as it should, or would end the same way again
_log = logging.getLogger(__name__)


class Running(Protocol):
    """A started process; `subprocess.Popen` satisfies this."""

    def poll(self) -> int | None:
        """Return its exit code, below 0 for a signal, or None while it runs."""

    def terminate(self) -> None: ...

    def kill(self) -> None: ...


@dataclass(slots=True)
class _Watch:
    """One process across its restarts."""

    kind: ProcessKind
    due_s: float | None  # when to start it; None: it runs
    started_s: float = 0.0
    failures: int = 0


class Supervision:
    """Decides which process is started when.

    A worker that ends is restarted indefinitely, because vLLM serves without it. The processes of vLLM live and end
    together: if one fails, all are restarted a few times, and rejoin the existing workers. When the front end exits as
    told, or one of them cannot start at all, everything ends.

    Attributes:
        outcome: the exit code, once everything has ended.
    """

    def __init__(self, kinds: dict[str, ProcessKind], *, now_s: float, until_told: bool = False) -> None:
        """Initialise with all processes due now.

        Args:
            kinds: the kind of every process by its name.
            until_told: vLLM must not end by itself: it is restarted even if it ends with 0.
        """
        self._final = (INVALID,) if until_told else _FINAL
        self._watched = {name: _Watch(kind=kind, due_s=now_s) for name, kind in kinds.items()}
        self.outcome: int | None = None

    def due(self, now_s: float) -> list[str]:
        """Return the names of the processes to start now."""
        return [name for name, one in self._watched.items() if one.due_s is not None and one.due_s <= now_s]

    def started(self, name: str, now_s: float) -> None:
        one = self._watched[name]
        one.due_s, one.started_s = None, now_s

    def together(self, name: str) -> list[str]:
        """Return the processes that cannot continue without this one, including itself."""
        is_vllm = self._watched[name].kind in VLLM
        return [other for other, one in self._watched.items() if one.kind in VLLM] if is_vllm else [name]

    def ended(self, name: str, code: int, now_s: float) -> float | None:
        """Note that a process is gone. Returns how long all `together` with it must wait, or None if nothing is
        restarted.
        """
        one = self._watched[name]
        group = [self._watched[other] for other in self.together(name)]
        failures = 1 if now_s - one.started_s >= SETTLED_S else max(other.failures for other in group) + 1
        # A further process of vLLM also ends with 0 when the one with the front is gone.
        is_final = code in self._final if one.kind is ProcessKind.SERVER else code == INVALID
        if is_final or (one.kind in VLLM and failures > MOST_FAILURES):
            self.outcome = code if is_final else FAILED
            return None
        wait_s = min(FIRST_WAIT_S * 2.0 ** min(failures - 1, 10), LONGEST_WAIT_S)
        for other in group:
            other.failures, other.due_s = failures, now_s + wait_s
        return wait_s


def supervise(
    commands: Sequence[Command],
    start: Callable[[Command], Running],
    *,
    told: Callable[[], int],
    clock: Callable[[], float],
    wait: Callable[[], None],
    until_told: bool = False,
) -> int:
    """Run the processes until vLLM has ended, or until told to stop; return the exit code.

    Args:
        commands: for the processes that are to run here; vLLM may be elsewhere.
        start: starts one. An OSError counts as an immediate failure of the process.
        told: how often we were told to stop. Once: vLLM ends first, then the workers. Twice: without waiting.
        wait: pauses between two checks.
        until_told: as in `Supervision`.
    """
    by_name = {command.process.name: command for command in commands}
    kinds = {name: command.process.kind for name, command in by_name.items()}
    supervision = Supervision(kinds, now_s=clock(), until_told=until_told)
    running: dict[str, Running] = {}

    def gone(name: str, how: str, code: int) -> None:
        others = {one: running.pop(one) for one in supervision.together(name) if one in running}
        _end_all(others, clock=clock, wait=wait)
        wait_s = supervision.ended(name, code, clock())
        if wait_s is not None:
            _log.warning("%s %s; it is started again in %g s", name, how, wait_s)
        elif code:
            _log.error("%s %s; all ends", name, how)

    try:
        while supervision.outcome is None and not told():
            for name in supervision.due(clock()):
                supervision.started(name, clock())
                try:
                    running[name] = start(by_name[name])
                except OSError as error:
                    gone(name, f"did not start: {error}", FAILED)
                    break
            for name, process in list(running.items()):
                if name in running and (code := process.poll()) is not None:
                    del running[name]
                    gone(name, _ending(code), code)
            wait()
        fronts = [name for name in running if by_name[name].process.kind is ProcessKind.SERVER]
        codes = [_end(running.pop(name), by_name[name].stops_s, told=told, clock=clock, wait=wait) for name in fronts]
        return supervision.outcome if supervision.outcome is not None else max(codes, default=0)
    finally:
        _end_all(running, clock=clock, wait=wait)


def _end(
    front: Running, stops_s: float, *, told: Callable[[], int], clock: Callable[[], float], wait: Callable[[], None]
) -> int:
    """Let vLLM end. It is killed when told again, or when its time is over."""
    front.terminate()
    deadline_s = clock() + stops_s
    while (code := front.poll()) is None:
        if told() > 1 or clock() >= deadline_s:
            _log.warning("vllm has not ended, and is killed")
            front.kill()
            return FAILED
        wait()
    return FAILED if code < 0 else code


def _end_all(running: dict[str, Running], *, clock: Callable[[], float], wait: Callable[[], None]) -> None:
    for process in running.values():
        process.terminate()
    deadline_s = clock() + STOPS_S
    while any(process.poll() is None for process in running.values()):
        if clock() >= deadline_s:
            for process in running.values():
                process.kill()
            return
        wait()


def _ending(code: int) -> str:
    return f"was ended by signal {-code}" if code < 0 else f"ended with {code}"
