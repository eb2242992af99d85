"""An hour of a pair of planners on PostgreSQL with agents, floods, strangers and killed leaders, all at once.

    python -m tests.faults.hour --minutes 60 --kills 50 --agents 1000

It has twelve parts. In the first and the last three, leaders are killed; between them one leader serves for half of the
time, whose memory and CPU show whether they grow. Every part has a flood of reports by one agent, one by 500, and a
while of strangers, each a tenth of its time; writers compare and swap a register throughout, and reads are timed.

Agents are scripted, with a TCP connection each, in one process; all share this machine's cores. A row has

- the leader's CPU time per second of a part (only if none was killed) and its memory at the part's end;
- ``p50``, ``p99`` of reads in ms (20 calls/s) that began outside floods, strangers and takeovers, and the p99 of those
  beside each; ``failed`` reads are those that a client with a deadline of 20 s gave up;
- ``takeover``: the longest time from a kill to the next acknowledged write, and ``agents``, to the return of 95% of
  agents; ``serving``: the fewest of the plan's replicas that a leader showed as SERVING at any look before, after or
  without a kill; strangers' calls by status; the machine's load and the cores that its host kept from it.

The last lines have all takeovers and what became of every acknowledged write. Exit code 1: one was lost or doubled, or
not all replicas served before a kill, or within 90 s after it.
``--tables`` makes the tables ``hour`` and ``hour totals`` of the documentation of them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.measuring.service_calls import CLUSTER, PLAN, Latencies, paced, timed_call
from benchmarks.measuring.service_crowd import Crowd
from benchmarks.measuring.service_planner import cell_fleet, raise_file_limit, stolen_s
from hetis.planner.callers import CallerRole
from hetis.planner.client import AsyncClient
from hetis.planner.service.identity.credentials import create_token
from hetis.v1 import plan_pb2, plan_service_pb2
from tests.faults.cluster import Faulty, fleet
from tests.faults.history import Findings, check
from tests.faults.planners import Planner
from tests.faults.run import kill, percentiles, shown, write_totals
from tests.planner.store.postgres import new_database, running_server
from tools import tables

PARTS, KILLED_PARTS = 12, (0, 1, 2, 9, 10, 11)
SHARE_S = 0.1  # of a part, for each flood and the strangers
FLOODS = {"one agent": (7_000.0, 1), "500 agents": (10_000.0, 500)}  # reports per second, of so many agents
CALM_REPORTS_PER_S, READS_PER_S, STRANGERS_PER_S = 200.0, 20.0, 500.0
AFTERMATH_S = 3.0  # after a flood, strangers or a takeover
BACK = 0.95  # share of the agents after whose return a takeover is over for them
LEASE_S = 5.0
TAKEOVER_S = 10.0  # as promised
SERVED_S = 90.0  # after which replicas that do not serve count as lost


@dataclass(slots=True)
class Record:
    """What happened so far. ``spans``: kind, begin and end of what disturbs reads, by the monotonic clock."""

    spans: list[tuple[str, float, float]] = field(default_factory=list)
    takeovers: list[float] = field(default_factory=list)
    returns: list[float] = field(default_factory=list)
    served: list[float] = field(default_factory=list)
    serving: list[int] = field(default_factory=list)  # replicas, at each look
    unserved: list[str] = field(default_factory=list)  # what was awaited in vain
    strangers: Counter[str] = field(default_factory=Counter)

    @contextmanager
    def spanning(self, kind: str) -> Iterator[None]:
        began_s = time.monotonic()
        try:
            yield
        finally:
            self.spans.append((kind, began_s, time.monotonic() + AFTERMATH_S))

    def ms(self, found: Latencies, kind: str | None, percent: int = 99) -> float:
        """Return a percentile of the calls beside one kind of disturbance alone, or beside none (None)."""
        kinds = [{k for k, begin, end in self.spans if begin < at_s + s and at_s < end} for at_s, s in _calls(found)]
        wanted = set() if kind is None else {kind}
        seconds = [s for (_, s), own in zip(_calls(found), kinds, strict=True) if own == wanted]
        return 1e3 * float(np.percentile(seconds, percent)) if seconds else math.nan


def _calls(found: Latencies) -> list[tuple[float, float]]:
    return list(zip(found.began_s, found.seconds, strict=True))


class Hour:
    """All processes of the run."""

    def __init__(self, faulty: Faulty, crowd: Crowd, agents: int) -> None:
        self.faulty, self.num_agents = faulty, agents
        self.record = Record()
        self.num_replicas = 0
        self._crowd, self._busy = crowd, threading.Lock()

    def set_rate(self, per_s: float, agents: int | None = None) -> None:
        with self._busy:
            self._crowd.set_rate(per_s, agents=agents)

    def connected(self) -> int:
        with self._busy:
            return self._crowd.counts().connected

    def connect(self, token: str) -> None:
        """Create a cluster whose nodes have an agent each, and activate its plan."""
        cells = cell_fleet(self.num_agents)
        client = self.faulty.client
        self.faulty.create(CLUSTER.partition("/")[2], cells.cluster)
        nodes = [(node, 2 if node == cell[0] else 1) for cell in cells.cells for node in cell]
        nodes += [(node, 1) for node in cells.spare]
        with self._busy:
            self._crowd.connect(self.faulty.addresses, CLUSTER, nodes, token=token)
        plan = plan_pb2.Plan(cluster=CLUSTER, imported=cells.plan)
        request = plan_service_pb2.CreatePlanRequest(plan_id=PLAN.partition("/")[2], plan=plan)
        client.plans.CreatePlan(request)
        client.plans.ActivatePlan(plan_service_pb2.ActivatePlanRequest(name=PLAN))
        client.wait(PLAN)
        self.num_replicas = len(cells.cells)
        if not self.serve("before the first part"):
            raise AssertionError(self.record.unserved[-1])

    def serve(self, when: str) -> bool:
        """Wait until all replicas serve; note what every look showed, and if it was in vain."""
        end_s = time.monotonic() + SERVED_S
        while True:
            num = self.faulty.leader().serving(CLUSTER)
            self.record.serving += [] if num is None else [num]
            if num == self.num_replicas:
                return True
            if time.monotonic() > end_s:
                self.record.unserved.append(f"{num or 0} of {self.num_replicas} replicas serve {when}")
                return False
            time.sleep(0.5)

    # --- what disturbs, each in a thread of its own

    def kills(self, count: int, end_s: float) -> None:
        """Kill leaders, evenly over the time that is left; each must be followed before the next."""
        for left in range(count, 0, -1):
            pause_s = (end_s - time.monotonic()) / left
            self.serve("before a kill")
            began_s = time.monotonic()
            with self.record.spanning("kill"):
                _, took_s = kill(self.faulty, self.faulty.leader())
                self.record.takeovers.append(took_s)
                self.faulty.wait(lambda: self.connected() >= BACK * self.num_agents, 90)
                self.record.returns.append(time.monotonic() - began_s)
                if self.serve("after a kill"):
                    self.record.served.append(time.monotonic() - began_s)
            for planner in self.faulty.planners:
                self.faulty.wait(planner.is_ready, 90)
            time.sleep(max(0.0, began_s + pause_s * self.faulty.chance.uniform(0.8, 1.0) - time.monotonic()))

    def floods(self, part_s: float) -> None:
        for name, (per_s, agents) in FLOODS.items():
            time.sleep(part_s * SHARE_S)
            with self.record.spanning(name):
                self.set_rate(per_s, agents)
                time.sleep(part_s * SHARE_S)
                self.set_rate(CALM_REPORTS_PER_S)
        time.sleep(part_s * SHARE_S)
        with self.record.spanning("strangers"):
            command = [sys.executable, "-m", "tests.faults.strangers", self.faulty.addresses]
            command += ["--per-s", f"{STRANGERS_PER_S:g}", "--seconds", f"{part_s * SHARE_S:g}"]
            found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            self.record.strangers.update(json.loads(found))

    async def part(self, read: AsyncClient, number: int, part_s: float, num_kills: int) -> dict[str, float | None]:
        leader = await asyncio.to_thread(self.faulty.leader)
        took, returned, writes = len(self.record.takeovers), len(self.record.returns), len(self.faulty.history.writes)
        looks = len(self.record.serving)
        cpu, stolen, began_s = cpu_s(leader), stolen_s(), time.monotonic()
        call = timed_call(lambda: read.plans.GetPlan(plan_service_pb2.GetPlanRequest(name=PLAN), timeout=20))
        found, *_ = await asyncio.gather(
            paced(call, per_s=READS_PER_S, seconds=part_s),
            asyncio.to_thread(self.floods, part_s),
            asyncio.to_thread(self.kills, num_kills, began_s + part_s),
        )
        seconds, last = time.monotonic() - began_s, await asyncio.to_thread(self.faulty.leader)
        await asyncio.to_thread(self.serve, f"at the end of part {number + 1}")
        acknowledged = [write for write in self.faulty.history.writes[writes:] if write.version is not None]
        return {
            "part": number + 1,
            "kills": num_kills,
            "cores": None if num_kills else (cpu_s(last) - cpu) / seconds,
            "MiB": rss_mib(last),
            "p50": self.record.ms(found, None, 50),
            "p99": self.record.ms(found, None),
            **{f"p99 {kind}": self.record.ms(found, kind) for kind in (*FLOODS, "strangers")},
            "failed": len(found.failures),
            "writes": len(acknowledged),
            "takeover": max(self.record.takeovers[took:], default=None),
            "agents": max(self.record.returns[returned:], default=None),
            "serving": min(self.record.serving[looks:]),
            "load": os.getloadavg()[0],
            "host kept": (stolen_s() - stolen) / seconds,
        }


def cpu_s(planner: Planner) -> float:
    fields = Path(f"/proc/{planner.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss_mib(planner: Planner) -> float:
    return int(Path(f"/proc/{planner.pid}/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def make_tables(hour: Hour, rows: list[dict[str, float | None]], minutes: float, findings: Findings) -> None:
    """Make the tables of the parts and of the whole, and their excerpts on pages."""
    tables.write("hour", list(rows[0]), ([shown(value) for value in row.values()] for row in rows))
    times = {
        "s from `kill -9` of the leader to the next acknowledged write": hour.record.takeovers,
        f"s from it to the return of {BACK:.0%} of {hour.num_agents:,} agents": hour.record.returns,
        f"s from it to the time when all of {hour.num_replicas} replicas serve": hour.record.served,
    }
    write_totals("hour totals", times, findings, minutes=minutes, **{"waits in vain": len(hour.record.unserved)})


def run(*, minutes: float, kills: int, agents: int, clusters: int, seed: int, makes_tables: bool) -> int:
    """Run, print rows as they are measured, and return the exit code."""
    raise_file_limit()
    folder = Path(tempfile.mkdtemp(prefix="hetis-hour-"))
    print(f"logs: {folder}", file=sys.stderr)
    tokens, expires = folder / "tokens.yaml", datetime.now(UTC) + timedelta(days=1)
    make = partial(create_token, str(tokens), expires=expires)
    admin = make(name="admin", role=CallerRole.ADMIN, scope=None)
    agent = make(name="agents", role=CallerRole.AGENT, scope=CLUSTER)
    options = ["--set", f"tokens={tokens}", "--set", "agents.heartbeat=5s", "--set", "writes.per_second=1000"]
    options += ["--set", "writes.burst=1000", "--set", "connections.per_host=100000"]
    with ExitStack() as stack:
        server = stack.enter_context(running_server())
        faulty = Faulty(new_database(server, "hour"), folder, lease_s=LEASE_S, seed=seed, options=options, token=admin)
        stack.enter_context(faulty)
        for number in range(clusters):
            faulty.create(f"other-{number}", fleet(number))
        crowd = stack.enter_context(Crowd())
        hour = Hour(faulty, crowd, agents)
        hour.connect(agent)
        hour.set_rate(CALM_REPORTS_PER_S)
        with asyncio.Runner() as runner:
            rows = runner.run(_parts(hour, admin, minutes, kills))
        findings = check(faulty.history, faulty.finish())
        print(f"takeovers              {percentiles(hour.record.takeovers)}; promised are {TAKEOVER_S:g} s")
        print(f"agents back            {percentiles(hour.record.returns)}, {BACK:.0%} of {agents:,}")
        print(f"all replicas serve     {percentiles(hour.record.served)}; in vain {hour.record.unserved}")
        print(f"strangers' calls       {dict(sorted(hour.record.strangers.items()))}")
        print(f"answers to writers     {Counter(error.partition(':')[0] for error in faulty.errors)}")
        print(findings)
    if makes_tables:
        make_tables(hour, rows, minutes, findings)
    return bool(findings.violations or findings.lost or hour.record.unserved)


async def _parts(hour: Hour, token: str, minutes: float, kills: int) -> list[dict[str, float | None]]:
    rows = list[dict[str, float | None]]()
    read = AsyncClient(hour.faulty.addresses, token=token)
    left = kills
    try:
        for number in range(PARTS):
            num_kills = 0
            if number in KILLED_PARTS:
                num_kills = left // (len(KILLED_PARTS) - KILLED_PARTS.index(number))
                left -= num_kills
            row = await hour.part(read, number, 60 * minutes / PARTS, num_kills)
            if number == 0:
                print("|".join(row))
            print("|".join(map(shown, row.values())), flush=True)
            rows.append(row)
    finally:
        await read.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--agents", type=int, default=1000)
    parser.add_argument("--clusters", type=int, default=300, help="further clusters, which a new leader has to read")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tables", action="store_true", dest="makes_tables", help="make the tables of the pages")
    given = parser.parse_args()
    raise SystemExit(run(**vars(given)))


if __name__ == "__main__":
    main()
