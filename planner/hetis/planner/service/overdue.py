"""Ends the process of a leader whose event loop hangs after its lease has ended.

The loop is what lets agents and watchers go when a term is over. Where it hangs, gRPC's own threads go on answering
pings, so that its agents would stay with it for as long as it hangs, and their nodes be LOST to the next leader. A
thread of its own looks at the lease, which is the machine's clock and no promise of the loop's.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time

from hetis.planner.service.exit_codes import ServiceExitCode
from hetis.planner.store import Lease

TICK_S = 0.5
TICKS = 4  # one after the other: a process that stood still as a whole finds its lease over, too, and steps down then


class OverdueTerm:
    """Whether a term has been over for a while and the loop has not noticed."""

    def __init__(self, lease: Lease) -> None:
        self._lease = lease
        self._ticks = 0

    def tick(self) -> bool:
        """Return whether it is overdue for `TICKS` ticks; the caller asks every `TICK_S` seconds."""
        self._ticks = self._ticks + 1 if self._lease.is_overdue else 0
        return self._ticks >= TICKS


def end_process() -> None:
    """Says where every thread is, closes no file in order, and ends: the loop is needed for any other end."""
    os.write(2, b"the lease is over and the event loop hangs: this planner ends, so that its agents find the leader\n")
    faulthandler.dump_traceback(2)
    os._exit(ServiceExitCode.INTERNAL)


def watch(lease: Lease) -> None:
    """Watches over all terms of a process from a thread; nothing where a file's lock holds the term."""
    if not lease.lease_s:
        return
    term = OverdueTerm(lease)

    def go_on() -> None:
        while not term.tick():
            time.sleep(TICK_S)
        end_process()

    threading.Thread(target=go_on, name="the guard of the lease", daemon=True).start()
