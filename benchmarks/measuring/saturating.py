"""Plans under simulated load, over seeds: saturated rates and latencies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from hetis.planner.use_cases.simulation.simulate import seats_of
from hetis.simulator.arrivals import Arrivals, Load
from hetis.simulator.metrics import Metrics, Summary, summarise
from hetis.simulator.running import SimulationJob, SimulationRunner, runner
from hetis.simulator.values import Settings
from hetis.solver.plan import Plan
from hetis.solver.problem import PlacementProblem
from hetis.solver.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A plan under load.

    Attributes:
        lengths: lengths of the requests, not clipped.
        seeds: number of runs of each load.
        turns: how often a run, of at least ``at_least`` requests, refills the requests that the plan holds.
    """

    runs: SimulationRunner
    lengths: Workload
    seeds: int
    turns: int
    at_least: int

    def saturated(self, settings: Settings | None = None) -> tuple[Summary, list[float]]:
        """Return the summary, and the throughput by seed in requests/s, with requests always waiting."""
        # Always-waiting requests of equal length do not depend on the seed.
        num = 1 if len(self.lengths.bins) == 1 else self.seeds
        metrics = self._measured(self._load(Arrivals.SATURATED, None), settings, num) * (self.seeds // num)
        return summarise(metrics), [one.throughput_rps.value for one in metrics]

    def at(self, rate_rps: float, settings: Settings | None = None) -> Summary:
        """Return the summary for Poisson arrivals."""
        return summarise(self._measured(self._load(Arrivals.DRAWN, rate_rps), settings, self.seeds))

    def _load(self, arrivals: Arrivals, rate_rps: float | None) -> Load:
        context = self.runs.problem.model.max_position
        return Load(lengths=self.lengths, max_position=context, arrivals=arrivals, rate_rps=rate_rps)

    def _measured(self, load: Load, settings: Settings | None, num: int) -> list[Metrics]:
        count = max(self.at_least, self.turns * seats_of(self.runs.plan))
        jobs = [
            SimulationJob(
                load=load,
                num_requests=count,
                seed=seed,
                settings=replace(settings or Settings(), seed=seed),
                limits=self.runs.problem.objective,
            )
            for seed in range(num)
        ]
        return [answer.metrics for answer in self.runs.run(jobs)]


@contextmanager
def served(
    plan: Plan,
    problem: PlacementProblem,
    lengths: Workload,
    *,
    seeds: int,
    turns: int,
    at_least: int = 400,
    processes: int,
) -> Iterator[Server]:
    """Yield a plan under load, whose runs use ``processes`` separate processes (1: this process)."""
    with runner(plan, problem, processes=processes) as runs:
        yield Server(runs=runs, lengths=lengths, seeds=seeds, turns=turns, at_least=at_least)
