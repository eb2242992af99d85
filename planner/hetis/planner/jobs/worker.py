"""A solver process: ``python -m hetis.planner.jobs.worker``, controlled over its standard input and output.

It reads ``solve`` and ``cancel`` and writes ``ready``, ``searching``, ``compiling``, ``progress`` and one answer per
``solve``. It ends when its input ends, so that no process outlives its service. An unforeseen error also ends it, since
its state cannot be trusted any more; the service then starts another process.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

from hetis.planner.jobs.frames import JobFrame, read_frame, to_bytes

_CRASHED = 70  # EX_SOFTWARE


def main() -> None:
    inbox, outbox = _private_pipes()
    be_the_first_to_go()
    # Load the libraries, which takes seconds, before there is work.
    from hetis.planner.jobs.searching import Searcher

    searcher = Searcher(outbox.send)
    outbox.send(JobFrame(kind="ready", fields={}))
    while (frame := read_frame(inbox)) is not None:
        match frame.kind:
            case "solve":
                search = partial(searcher.solve, frame.payload, searcher.expect())
                threading.Thread(target=_finish_or_crash, args=(search,), name="solve", daemon=True).start()
            case "cancel":
                searcher.cancel()
            case other:
                raise ValueError(f"a solver process does not support {other}")
    os._exit(0)  # a search in compiled code cannot be ended in any other way


class FrameSender:
    """The connection to the service, usable from several threads."""

    def __init__(self, pipe: BinaryIO) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()

    def send(self, frame: JobFrame) -> None:
        with self._lock, suppress(BrokenPipeError):  # the service is gone; our input ends, too, which ends this process
            self._pipe.write(to_bytes(frame))
            self._pipe.flush()


def _finish_or_crash(search: Callable[[], None]) -> None:
    try:
        search()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(_CRASHED)


def _private_pipes() -> tuple[BinaryIO, FrameSender]:
    """Return the pipes, and redirect descriptors 0 and 1 so that libraries that print cannot reach them."""
    inbox, outbox = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    return inbox, FrameSender(outbox)


def be_the_first_to_go() -> None:
    """Make the kernel kill this process rather than the service when memory runs out. Linux only."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500")


if __name__ == "__main__":
    main()
