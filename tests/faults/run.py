"""Faults in sequence on a running pair of planners, and the figures that docs/reliability.md shows.

    python -m tests.faults.run --kills 50 --partitions 10 --seed 1

``--tables`` makes the table ``faults`` of the documentation of them.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.cluster import Faulty, Witness, pinned
from tests.faults.history import Findings, Led, check
from tests.faults.planners import Planner
from tests.planner.store.postgres import new_database, running_server
from tools import tables

FAR_SHARE = 1 / 60  # share of the lease, each way to the store and back: 50 ms of 3 s


@dataclass(frozen=True, slots=True, kw_only=True)
class FarTerm:
    """A leader far from its store over the time of two leases.

    Attributes:
        held: whether it kept leading.
        starved_s: the longest time in which this process, a mere observer, got no processor.
    """

    held: bool
    starved_s: float


@dataclass(slots=True)
class Figures:
    """Times in seconds after each kind of fault.

    Attributes:
        takeovers: from a kill to the next acknowledged write of a client that keeps trying.
        partitions: the same from the moment of the cut.
        stands, delays: the same for a stop, and for a delay above the lease.
        far: from the kill of a leader, with both planners far from the store.
        taken, far_taken: from a kill until the store knew of the new term, near the store and far from it.
        far_terms: the effect of the distance alone on leaders.
        agents: from a fault to an agent's Welcome of the new term.
        left: the same from a stop, which an agent has to detect by itself.
        refused: answers to writers other than acknowledgements and lost races.
    """

    takeovers: list[float] = field(default_factory=list)
    partitions: list[float] = field(default_factory=list)
    stands: list[float] = field(default_factory=list)
    delays: list[float] = field(default_factory=list)
    far: list[float] = field(default_factory=list)
    taken: list[float] = field(default_factory=list)
    far_taken: list[float] = field(default_factory=list)
    far_terms: list[FarTerm] = field(default_factory=list)
    agents: list[float] = field(default_factory=list)
    left: list[float] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    findings: Findings | None = None

    def __str__(self) -> str:
        return "\n".join(
            [
                f"leader kills           {percentiles(self.takeovers)}",
                f"partitions             {percentiles(self.partitions)}",
                f"leaders stopped        {percentiles(self.stands)}",
                f"leaders delayed        {percentiles(self.delays)}",
                f"far from the store     {percentiles(self.far)}",
                f"  leaders that led on  {sum(term.held for term in self.far_terms)} of {len(self.far_terms)}",
                f"kill to the new term   {percentiles(self.taken + self.far_taken)}",
                f"agents with the leader {percentiles(self.agents)}",
                f"  after a stop         {percentiles(self.left)}",
                f"calls refused          {len(self.refused)}",
                *(f"  {line}" for line in self.refused[:5]),
                str(self.findings),
            ]
        )


def quantiles(seconds: Sequence[float]) -> tuple[float, float, float]:
    """Return p50, p99 (by the nearest rank) and the largest."""
    found = sorted(seconds)
    p50, p99 = (found[min(int(share * len(found)), len(found) - 1)] for share in (0.5, 0.99))
    return p50, p99, found[-1]


def percentiles(seconds: Sequence[float]) -> str:
    if not seconds:
        return "none"
    p50, p99, most = quantiles(seconds)
    return f"{len(seconds)} times: p50 {p50:.2f} s, p99 {p99:.2f} s, max {most:.2f} s"


def shown(value: float | None) -> str:
    """Return a value as a cell of a table."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:,.0f}" if value >= 1e3 or value == int(value) else f"{value:.3g}"


def write_totals(table: str, times: Mapping[str, Sequence[float]], findings: Findings, **counts: float) -> None:
    """Make a table of the times after each kind of fault, of other counts, and of what became of all writes."""
    rows = [(what, str(len(seconds)), *map(shown, quantiles(seconds))) for what, seconds in times.items() if seconds]
    counts |= {f"writes {what}": getattr(findings, what) for what in ("acknowledged", "lost", "doubled")}
    rows += [(what, shown(count), "", "", "") for what, count in counts.items()]
    tables.write(table, ["what", "times", "p50", "p99", "max"], rows)
    tables.main()


