"""Processes on this machine: they end when we do, however that comes about."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from hetis.runtime.replica.commands import Command
from hetis.runtime.replica.supervising import supervise

_LOOK_S = 0.2
_log = logging.getLogger(__name__)
_PR_SET_PDEATHSIG = 1


def run_here(commands: Sequence[Command]) -> int:
    """Starts the processes and looks after them until the engine ends or SIGTERM or SIGINT comes; the exit code."""
    told = Told()
    with told.by_signals():
        return supervise(commands, start, told=lambda: told.times, clock=time.monotonic, wait=told.wait)


def start(command: Command) -> subprocess.Popen[bytes]:
    """One process, in a group of its own: Ctrl-C reaches us alone, and we tell it. Raises OSError."""
    process = subprocess.Popen(
        command.here,
        env=os.environ | dict(command.environment),
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=_ending_with_parent(),
    )
    _log.info("%s: process %d", command.process.name, process.pid)
    return process


def names_of_this_machine() -> tuple[str, ...]:
    """What a plan may call this node: its host name, whole and up to the first dot."""
    name = socket.gethostname()
    return tuple(dict.fromkeys((name, name.partition(".")[0])))


class Told:
    """How often a signal came; a wait that a signal cuts short."""

    def __init__(self) -> None:
        self.times = 0
        self._came = threading.Event()

    @contextmanager
    def by_signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT tell it."""
        before = {number: signal.signal(number, self.hear) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def hear(self, number: int, frame: FrameType | None) -> None:
        self.times += 1
        self._came.set()

    def wait(self) -> None:
        """A moment, or until a signal comes."""
        if self._came.wait(_LOOK_S):
            self._came.clear()


def _ending_with_parent() -> Callable[[], None] | None:
    """To run in the new process before its program: if we are killed, the kernel sends it SIGTERM."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # found before the fork, after which little is allowed

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)

    return ask
