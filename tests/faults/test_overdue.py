"""A leader whose event loop hangs ends itself, so that its agents leave."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hetis.planner.service.exit_codes import ServiceExitCode
from hetis.planner.service.succession import TICKS, OverdueTerm
from hetis.planner.store import Lease
from tests.planner.service.process import Process

LEASE_S = 5.0  # a busy machine may keep a leader from renewing a shorter one before the hang


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_only_a_term_that_is_over_for_long_and_not_ended_is_overdue() -> None:
    clock = Clock()
    lease = Lease(5.0, clock)
    term = OverdueTerm(lease)
    assert not any(term.tick() for _ in range(2 * TICKS))  # no term has begun
    lease.grant(clock())
    clock.now_s += 4.9
    assert not any(term.tick() for _ in range(2 * TICKS))
    clock.now_s += 0.2
    assert [term.tick() for _ in range(TICKS)] == [False] * (TICKS - 1) + [True]
    lease.end()  # the loop has noticed the end of the lease
    assert not any(term.tick() for _ in range(2 * TICKS))
    lease.grant(clock())
    clock.now_s += 6.0
    assert not any(term.tick() for _ in range(TICKS - 1))  # a suspended machine starts to count when it resumes
    lease.grant(clock())
    assert not any(term.tick() for _ in range(2 * TICKS))


def test_a_leader_whose_loop_hangs_ends_soon_after_its_lease(postgres_url: str, tmp_path: Path) -> None:
    options = (
        *("--listen", "127.0.0.1:0", "--status-page", "127.0.0.1:0", "--ready-json", "--store", postgres_url),
        *("--set", "solver.processes=1", "--set", f"leadership.lease={LEASE_S:g}s"),
    )
    with Process(options, folder=tmp_path, module="tests.faults.hanging") as planner:
        planner.ready()
        planner.signal(signal.SIGUSR2)
        code, said = planner.end(timeout_s=40)  # the hang lasts longer
    assert code == ServiceExitCode.INTERNAL
    assert "the event loop hangs" in said


def test_a_leader_that_hangs_because_nothing_reads_its_log_ends_as_well() -> None:
    ending = """
import os
from contextlib import suppress
from hetis.planner.service.succession import _end_process
os.set_blocking(2, False)
with suppress(BlockingIOError):
    while os.write(2, bytes(1000)):
        pass
os.set_blocking(2, True)
_end_process()
"""
    with subprocess.Popen([sys.executable, "-c", ending], stderr=subprocess.PIPE) as planner:
        try:
            assert planner.wait(60) == ServiceExitCode.INTERNAL
        finally:
            planner.kill()


@pytest.mark.parametrize(
    ("ending", "said"),
    [
        ("from hetis.planner.service.succession import _end_process; _end_process()", "the event loop hangs"),
        ("from hetis.commands.process import _leave; _leave(2, None)", "interrupted"),
        ("import os; os.abort()", "Fatal Python error: Aborted"),
    ],
)
def test_what_a_planner_writes_as_it_ends_at_once_reaches_the_operator(ending: str, said: str) -> None:
    """Its descriptor 2 is a pipe to one of its threads, which may not run again."""
    planner = f"""
import sys
from hetis.planner.service.observability.handshakes import watched_handshakes
with watched_handshakes():
    sys.setswitchinterval(60)  # the thread that reads the pipe gets no turn
    {ending}
"""
    ended = subprocess.run([sys.executable, "-c", planner], capture_output=True, text=True, timeout=60, check=False)
    assert said in ended.stderr


def test_handshakes_are_counted_also_while_nothing_can_be_written() -> None:
    planner = """
import os, time
from hetis.planner.service.observability.handshakes import FAILED, watched_handshakes
with watched_handshakes():
    for line in (
        "a library says something",
        "E0101 00:00:00.000000 1 h.cc:1] CallNextHandshakerLocked: error=Socket closed"
        " endpoint_peer_address=ipv4:1.2.3.4:5,",
    ):
        os.write(2, line.encode() + bytes([10]))
    while not FAILED:
        time.sleep(0.01)
print(dict(FAILED))
"""
    with open("/dev/full", "wb") as full:
        ended = subprocess.run(
            [sys.executable, "-c", planner], stdout=subprocess.PIPE, stderr=full, timeout=60, check=False
        )
    assert ended.stdout == b"{'CLOSED': 1}\n"
