"""Ends the process of a leader whose event loop hangs after its lease has expired.

The loop is what dismisses agents and watchers when a term is over. If it hangs, gRPC's own threads still answer pings,
so its agents would stay with it for as long as it hangs, and their nodes would be LOST to the next leader. A separate
thread checks the lease, which depends on the machine's clock and not on the loop.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time

from hetis.planner.service.exit_codes import ServiceExitCode
from hetis.planner.store import Lease

TICK_S = 0.5
TICKS = 4  # in a row: a process that was suspended as a whole finds its lease expired, too, but then steps down


class OverdueTerm:
    """Detects a term that has been over for a while without the loop noticing."""

    def __init__(self, lease: Lease) -> None:
        self._lease = lease
        self._ticks = 0

    def tick(self) -> bool:
        """Return whether the term has been overdue for `TICKS` ticks; to be called every `TICK_S` seconds."""
        self._ticks = self._ticks + 1 if self._lease.is_overdue else 0
        return self._ticks >= TICKS


def end_process() -> None:
    """Dump the stacks of all threads and exit without cleanup, since any other way of ending needs the loop."""
    os.write(2, b"the lease is over and the event loop hangs: this planner ends, so that its agents find the leader\n")
    faulthandler.dump_traceback(2)
    os._exit(ServiceExitCode.INTERNAL)


def watch(lease: Lease) -> None:
    """Guard all terms of a process from a thread; do nothing if a file's lock holds the term."""
    if not lease.lease_s:
        return
    term = OverdueTerm(lease)

    def go_on() -> None:
        while not term.tick():
            time.sleep(TICK_S)
        end_process()

    threading.Thread(target=go_on, name="the guard of the lease", daemon=True).start()