def inject(
    store: str,
    folder: Path,
    *,
    kills: int,
    partitions: int,
    stops: int = 0,
    delays: int = 0,
    far: int = 0,
    seed: int,
    lease_s: float,
    most_s: float = float("inf"),
) -> Figures:
    """Inject every fault into the leader, each with both planners healthy before. No fault begins after ``most_s``."""
    end_s = time.monotonic() + most_s
    figures = Figures()
    with Faulty(store, folder, lease_s=lease_s, seed=seed) as faulty:
        faults = ["kill"] * kills + ["partition"] * partitions + ["stop"] * stops + ["delay"] * delays + ["far"] * far
        faulty.chance.shuffle(faults)
        for number, fault in enumerate(faults):
            if time.monotonic() > end_s:
                break
            # At a random moment between the leader's renewals.
            time.sleep(faulty.chance.uniform(0, lease_s / 3))
            leader = faulty.leader()
            began_s = time.time()
            match fault:
                case "kill":
                    seconds = figures.takeovers
                    led, took_s = kill(faulty, leader)
                    seconds.append(took_s)
                    figures.taken.append(led.taken_s - began_s)
                case "partition":
                    seconds = figures.partitions
                    how = faulty.chance.choice(["freeze", "freeze", "cut"])
                    faulty.history.faults.append(f"{how} between leader and store")
                    with pinned(faulty, leader):
                        began_s = time.time()
                        (leader.network.freeze if how == "freeze" else leader.network.cut)()
                        led = faulty.term_after(began_s, faulty.other(leader))
                        seconds.append(faulty.acknowledged_after(led.time_s) - began_s)
                        faulty.welcomes(led.epoch)  # agents must leave the old leader before the network is repaired
                        time.sleep(faulty.chance.uniform(0, lease_s))
                        leader.network.mend()
                case "far":
                    seconds = figures.far
                    faulty.history.faults.append("leader and standby far from the store, kill -9 of the leader")
                    for planner in faulty.planners:
                        planner.network.delay(lease_s * FAR_SHARE)
                    figures.far_terms.append(_lead_on(faulty, leader))
                    leader = faulty.leader()
                    began_s = time.time()
                    leader.kill()
                    led = faulty.term_after(began_s, faulty.other(leader))
                    seconds.append(faulty.acknowledged_after(led.time_s) - began_s)
                    figures.far_taken.append(led.taken_s - began_s)
                    for planner in faulty.planners:
                        planner.network.mend()
                    leader.start()
                case "delay":
                    seconds = figures.delays
                    faulty.history.faults.append("delay above the lease between leader and store")
                    with pinned(faulty, leader):
                        began_s = time.time()
                        leader.network.delay(2 * lease_s)
                        led = faulty.term_after(began_s, faulty.other(leader))
                        seconds.append(faulty.acknowledged_after(led.time_s) - began_s)
                        leader.network.mend()
                case _:
                    seconds = figures.stands
                    faulty.history.faults.append("SIGSTOP of the leader")
                    with pinned(faulty, leader):
                        began_s = time.time()
                        leader.signal(signal.SIGSTOP)
                        led = faulty.term_after(began_s, faulty.other(leader))
                        seconds.append(faulty.acknowledged_after(led.time_s) - began_s)
                        faulty.welcomes(led.epoch)
                        time.sleep(faulty.chance.uniform(0, lease_s))
                        leader.signal(signal.SIGCONT)
            welcomes = faulty.welcomes(led.epoch)
            agents = [welcome_s - began_s for welcome_s in welcomes]
            (figures.left if fault == "stop" else figures.agents).extend(agents)
            for planner in faulty.planners:
                faulty.wait(planner.is_ready, 90)
            print(
                f"{number + 1}/{len(faults)} {fault}: {seconds[-1]:.2f} s, agents {max(agents):.2f} s",
                flush=True,
            )
        last = faulty.finish()
        figures.refused = faulty.errors
        figures.findings = check(faulty.history, last)
    return figures


def kill(faulty: Faulty, leader: Planner) -> tuple[Led, float]:
    """Kill the leader, and start it again once another leads.

    Returns the other's term, and the seconds until a client that kept trying had its next write acknowledged.
    """
    faulty.history.faults.append("kill -9 of the leader")
    began_s = time.time()
    leader.kill()
    led = faulty.term_after(began_s, faulty.other(leader))
    took_s = faulty.acknowledged_after(led.time_s) - began_s
    leader.start()
    return led, took_s


def _lead_on(faulty: Faulty, leader: Planner) -> FarTerm:
    """Wait for two leases' time and return whether the same term continued."""
    before = sum(len(planner.terms()) for planner in faulty.planners)
    with Witness() as witness:
        time.sleep(2 * faulty.lease_s)
    shown = leader.shown()
    held = shown is not None and shown["role"] == "leader"
    held &= sum(len(planner.terms()) for planner in faulty.planners) == before
    return FarTerm(held=held, starved_s=witness.longest_s)


@contextlib.contextmanager
def _logs() -> Iterator[Path]:
    """Yield a folder for the logs of planners and agents, which is kept if an error ends the run."""
    folder = Path(tempfile.mkdtemp(prefix="hetis-faults-"))
    try:
        yield folder
    except BaseException:
        print(f"the logs are in {folder}", file=sys.stderr)
        raise
    shutil.rmtree(folder)


def main() -> None:
    """Print the figures; exit with code 1 after a violation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--partitions", type=int, default=2)
    parser.add_argument("--stops", type=int, default=0)
    parser.add_argument("--delays", type=int, default=0)
    parser.add_argument(
        "--far", type=int, default=0, help="terms of leaders far from their store, which are then killed"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lease", type=float, default=5.0, help="seconds")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="inject no fault after so long")
    parser.add_argument("--tables", action="store_true", help="make the table of the page")
    given = parser.parse_args()
    with running_server() as server, _logs() as folder:
        figures = inject(
            new_database(server, "faults"),
            folder,
            kills=given.kills,
            partitions=given.partitions,
            stops=given.stops,
            delays=given.delays,
            far=given.far,
            seed=given.seed,
            lease_s=given.lease,
            most_s=given.minutes * 60,
        )
    print(figures)
    assert figures.findings is not None
    if given.tables:
        acknowledged = "to the next acknowledged write"
        times = {
            f"s from `kill -9` of the leader {acknowledged}": figures.takeovers,
            f"s from a partition {acknowledged}": figures.partitions,
            f"s from SIGSTOP of the leader {acknowledged}": figures.stands,
            f"s from `kill -9` of a leader far from its store {acknowledged}": figures.far,
            "s from a kill or a partition to an agent's Welcome by the new leader": figures.agents,
            "s from SIGSTOP to an agent's Welcome by the new leader": figures.left,
        }
        write_totals("faults", times, figures.findings, **{"calls refused": len(figures.refused)})
    raise SystemExit(bool(figures.findings.violations))


if __name__ == "__main__":
    main()
